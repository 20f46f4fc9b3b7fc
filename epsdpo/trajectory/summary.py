"""What a β record says: summaries, and which pairs were relaxed or tightened.

"Relaxed" pairs chose β⁻ (KL penalty lowered, step +1), "tightened" ones β⁺ (raised, step -1), "tied" ones kept β.
Methods that compare nothing with a reference have neither decisions nor pairs in their record.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.clusters import conversations_of_rendered
from epsdpo.evaluation.scores.intervals import share_interval
from epsdpo.methods.record import read_pairs, read_steps

DECISIONS = {"relaxed": 1, "tied": 0, "tightened": -1}
# What tells over which optimiser steps a row of a log is a mean. A record has a row for every step and needs none.
WINDOW_COLUMNS = (
    "first_step",
    "last_step",
    "total_steps",  # that the run had made when the log ends
    "beta_initial",  # β of the run's configuration; NaN where nothing says it
)
NO_DECISIONS = (
    "This method makes no decisions and keeps no table of pairs: it is one of TRL's trainers that see no reference, or "
    "no pairs. There is nothing to show here."
)


def summarise(train_dir: str | Path) -> dict[str, float]:
    """One run in numbers: steps, pairs, β at start and end, its range, and the shares of each decision over all pairs.

    Shares are NaN for a method without decisions. `seconds_per_step` is the median over steps, so that a pause does not
    count.
    """
    steps, pairs = read_steps(train_dir), read_pairs(train_dir)
    betas = np.r_[steps["beta_before"].iloc[0], steps["beta_after"]]
    return {
        "steps": int(steps["step"].iloc[-1]),
        "pairs": len(pairs) or int(steps["pairs_seen"].iloc[-1]),
        "beta_initial": float(betas[0]),
        "beta_final": float(betas[-1]),
        "beta_min": float(betas.min()),
        "beta_max": float(betas.max()),
        **{name: float((pairs["decision"] == decision).mean()) for name, decision in DECISIONS.items()},
        "mean_step": float(pairs["decision"].mean()),
        "seconds_per_step": float(steps["seconds"].median()),
    }


def decision_fractions(pairs: pd.DataFrame, windows: int = 16) -> pd.DataFrame:
    """Shares of the decisions over training, pooled over `windows` equal stretches of optimiser steps.

    Returns:
        One row per stretch and decision: decision, step (middle of the stretch), first_step, last_step, pairs,
        distinct (prompts of these), share, low, high (95 % Wilson interval over prompts, see `with_prompts`).
    """
    return pd.DataFrame([place | row for place, inside in stretches(pairs, windows) for row in _shares(inside)])


def stretches(pairs: pd.DataFrame, windows: int) -> Iterator[tuple[dict[str, float], pd.DataFrame]]:
    """The pairs of each of `windows` equal stretches of optimiser steps, or of each step where there are fewer.

    Yields:
        step (middle of the stretch), first_step and last_step, with the pairs of these steps.
    """
    steps = np.sort(pairs["step"].unique())
    for stretch in np.array_split(steps, min(windows, len(steps))):
        place = {"step": float(stretch.mean()), "first_step": int(stretch[0]), "last_step": int(stretch[-1])}
        yield place, pairs[pairs["step"].between(stretch[0], stretch[-1])]


def decisions_by(pairs: pd.DataFrame, quantity: str, bins: int = 8) -> pd.DataFrame:
    """Shares of the decisions among pairs with alike `quantity` (a column of `pairs`), in bins of equal size.

    Pairs that do not have the quantity are left out, as those without a reward margin because β-DPO dropped them.

    Returns:
        One row per bin and decision: decision, centre (median of the quantity in the bin), left, right, pairs, distinct
        (prompts of these), share, low, high (95 % Wilson interval over prompts, see `with_prompts`). Bins that coincide
        because many values are equal are merged.
    """
    pairs = pairs.dropna(subset=[quantity])
    values = pairs[quantity]
    edges = np.unique(values.quantile(np.linspace(0, 1, bins + 1)))
    bin_of = np.digitize(values, edges[1:-1], right=True)
    rows = []
    for _, group in pairs.groupby(bin_of):
        inside = group[quantity]
        place = {"centre": float(inside.median()), "left": float(inside.min()), "right": float(inside.max())}
        rows += [place | row for row in _shares(group)]
    return pd.DataFrame(rows)


def with_lengths(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs with `length_difference` (chosen - rejected) and `length` (both together), in completion tokens."""
    return pairs.assign(
        length_difference=pairs["chosen_tokens"] - pairs["rejected_tokens"],
        length=pairs["chosen_tokens"] + pairs["rejected_tokens"],
    )


def with_prompts(pairs: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """The pairs with `prompt`, by which intervals know which decisions are about one prompt or one conversation.

    Without it they know that a pair which is met again in a later epoch is the same pair, and no more.

    Args:
        texts: prepared training data with columns pair_id and prompt.
    """
    known = dict(zip(texts["pair_id"], conversations_of_rendered(texts["prompt"].tolist()), strict=True))
    return pairs.assign(prompt=pairs["pair_id"].map(known).fillna(pairs["pair_id"]))


def examples(pairs: pd.DataFrame, texts: pd.DataFrame, decision: str, count: int = 3) -> pd.DataFrame:
    """Pairs of the last epoch with the given decision, spread evenly over the range of the implicit reward margin.

    Args:
        pairs: from `read_pairs`.
        texts: prepared training data with columns pair_id, prompt, chosen, rejected.
        decision: "relaxed", "tied" or "tightened".

    Returns:
        At most `count` rows from the lowest to the highest margin, each with its texts.
    """
    last_epoch = pairs.dropna(subset=["reward_margin"]).drop_duplicates("pair_id", keep="last")
    alike = last_epoch[last_epoch["decision"] == DECISIONS[decision]].sort_values("reward_margin")
    chosen = alike.iloc[np.unique(np.linspace(0, len(alike) - 1, count).round().astype(int))] if len(alike) else alike
    columns = ["pair_id", "step", "reward_margin", "chosen_tokens", "rejected_tokens"]
    return chosen[columns].merge(texts[["pair_id", "prompt", "chosen", "rejected"]], on="pair_id", how="left")


def in_words(summaries: pd.DataFrame) -> pd.DataFrame:
    """A table of summaries as text for people; "–" for what a method does not have."""
    return summaries.map("{:.4g}".format, na_action="ignore").fillna("–")


def compare(train_dirs: Sequence[str | Path], titles: Sequence[str]) -> pd.DataFrame:
    """`summarise` of several runs, one row each, under `title`."""
    return pd.DataFrame(
        [{"title": title, **summarise(train_dir)} for train_dir, title in zip(train_dirs, titles, strict=True)]
    )


def as_windows(steps: pd.DataFrame, beta: float | None = None) -> pd.DataFrame:
    """The steps of a record with `WINDOW_COLUMNS`, each row over one step; those of a log as they are.

    Args:
        beta: of the run's configuration; None if the first step used it, as it does unless a method chooses each β.
    """
    if "first_step" in steps:
        return steps
    beta = steps["beta_before"].iloc[0] if beta is None else beta
    return steps.assign(
        first_step=steps["step"], last_step=steps["step"], total_steps=steps["step"].iloc[-1], beta_initial=beta
    )


def summarise_steps(steps: pd.DataFrame) -> dict[str, float]:
    """One run in numbers that its steps alone give, as logs from elsewhere have no pairs.

    Shares are means over the optimiser steps that were logged. `beta_initial` is the configuration's; `beta_first` and
    `beta_last` are the first and the last that was logged, of a log means over a row's steps; the last is that after
    its step's update where that is known.

    Args:
        steps: of a record or a log.
    """
    steps = as_windows(steps)
    last = steps.iloc[-1]
    lengths = steps["last_step"] - steps["first_step"] + 1
    return {
        "rows": len(steps),
        "last_step": int(last["last_step"]),
        "beta_initial": float(last["beta_initial"]),
        "beta_first": float(steps["beta_before"].iloc[0]),
        "beta_last": float(last["beta_before"] if pd.isna(last["beta_after"]) else last["beta_after"]),
        "beta_min": float(steps[["beta_before", "beta_after"]].min().min()),
        "beta_max": float(steps[["beta_before", "beta_after"]].max().max()),
        **{name: _mean(steps[name], lengths) for name in (*DECISIONS, "mean_step")},
    }


def relative_steps(steps: pd.DataFrame) -> pd.DataFrame:
    """One run's steps with `share_of_run`, 0 at its first optimiser step and 1 at its last, and `beta_ratio`.

    That is β over the one of the run's configuration, NaN where nothing says it. Both are the same from a record and
    from a log of one run, as far as means over the log's steps tell.

    Args:
        steps: of a record or a log, which may begin after the run's first step: then 0 is where it begins.
    """
    steps = as_windows(steps)
    first, total = steps["first_step"].iloc[0], steps["total_steps"].iloc[0]
    return steps.assign(
        share_of_run=(steps["step"] - first) / max(1, total - first),
        beta_ratio=steps["beta_before"] / steps["beta_initial"],
    )


def _mean(values: pd.Series, weights: pd.Series) -> float:
    known = values.notna()
    return float(np.average(values[known], weights=weights[known])) if known.any() else float("nan")


def _shares(pairs: pd.DataFrame) -> list[dict[str, float]]:
    rows = []
    prompts = pairs["prompt"] if "prompt" in pairs else pairs["pair_id"]
    for name, decision in DECISIONS.items():
        hits = pairs["decision"] == decision
        interval = share_interval(hits, prompts)
        row = {
            "decision": name,
            "pairs": len(pairs),
            "distinct": prompts.nunique(),
            "share": int(hits.sum()) / len(pairs),
        }
        rows.append(row | {"low": interval.low, "high": interval.high})
    return rows
