"""Chosen and rejected responses apart: how much more or less likely than under the reference each of them became.

A log-ratio is log π - log π_ref of a whole response, in nats, before the update of the step that saw its pair: in the
first epoch of a pair that was not trained on yet. A pair is **displaced** if that of its chosen response is below 0
("likelihood displacement", arXiv 2410.08847). Under TR-DPO the reference is that of the step.

Tables have a row per group of pairs and measure: `measure` is "chosen" or "rejected" (mean log-ratio) or "displaced"
(share of pairs), `value` with `low` and `high` its 95 % interval over prompts: Student's t for means, Wilson's for the
share. Of means over steps alone, as logs have them, there is no interval, and no share.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import share_interval, standard_error, students_interval
from epsdpo.methods.metrics import log_ratio
from epsdpo.methods.record import read_pairs
from epsdpo.runs.layout import prepared_of
from epsdpo.trajectory.summary import DECISIONS, as_windows, stretches, with_prompts

SIDES = ("chosen", "rejected")
WINDOWS = 16
LATE = 0.25  # of the steps, the last ones

NO_LOG_RATIOS = (
    "No log-ratios were recorded: this method sees no reference, or its log has no `rewards/chosen` and "
    "`rewards/rejected` that compare with one. There is nothing to show here."
)
_COLUMNS = ["measure", "step", "first_step", "last_step", "pairs", "distinct", "value", "low", "high"]


def of_run(train_dir: Path, steps: pd.DataFrame, texts: pd.DataFrame | None = None) -> pd.DataFrame:
    """`over_training` of a run of this kit; of a method without a table of pairs `over_steps`.

    Args:
        steps: from `read_steps`.
        texts: the prepared data with columns pair_id and prompt; by default that of its batch. Where there is none,
            intervals are over pairs.
    """
    pairs = read_pairs(train_dir)
    if not len(pairs):
        return over_steps(steps)
    data = prepared_of(train_dir) if texts is None else None
    if data is not None:
        texts = pd.read_parquet(data, columns=["pair_id", "prompt"])
    return over_training(pairs if texts is None else with_prompts(pairs, texts))


def over_training(pairs: pd.DataFrame, windows: int = WINDOWS) -> pd.DataFrame:
    """The measures in `windows` equal stretches of optimiser steps, from `read_pairs`.

    Returns:
        Columns measure, step (middle of the stretch), first_step, last_step, pairs, distinct (prompts of these), value,
        low, high.
    """
    rows = [place | row for place, inside in stretches(pairs, windows) for row in _measures(inside)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def over_steps(steps: pd.DataFrame, windows: int = WINDOWS) -> pd.DataFrame:
    """The two means in at most `windows` stretches of rows, where there is no table of pairs; as `over_training`.

    Args:
        steps: of a record or a log, with `chosen_log_ratio` and `rejected_log_ratio`, NaN where they are not known.
    """
    steps = as_windows(steps)
    steps = steps[steps["chosen_log_ratio"].notna() & steps["rejected_log_ratio"].notna()]
    rows = []
    for places in np.array_split(np.arange(len(steps)), min(windows, len(steps)) or 1):
        inside = steps.iloc[places]
        if not len(inside):
            continue
        lengths = inside["last_step"] - inside["first_step"] + 1
        first, last = int(inside["first_step"].iloc[0]), int(inside["last_step"].iloc[-1])
        place = {"step": (first + last) / 2, "first_step": first, "last_step": last}
        rows += [
            {"measure": side, **place, "value": np.average(inside[f"{side}_log_ratio"], weights=lengths)}
            for side in SIDES
        ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def by_decision(pairs: pd.DataFrame) -> pd.DataFrame:
    """The measures of the pairs that chose β⁻, β and β⁺ in the last quarter of the steps, in a column `group`."""
    late = _late(pairs)
    groups = {name: late[late["decision"] == decision] for name, decision in DECISIONS.items()}
    return _by(groups)


def by_likeness(pairs: pd.DataFrame, likeness: pd.Series) -> pd.DataFrame:
    """The measures of the last quarter of the steps, by how alike the two responses are: in thirds, the least first.

    Args:
        pairs: from `read_pairs`; those of which the likeness is not known are left out.
        likeness: from `likeness`, by pair_id.

    Returns:
        As `by_decision`; `group` is the range of the likeness. Thirds that coincide because many pairs are equally
        alike are one.
    """
    late = _late(pairs)
    alike = late["pair_id"].map(likeness)
    late, alike = late[alike.notna()], alike.dropna()
    if late.empty:
        return _by({})
    edges = np.unique(np.quantile(alike, [1 / 3, 2 / 3]))
    third = np.digitize(alike, edges, right=True)
    groups = {}
    for number in np.unique(third):
        inside = alike[third == number]
        groups[f"{inside.min():.2f} to {inside.max():.2f}"] = late[third == number]
    return _by(groups)


def likeness(tokens: pd.DataFrame) -> pd.Series:
    """How alike the two responses of each pair are, by pair_id: 1 are equal ones, 0 share no token.

    That is 2·L/(tokens of both), with L the length of their longest common subsequence: 1 less the number of tokens to
    delete and insert to make one of the other, over that of both.

    Args:
        tokens: prepared data with columns pair_id, chosen_ids, rejected_ids.
    """
    values = [
        2 * _common(chosen, rejected) / max(1, len(chosen) + len(rejected))
        for chosen, rejected in zip(tokens["chosen_ids"], tokens["rejected_ids"], strict=True)
    ]
    return pd.Series(values, index=tokens["pair_id"], dtype=float)


def onset(table: pd.DataFrame) -> tuple[int, int] | None:
    """Between which optimiser steps displacement begins, as far as can be told; None if it cannot be told.

    By the second of them the chosen responses are less likely than under the reference and stay so: it ends the first
    stretch from which on, to the end of the run, every interval of their mean log-ratio lies below 0. The first of them
    begins the last stretch before it whose interval lies above 0, or the run where there is none.

    Args:
        table: of `over_training`.
    """
    chosen = table[table["measure"] == "chosen"]
    staying = (chosen["high"] < 0)[::-1].cummin()[::-1].to_numpy(dtype=bool)
    if not staying.any():
        return None
    latest = int(staying.argmax())
    above = np.flatnonzero(chosen["low"].iloc[:latest] > 0)
    return int(chosen["first_step"].iloc[above[-1] if len(above) else 0]), int(chosen["last_step"].iloc[latest])


def begins(table: pd.DataFrame) -> str:
    """`onset` in words, short enough for a table."""
    if table["low"].isna().all():
        return "cannot be told from means of steps"
    between = onset(table)
    return "cannot be told" if between is None else f"between steps {between[0]} and {between[1]}"


def at_the_end(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per run, as text for people: the measures in the last stretch of its training, and when it begins.

    Args:
        tables: title of a run -> its table of `over_training`, or `over_steps`; one without rows is left out.
    """
    rows = []
    for title, table in tables.items():
        last = table[table["step"] == table["step"].max()].set_index("measure")
        if len(last):
            first, end = (int(last[name].iloc[0]) for name in ("first_step", "last_step"))
            rows.append(
                {
                    "run": title,
                    "steps": f"{first} to {end}",
                    "chosen (nats)": _as_text(last.loc["chosen"], "{:.2f}"),
                    "rejected (nats)": _as_text(last.loc["rejected"], "{:.2f}"),
                    "displaced (share of pairs)": _as_text(last.loc["displaced"], "{:.1%}")
                    if "displaced" in last.index
                    else "needs pairs",
                    "displacement begins": begins(table),
                }
            )
    return pd.DataFrame(rows)


def _as_text(row: pd.Series, form: str) -> str:
    value, low, high = (form.format(row[name] + 0.0) for name in ("value", "low", "high"))
    return value if pd.isna(row["low"]) else f"{value} [{low}, {high}]"


def _by(groups: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [{"group": name} | row for name, inside in groups.items() if len(inside) for row in _measures(inside)]
    return pd.DataFrame(rows, columns=["group", "measure", "pairs", "distinct", "value", "low", "high"])


def _late(pairs: pd.DataFrame) -> pd.DataFrame:
    first, last = pairs["step"].min(), pairs["step"].max()
    return pairs[pairs["step"] > last - LATE * (last - first + 1)]


def _measures(pairs: pd.DataFrame) -> list[dict[str, float]]:
    prompts = (pairs["prompt"] if "prompt" in pairs else pairs["pair_id"]).tolist()
    count = {"pairs": len(pairs), "distinct": distinct(prompts)}
    rows = []
    for side in SIDES:
        values = log_ratio(pairs, side)
        interval = students_interval(values.mean(), standard_error(values, prompts) ** 2, count["distinct"] - 1, 0.95)
        rows.append({"measure": side, **count, "value": values.mean(), "low": interval.low, "high": interval.high})
    displaced = log_ratio(pairs, "chosen") < 0
    interval = share_interval(displaced, prompts)
    share = {"value": displaced.mean(), "low": interval.low, "high": interval.high}
    return [*rows, {"measure": "displaced", **count, **share}]


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common subsequence of two lists of tokens.

    A row of the usual table at once, as the bits of a number: a bit is 0 where the row's value grows.
    """
    places: dict[int, int] = {}
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    full = row = (1 << len(one)) - 1
    for token in other:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()
