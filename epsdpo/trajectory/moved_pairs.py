"""Which pairs moved β at each optimiser step, few and short enough for one interactive figure.

Bounded in size however long the run was, from the β record and the texts of the prepared data.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.trajectory.summary import DECISIONS

PAIRS_PER_STEP = 8
LETTERS = 80  # of each text
MOST_STEPS = 2000
MOST_BYTES = 2_000_000

_PAIR_COLUMNS = ["step", "pair_id", "decision", "log_ratio_margin", "chosen_tokens", "rejected_tokens"]


def moved_pairs(pairs: pd.DataFrame, at_most: int = PAIRS_PER_STEP) -> pd.DataFrame:
    """Of every step, at most so many of the pairs that chose β⁻ or β⁺: relaxed and tightened in turn.

    Within a decision those with the largest log-ratio margins in size come first: there policy and reference differ
    most.

    Args:
        pairs: from `read_pairs`.

    Returns:
        Columns step, pair_id, decision (+1 or -1), log_ratio_margin (nats), chosen_tokens, rejected_tokens.
    """
    moved = pairs.loc[pairs["decision"] != 0, _PAIR_COLUMNS]
    moved = moved.iloc[np.argsort(-moved["log_ratio_margin"].abs().to_numpy(), kind="stable")]
    turn = moved.groupby(["step", "decision"]).cumcount()
    moved = moved.assign(turn=turn).sort_values(["step", "turn", "decision"], ascending=[True, True, False])
    return moved.groupby("step").head(at_most).drop(columns="turn").reset_index(drop=True)


def step_by_step(
    title: str, steps: pd.DataFrame, pairs: pd.DataFrame, texts: pd.DataFrame, beta_follows: bool = True
) -> dict[str, Any]:
    """What an interactive figure of one run shows, as JSON can say it, in at most about `MOST_BYTES`.

    Long runs are thinned to `MOST_STEPS` steps, and then to fewer pairs per step; `note` says what was left out.

    Args:
        title: of the run.
        steps: from `read_steps`.
        pairs: from `read_pairs`.
        texts: prepared training data with columns pair_id, prompt, chosen, rejected.
        beta_follows: whether the decisions move β; if not, the figure says what they would have done.

    Returns:
        title, note, none_moved (what to say of a step without such pairs),
        steps (a list per quantity), pairs (per step, a list of lists: place in `texts`, decision, margin,
        tokens of chosen and rejected) and texts (lists: pair_id, prompt, chosen, rejected).
    """
    places = np.unique(np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int))
    shown = steps.iloc[places]
    counts = _counts(pairs, shown["step"])
    of_shown = pairs[pairs["step"].isin(shown["step"])]
    for at_most in (PAIRS_PER_STEP, 4, 2, 1, 0):
        content = {
            "title": title,
            "note": _note(len(shown), len(steps), at_most, beta_follows),
            "none_moved": f"No pair {'moved' if beta_follows else 'would have moved'} β here.",
            "steps": {
                "step": shown["step"].tolist(),
                "before": _rounded(shown["beta_before"]),
                "after": _rounded(shown["beta_after"]),
                **counts,
            },
            **_pairs_and_texts(moved_pairs(of_shown, at_most), shown["step"].tolist(), texts),
        }
        if len(json.dumps(content, ensure_ascii=False).encode()) <= MOST_BYTES:
            break
    return content


def _note(shown: int, steps: int, at_most: int, beta_follows: bool) -> str:
    thinned = f"{shown} of {steps} steps are shown. " if shown < steps else ""
    kept = "" if beta_follows else "This method decides β otherwise: the pairs are those that would have moved it. "
    return (
        f"{kept}{thinned}At most {at_most} pairs are listed per step, relaxed and tightened in turn, those with the "
        "largest log-ratio margins (policy − reference) first; tokens are those of chosen / rejected."
    )


def _counts(pairs: pd.DataFrame, steps: pd.Series) -> dict[str, list[int]]:
    """How many pairs of each step took each decision."""
    table = pairs.groupby(["step", "decision"]).size().unstack(fill_value=0)
    table = table.reindex(index=steps, columns=list(DECISIONS.values()), fill_value=0)
    return {name: table[decision].tolist() for name, decision in DECISIONS.items()}


def _rounded(values: pd.Series) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _pairs_and_texts(moved: pd.DataFrame, steps: list[int], texts: pd.DataFrame) -> dict[str, list]:
    """The listed pairs by step, and the beginning of each one's texts, once however often it is listed."""
    ids = {pair_id: place for place, pair_id in enumerate(dict.fromkeys(moved["pair_id"]))}
    of_step: Mapping[int, list] = {step: [] for step in steps}
    for row in moved.itertuples(index=False):
        margin = float(f"{row.log_ratio_margin:.4g}")
        entry = [ids[row.pair_id], row.decision, margin, row.chosen_tokens, row.rejected_tokens]
        of_step[row.step].append(entry)
    beginnings = texts.drop_duplicates("pair_id").set_index("pair_id").reindex(ids)
    return {
        "pairs": list(of_step.values()),
        "texts": [
            [pair_id, *(_beginning(getattr(row, part)) for part in ("prompt", "chosen", "rejected"))]
            for pair_id, row in zip(ids, beginnings.itertuples(), strict=True)
        ],
    }


def _beginning(text: Any) -> str:
    if not isinstance(text, str):  # a pair of other data than those given
        return "(not in the data)"
    return text if len(text) <= LETTERS else f"{text[:LETTERS].rstrip()}…"
