"""What the page on real text says: the study in short, its tables, and what is left unexplained."""

from __future__ import annotations

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import share_interval, standard_error, students_interval
from epsdpo.methods.launches import IN_WORDS
from epsdpo.paper.precision.decisions import ARITHMETICS
from epsdpo.paper.published import table_5
from epsdpo.paper.real_text.foretold import ALL, ROUNDED
from epsdpo.plots.style import DECISION_LABELS

IN_SHORT = {name: IN_WORDS.get(name, "sums rounded") for name in ARITHMETICS}

# Mean step over whole runs of the miniature with the criterion in bfloat16, from least to most over ε_s: paper_mini.md.
MINIATURE = {0.005: (0.07, 0.08), 0.01: (0.27, 0.28), 0.02: (0.26, 0.27)}


def titles(table: pd.DataFrame) -> dict[str, str]:
    """Policy -> what it is called: its run, and after how many steps."""
    policies = table[["policy", "run", "step"]].drop_duplicates()
    return {row.policy: f"{row.run}, step {row.step}" for row in policies.itertuples()}


def in_short(comparison: pd.DataFrame, called: dict[str, str]) -> str:
    """The study in sentences: who ties, how well it was foretold, and how many shares are off.

    Args:
        comparison: of `compared`.
        called: of `titles`.
    """
    whole = comparison[comparison["length"] == ALL]
    ties = whole[whole["decision"] == "tied"].groupby(["arithmetic", "epsilon"])["share"]
    low, high = whole["epsilon"].min(), whole["epsilon"].max()
    parts = [
        f"{IN_SHORT[name]} {_range(ties, name, low)} at ε = {low:g} and {_range(ties, name, high)} at ε = {high:g}"
        for name in ARITHMETICS
    ]
    misses = (whole["share"] - whole["predicted"]).abs().groupby(whole["arithmetic"]).max()
    missed = [f"{IN_SHORT[name]} {100 * misses[name]:.0f}" for name in ROUNDED]
    foretold = comparison[comparison["arithmetic"] != "float32"]
    off = foretold.groupby("arithmetic")["off"].agg(["sum", "size"])
    counts = [f"{IN_SHORT[name]} {off.loc[name, 'sum']} of {off.loc[name, 'size']}" for name in ROUNDED]
    sentences = (
        f"**Ties**, over {len(called)} policies, from the fewest to the most: {'; '.join(parts)}.",
        f"**Largest difference** of a share of all pairs from what was foretold, in points: {', '.join(missed)}.",
        "**Off**, outside the range in which the foretold number of these very pairs lies in 95 % of cases, thirds by "
        f"length counted too: {', '.join(counts)}. About one in twenty may be so by chance, though shares are not "
        "independent of each other; what is beyond that is listed below, and unexplained.",
    )
    return "\n\n".join(sentences)


def side_by_side(comparison: pd.DataFrame, called: dict[str, str], decision: str) -> pd.DataFrame:
    """Measured and foretold shares of a decision among all pairs: policy and arithmetic by ε, as text for people."""
    rows = comparison[(comparison["length"] == ALL) & (comparison["decision"] == decision)]
    shown = [
        f"{_percent(row.share, row.low, row.high)}"
        + ("" if np.isnan(row.predicted) else f" · {100 * row.predicted:.0f}{'*' if row.off else ''}")
        for row in rows.itertuples()
    ]
    wide = rows.assign(shown=shown, arithmetic=rows["arithmetic"].map(IN_SHORT), policy=rows["policy"].map(called))
    order = pd.MultiIndex.from_product([list(called.values()), list(IN_SHORT.values())])
    return (
        wide.pivot(index=["policy", "arithmetic"], columns="epsilon", values="shown")
        .reindex(order)
        .rename_axis(index=["policy", "arithmetic"], columns="ε")
    )


def unexplained(comparison: pd.DataFrame, called: dict[str, str]) -> pd.DataFrame:
    """The shares that are off, those furthest out first, as text for people."""
    off = comparison[comparison["off"]]
    beyond = np.maximum(off["expected_low"] - off["share"], off["share"] - off["expected_high"])
    off = off.assign(beyond=beyond).sort_values("beyond", ascending=False, kind="stable")
    return pd.DataFrame(
        {
            "policy": off["policy"].map(called),
            "ε": off["epsilon"].map("{:g}".format),
            "arithmetic": off["arithmetic"].map(IN_SHORT),
            "length of both (tokens)": off["length"],
            "decision": off["decision"].map(DECISION_LABELS),
            "pairs": off["pairs"].astype(int),
            "measured (%)": [_percent(row.share, row.low, row.high) for row in off.itertuples()],
            "foretold (%)": [_percent(row.predicted, row.expected_low, row.expected_high) for row in off.itertuples()],
        }
    )


def off_by_epsilon(comparison: pd.DataFrame) -> pd.DataFrame:
    """How many shares are off, of how many: arithmetic by ε, as text for people."""
    foretold = comparison[comparison["arithmetic"] != "float32"]
    counts = foretold.groupby(["arithmetic", "epsilon"])["off"].agg(["sum", "size"]).reset_index()
    shown = [f"{row.sum} of {row.size}" for row in counts[["sum", "size"]].itertuples(index=False)]
    wide = counts.assign(shown=shown, arithmetic=counts["arithmetic"].map(IN_SHORT))
    order = [IN_SHORT[name] for name in ROUNDED]
    return wide.pivot(index="arithmetic", columns="epsilon", values="shown").loc[order].rename_axis(columns="ε")


def table_5_beside(steps: pd.DataFrame, called: dict[str, str]) -> pd.DataFrame:
    """The mean step in bfloat16 of each policy beside that of the paper's Table 5 and of the miniature's runs.

    Args:
        steps: of `mean_steps`.
    """
    rows = steps[steps["arithmetic"] == "bfloat16"]
    shown = [
        f"{_signed(row.mean_step)} [{_signed(row.low)}, {_signed(row.high)}] · {_signed(row.predicted)}"
        for row in rows.itertuples()
    ]
    wide = rows.assign(shown=shown).pivot(index="policy", columns="epsilon", values="shown").reindex(list(called))
    wide.index = list(called.values())
    paper = {
        epsilon: _from_to([step for of, _, _, step in table_5() if of == epsilon])
        for epsilon in dict.fromkeys(row[0] for row in table_5())
    }
    others = pd.DataFrame(
        [paper, {epsilon: _from_to(steps) for epsilon, steps in MINIATURE.items()}],
        index=["paper, Table 5: runs of gemma-2-2b on HH", "miniature: runs in the embedded world"],
    )
    return pd.concat([wide, others]).fillna("–").rename_axis(columns="ε")


def held_out(table: pd.DataFrame, called: dict[str, str]) -> pd.DataFrame:
    """How far each policy is from the reference on held-out pairs, and whether in the right direction; text for people.

    Args:
        table: of `measure`; the log-ratios do not depend on ε.
    """
    rows = {}
    for policy, pairs in table[table["epsilon"] == table["epsilon"].min()].groupby("policy", sort=False):
        chosen, rejected = pairs["chosen_log_ratio"], pairs["rejected_log_ratio"]
        margin, prompts = chosen - rejected, pairs["prompt"].tolist()
        rows[called[policy]] = {
            "mean |log-ratio| (nats)": f"{np.abs(np.concatenate([chosen, rejected])).mean():.2f}",
            "accuracy (%)": _share(margin > 0, prompts),
            "margin (nats)": _mean(margin, prompts),
            "chosen log-ratio (nats)": _mean(chosen, prompts),
            "rejected log-ratio (nats)": _mean(rejected, prompts),
            "displaced (%)": _share(chosen < 0, prompts),
        }
    return pd.DataFrame(rows).T


def by_length(comparison: pd.DataFrame, called: dict[str, str], epsilon: float) -> pd.DataFrame:
    """Ties by thirds of length at one ε, measured and foretold: policy and arithmetic by length, as text for people."""
    rows = comparison[
        (comparison["length"] != ALL) & (comparison["decision"] == "tied") & (comparison["epsilon"] == epsilon)
    ]
    rows = rows[rows["arithmetic"] != "float32"]
    shown = [
        f"{_percent(row.share, row.low, row.high)} · {100 * row.predicted:.0f}{'*' if row.off else ''}"
        for row in rows.itertuples()
    ]
    wide = rows.assign(shown=shown, arithmetic=rows["arithmetic"].map(IN_SHORT), policy=rows["policy"].map(called))
    lengths = list(dict.fromkeys(rows["length"]))
    order = wide[["policy", "arithmetic"]].drop_duplicates().apply(tuple, axis=1)
    return (
        wide.pivot(index=["policy", "arithmetic"], columns="length", values="shown")
        .loc[list(order), lengths]
        .rename_axis(columns="tokens of both responses")
        .fillna("–")
    )


def _range(ties: object, arithmetic: str, epsilon: float) -> str:
    low, high = (f"{100 * value:.0f}" for value in ties.agg(["min", "max"]).loc[(arithmetic, epsilon)])
    return f"{low} %" if low == high else f"{low} to {high} %"


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _share(hits: pd.Series, prompts: list[str]) -> str:
    interval = share_interval(hits, prompts)
    return _percent(hits.mean(), interval.low, interval.high)


def _mean(values: pd.Series, prompts: list[str]) -> str:
    error = standard_error(values, prompts)
    interval = students_interval(values.mean(), error**2, distinct(prompts) - 1, 0.95)
    return f"{_signed(values.mean())} [{_signed(interval.low)}, {_signed(interval.high)}]"


def _from_to(steps: object) -> str:
    low, high = min(steps), max(steps)
    return _signed(low) if low == high else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # and never −0.00
