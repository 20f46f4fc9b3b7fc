"""Published judgements with the outputs that were judged, so that another judge can be asked about the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
