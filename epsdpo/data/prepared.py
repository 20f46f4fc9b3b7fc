"""Prepared data: preference pairs checked, counted, tokenised once and written, and read back for every later stage."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from epsdpo.data.rows import cut_prompt
from epsdpo.data.sources import DataError, find_source, read_split
from epsdpo.data.split import PARTS, SplitWriter, check_split, hold_out, quantiles
from epsdpo.experiment import ConfigError, DataSection
from epsdpo.files import writable, written_whole
from epsdpo.methods.chat_template import render_chat

__all__ = [
    "DataError",
    "PreparedData",
    "columns_table",
    "counts_table",
    "load_prepared",
    "prepare",
    "refusals_table",
    "token_lengths",
    "with_sampled_pairs",
]

REPORT = "report.json"  # written last, here as where pairs are sampled
PAIRS = "pairs.parquet"  # of a folder of sampled pairs


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder as later stages see it.

    `train` and `eval` have the columns pair_id, prompt, chosen, rejected (text for people, uncut), prompt_ids,
    chosen_ids, rejected_ids and, from the embedded world, chosen_gold and rejected_gold. `prompts` has prompt_id,
    instruction, task and prompt_ids. `report` is report.json.
    """

    directory: Path
    train: datasets.Dataset
    eval: datasets.Dataset | None
    prompts: datasets.Dataset | None
    report: dict[str, Any]


def with_sampled_pairs(section: DataSection, pairs_dir: str | Path) -> DataSection:
    """The `data` section as it goes on after sampling: its source is the pairs in `pairs_dir`.

    Args:
        pairs_dir: what sampling wrote; "" for a section with another source, which is
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


def prepare(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, output_dir: str | Path, *, max_length: int | None
) -> PreparedData:
    """Read the pairs that `section` names, check and tokenise them, and write the prepared folder.

    Args:
        section: the `data` section of an experiment.
        tokenizer: the model's tokenizer, with its chat template if the data are conversations.
        output_dir: folder for train.parquet, eval.parquet, prompts.parquet (the world's) and report.json. A folder
            prepared before is replaced; one whose preparation was interrupted cannot be loaded.
        max_length: tokens of prompt + completion that training will keep (`train.max_length`); None keeps all.

    Raises:
        DataError: if the source, a split, a column or the tokenizer is wrong, pair ids are not unique, or no row of a
            split can be used.
    """
    source = find_source(section)
    names = {"train": section.train_split, "eval": section.eval_split}
    limits = {"train": section.max_train_pairs, "eval": section.max_eval_pairs}
    if section.eval_share is None:
        splits = {part: read_split(source, section, name, limits[part]) for part, name in names.items() if name}
    else:
        names["eval"] = section.train_split
        parts = hold_out(read_split(source, section, section.train_split, None), section.eval_share, section.eval_seed)
        splits = {
            part: rows.part(list(range(len(rows.values)))[: limits[part]])
            for part, rows in zip(("train", "eval"), parts, strict=True)
        }
    formats = {part: check_split(rows, tokenizer) for part, rows in splits.items()}

    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, "train.parquet", "eval.parquet", "prompts.parquet"):
        (directory / name).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "source": {"kind": source.kind, "name": source.name, "revision": source.revision, "subset": section.subset},
        "tokenizer": {"name": tokenizer.name_or_path, "vocabulary": len(tokenizer)},
        "template_date": section.template_date,
        "max_prompt_length": section.max_prompt_length,
        "max_length": max_length,
        "splits": {},
    }
    for part, rows in splits.items():
        writer = SplitWriter(
            *(names[part], formats[part], tokenizer),
            *(section.max_prompt_length, max_length, section.template_date),
        )
        report["splits"][part] = writer.write(rows, directory / f"{part}.parquet")
    if section.speaks_world:
        report["prompts"] = _write_world_prompts(section, tokenizer, directory / "prompts.parquet")
    # Written last: a folder without a report is one whose preparation did not end.
    text = json.dumps(writable(report), indent=2, ensure_ascii=False) + "\n"
    with written_whole(directory / REPORT) as partial:
        partial.write_text(text, encoding="utf-8")
    return load_prepared(directory)


def load_prepared(directory: str | Path) -> PreparedData:
    """Read a prepared folder back.

    Raises:
        DataError: if the folder was not prepared, its preparation was interrupted, or a file has changed since.
    """
    directory = Path(directory)
    remedy = "Prepare the data (again): notebook 01_prepare_data, or the stage `prepare` of a run"
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no {REPORT}: not prepared, or interrupted half-way. {remedy}") from error
    except ValueError as error:
        raise DataError(f"{directory / REPORT} is not readable: {error}. {remedy}") from error
    expected = {part: split["rows_kept"] for part, split in report["splits"].items()}
    if "prompts" in report:
        expected["prompts"] = report["prompts"]["rows"]
    tables = {}
    for part, rows in expected.items():
        path = directory / f"{part}.parquet"
        try:
            # In memory: `Dataset.from_parquet` would write a copy into a cache of its own.
            tables[part] = datasets.Dataset(pq.read_table(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not readable: {error}. {remedy}") from error
        if len(tables[part]) != rows:
            raise DataError(f"{path} holds {len(tables[part])} rows, and {REPORT} says {rows}. {remedy}")
    return PreparedData(directory, tables["train"], tables.get("eval"), tables.get("prompts"), report)


def _write_world_prompts(section: DataSection, tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, Any]:
    """The world's held-out instructions, tokenised as the prompts of the pairs were."""
    from epsdpo.world.build import evaluation_prompts

    frame = evaluation_prompts(section.world)
    texts = [render_chat(messages, tokenizer, section.template_date, answer_next=True) for messages in frame["prompt"]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    columns = {
        "prompt_id": pa.array(frame["prompt_id"].astype(str), pa.string()),
        "instruction": pa.array(frame["instruction"], pa.string()),
        "task": pa.array(frame["task"], pa.string()),
        "prompt_ids": pa.array([cut_prompt(row, section.max_prompt_length) for row in ids], pa.list_(pa.int32())),
    }
    with written_whole(path) as partial:
        pq.write_table(pa.table(columns), partial)
    return {"rows": len(frame), "tokens": quantiles([len(row) for row in ids])}


# ------------------------------------------------------------------------------------------------ tables for a reader


def counts_table(report: dict[str, Any]) -> pd.DataFrame:
    """One row per split: rows read, kept and refused, and pairs that were or will be cut."""
    return pd.DataFrame(
        {
            "split": part,
            "format": split["format"],
            "rows read": split["rows_read"],
            "kept": split["rows_kept"],
            "refused": split["rows_read"] - split["rows_kept"],
            "prompt cut from the left": split["truncated"]["prompt"],
            "completion cut by max_length": split["truncated"]["completion"],
            "prompt not a prefix": split["prompt_not_a_prefix"]["rows"],
        }
        for part, split in report["splits"].items()
    )


def refusals_table(report: dict[str, Any]) -> pd.DataFrame:
    """One row per split and reason: how many rows were refused, what the reason means, first row numbers (from 0)."""
    rows = [
        (part, reason, entry["rows"], _said(entry), ", ".join(map(str, entry["examples"])))
        for part, split in report["splits"].items()
        for reason, entry in split["refused"].items()
    ]
    return pd.DataFrame(rows, columns=["split", "reason", "rows", "meaning", "first rows"])


def _said(entry: dict[str, Any]) -> str:
    return entry["meaning"] + (f" (first: {entry['message']})" if "message" in entry else "")


def columns_table(report: dict[str, Any]) -> pd.DataFrame:
    """What rows bring beside prompt and responses, one row per split and column, setting or field of messages: in how
    many rows it has a value, and what is made of it."""
    rows = [
        (part, name, count, use)
        for part, split in report["splits"].items()
        for use, key in (("written by the chat template", "written_beside"), ("not used", "not_used"))
        for name, count in split[key].items()
    ]
    return pd.DataFrame(rows, columns=["split", "column", "rows with a value", "use"])


def token_lengths(prepared: PreparedData) -> pd.DataFrame:
    """Tidy token counts, one row per split, pair and part: the columns split, part ("prompt", "chosen", "rejected") and
    tokens. Prompts are as cut; completions are not cut yet."""
    frames = [
        pd.DataFrame(
            {"split": split, "part": part, "tokens": pc.list_value_length(table.data.column(f"{part}_ids")).to_numpy()}
        )
        for split, table in (("train", prepared.train), ("eval", prepared.eval))
        if table is not None
        for part in PARTS
    ]
    return pd.concat(frames, ignore_index=True)
