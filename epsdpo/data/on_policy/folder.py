"""The folder of sampled pairs as later stages know it; it is filled by `epsdpo.data.on_policy.sample`."""

from pathlib import Path

from epsdpo.experiment import ConfigError, DataSection

PAIRS, REPORT = "pairs.parquet", "report.json"


def with_sampled_pairs(section: DataSection, pairs_dir: str | Path) -> DataSection:
    """The `data` section as it goes on after sampling: its source is the pairs in `pairs_dir`.

    Args:
        pairs_dir: what `epsdpo.data.on_policy.sample` wrote; "" for a section with another source, which is
            returned as it is.

    Raises:
        ConfigError: if the folder is missing or unfinished, or given for another source.
    """
    if section.on_policy is None:
        if pairs_dir:
            raise ConfigError(f"pairs_dir is {str(pairs_dir)!r}, but data.source is {section.source!r}. Leave it out")
        return section
    if not pairs_dir:
        return section  # refused where sources are found, with the remedy
    if not (Path(pairs_dir) / REPORT).is_file():
        raise ConfigError(f"{pairs_dir} holds no {REPORT}: sampling has not ended there. Run the stage `sample` first")
    return section.model_copy(update={"source": str(Path(pairs_dir) / PAIRS)})
