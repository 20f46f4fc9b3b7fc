"""Published judgements, judged again by a judge of one's own, so that its numbers can be read beside published ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.evaluation.judge import LazyJudge
from epsdpo.evaluation.judges.comparison import Comparison
from epsdpo.evaluation.scores.annotations import InputError, read_annotations, read_rows
from epsdpo.evaluation.scores.clusters import clusters_of
from epsdpo.evaluation.scores.intervals import Interval, bootstrap
from epsdpo.experiment import CalibrateSection


@dataclass(frozen=True)
class Published:
    """Judgements with the outputs that were judged.

    Attributes:
        judge: who judged, where the file says so.
        model: whose outputs were compared with the reference's, likewise.
        comparisons: what was judged.
        preferences: the published ones, from 1 (the reference wins) to 2, NaN where judging failed.
    """

    judge: str | None
    model: str | None
    comparisons: list[Comparison]
    preferences: list[float]


def read_published(section: CalibrateSection, seed: int) -> Published:
    """Read judgements and outputs, and draw `max_prompts` of them.

    Outputs come from the annotations where these hold them, else by instruction from the files of outputs, lists of
    objects with `instruction` and `output`.

    Raises:
        InputError: if a file is not what it should be, an output is missing, or its length is not that of the output
            that was judged.
    """
    annotations = read_annotations(section.annotations)
    rows = read_rows(Path(section.annotations))
    references = _outputs(rows, "output_1", section.reference_outputs, "reference_outputs", section.annotations)
    models = _outputs(rows, "output_2", section.outputs, "outputs", section.annotations)
    table = annotations.prompts.assign(
        reference_output=annotations.prompts["instruction"].map(references),
        model_output=annotations.prompts["instruction"].map(models),
    )
    for side, key in (("reference", "reference_outputs"), ("model", "outputs")):
        _check_outputs(table, side, f"evaluate.calibrate_with.{key}", section.annotations)
    if section.max_prompts is not None and section.max_prompts < len(table):
        drawn = np.random.default_rng(seed).choice(len(table), section.max_prompts, replace=False)
        table = table.iloc[sorted(drawn)]
    comparisons = [
        Comparison(row.instruction, row.reference_output, row.model_output) for row in table.itertuples(index=False)
    ]
    return Published(annotations.annotator, annotations.model, comparisons, table["preference"].tolist())


def judge_again(published: Published, judge: LazyJudge, samples: int, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Judge published comparisons and put the two judges beside each other.

    Returns:
        A row per comparison (instruction, official, judged: preferences, NaN where judging failed), and the numbers of
        `Calibration` for the summary, each interval as a pair of keys.

    Raises:
        JudgeError: if the judge cannot be asked.
        ValueError: if fewer than two comparisons are judged by both.
    """
    judged = [judgement.preference for judgement in judge.compare(published.comparisons)]
    instructions = [comparison.instruction for comparison in published.comparisons]
    found = calibrate(published.preferences, judged, samples, seed, prompts=instructions)
    numbers: dict[str, Any] = {"judge": published.judge, "model": published.model}
    for name, value in asdict(found).items():
        if isinstance(value, dict):
            numbers |= {name: value["value"], **{f"{name}_{end}": bound for end, bound in value["interval"].items()}}
        else:
            numbers[name] = value
    table = pd.DataFrame({"instruction": instructions, "official": published.preferences, "judged": judged})
    return table.astype({"official": "float64", "judged": "float64"}), numbers


@dataclass(frozen=True)
class Measure:
    """A number with its percentile bootstrap over prompts."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """The judge against the official judge.

    Attributes:
        n_total: comparisons given.
        n_scored: those for which both have a preference; all else is about these.
        n_distinct: conversations that these are of.
        official_win_rate: in percent.
        judged_win_rate: in percent.
        bias: judged - official win rate, in points.
        scatter: standard deviation (n - 1) of the prompts' differences in preference, in points.
        correlation: Pearson's, of the preferences; NaN where one judge says the same of all.
        agreement: share in percent of the prompts on which both prefer the same output. Where both call a draw they
            agree; where one does, they half agree.
    """

    n_total: int
    n_scored: int
    n_distinct: int
    official_win_rate: float
    judged_win_rate: float
    bias: Measure
    scatter: Measure
    correlation: Measure
    agreement: Measure


def calibrate(
    official: Sequence[float | None],
    judged: Sequence[float | None],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    prompts: Sequence[str] | None = None,
) -> Calibration:
    """Compare preferences in [1, 2] (None = failed) for the same comparisons in the same order.

    Args:
        samples: how many times the prompts are resampled for the intervals.
        seed: of the resamples.
        level: coverage of the intervals, in (0, 1).
        prompts: what each comparison is about, as text: all about one are resampled together. By default each is about
            another.

    Raises:
        ValueError: if the lists differ in length, fewer than two comparisons have both, or one is out of range.
    """
    if len(official) != len(judged):
        raise ValueError(
            f"{len(official)} official preferences and {len(judged)} judged ones; they must belong together"
        )
    pairs = np.array([official, judged], dtype=np.float64).T
    both = ~np.isnan(pairs).any(axis=1)
    clusters = np.unique(clusters_of(prompts, len(pairs))[both], return_inverse=True)[1]
    pairs = pairs[both]
    if len(pairs) < 2:
        raise ValueError(f"calibration needs two comparisons that both judged; {len(pairs)} of {len(official)} are")
    if outside := pairs[(pairs < 1.0) | (pairs > 2.0)].tolist():
        raise ValueError(f"preference {outside[0]:g} is outside [1, 2]; a failed judgement must be None")

    def measure(statistic: Callable[[np.ndarray], float]) -> Measure:
        # A resample in which one judge says the same of all has no correlation; it is left out.
        return Measure(statistic(pairs), bootstrap(lambda rows: statistic(pairs[rows]), clusters, samples, seed, level))

    official_rate, judged_rate = 100.0 * (pairs.mean(axis=0) - 1.0)
    return Calibration(
        n_total=len(official),
        n_scored=len(pairs),
        n_distinct=int(clusters.max()) + 1,
        official_win_rate=float(official_rate),
        judged_win_rate=float(judged_rate),
        bias=measure(lambda rows: 100.0 * float(np.mean(rows[:, 1] - rows[:, 0]))),
        scatter=measure(lambda rows: 100.0 * float(np.std(rows[:, 1] - rows[:, 0], ddof=1))),
        correlation=measure(_correlation),
        agreement=measure(_agreement),
    )


def _correlation(rows: np.ndarray) -> float:
    centred = rows - rows.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    return float((centred[:, 0] * centred[:, 1]).sum() / spread.prod()) if (spread > 0.0).all() else float("nan")


def _agreement(rows: np.ndarray) -> float:
    sides = np.sign(rows - 1.5)
    return 100.0 * float(np.mean(1.0 - np.abs(sides[:, 0] - sides[:, 1]) / 2.0))


def _outputs(
    annotations: list[dict[str, Any]], column: str, file: str | None, key: str, annotations_file: str
) -> dict[str, str]:
    """Outputs by instruction."""
    if file is not None:
        return {row["instruction"]: row["output"] for row in read_rows(Path(file)) if "instruction" in row}
    found = {row["instruction"]: row[column] for row in annotations if isinstance(row.get(column), str)}
    if not found:
        raise InputError(
            f"{annotations_file} holds no `{column}`: name the file with these outputs in evaluate.calibrate_with.{key}"
        )
    return found


def _check_outputs(table: pd.DataFrame, side: str, where: str, annotations_file: str) -> None:
    outputs, lengths = table[f"{side}_output"], table[f"{side}_length"]
    for instruction, output, length in zip(table["instruction"], outputs, lengths, strict=True):
        if not isinstance(output, str):
            raise InputError(f"{where}: no output for {instruction[:60]!r}, which {annotations_file} judges")
        if not np.isnan(length) and len(output) != length:
            raise InputError(
                f"{where}: the output for {instruction[:60]!r} has {len(output)} characters, the judged one had "
                f"{length:.0f}. Give the outputs that {annotations_file} is about"
            )
