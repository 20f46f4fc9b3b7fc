"""Published judgements, judged again by a judge of one's own, so that its numbers can be read beside published ones.

This module knows the files: judgements, and the outputs that were judged. Asking is left to `epsdpo.evaluation.judges`,
the comparison of the two judges to `epsdpo.evaluation.judges.calibrate`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.evaluation.judge import LazyJudge
from epsdpo.evaluation.judges.calibrate import calibrate
from epsdpo.evaluation.judges.comparison import Comparison
from epsdpo.evaluation.scores.annotations import InputError, read_annotations, read_rows
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
