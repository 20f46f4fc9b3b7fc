"""What a notebook shows of a judge beside the published one: in a sentence whether it can judge, and its numbers."""

from typing import Any

import numpy as np
import pandas as pd


def verdict(calibration: dict[str, Any]) -> str:
    """HTML: whether the judge can tell at all which output the published judge prefers."""
    same, chance, low, high = (calibration[key] for key in ("agreement", "chance", "chance_low", "chance_high"))
    better = same > high
    said = (
        "This judge and the published one prefer the same output more often than chance has it."
        if better
        else "Nothing here shows that this judge can tell the better output: its win rates deserve no trust."
    )
    numbers = (
        f"Both prefer the same one in {same:.1f} % of {calibration['n_scored']} comparisons. Were its answers dealt to "
        f"them at random, it would be {chance:.1f} %, and {low:.1f} to {high:.1f} % in 95 % of deals."
    )
    style = "" if better else " style='color: #D55E00'"
    return f"<p><b{style}>{said}</b> {numbers}</p>"


def table(calibration: dict[str, Any]) -> pd.DataFrame:
    """The judge beside the published one, as text with 95 % intervals."""
    different = calibration["n_distinct"]
    repeats = f", on {different} distinct prompts" if different < calibration["n_scored"] else ""
    rows = {
        "comparisons judged by both": {"value": f"{calibration['n_scored']} of {calibration['n_total']}{repeats}"},
        "win rate by the published judge (%)": {"value": f"{calibration['official_win_rate']:.1f}"},
        "win rate by this judge (%)": {"value": f"{calibration['judged_win_rate']:.1f}"},
    }
    measures = {
        "bias: this judge less the published one (points)": ("bias", 1.0, "+.1f"),
        "scatter: spread of the difference, prompt by prompt (points)": ("scatter", 1.0, ".1f"),
        "correlation of the preferences": ("correlation", 1.0, ".2f"),
        "same winner (%)": ("agreement", 1.0, ".1f"),
        "same winner, were the answers dealt at random (%)": ("chance", 1.0, ".1f"),
    }
    if calibration["n_both_orders"]:
        measures |= {
            "the output shown first wins, beyond half of the time (points)": ("position_bias", 1.0, "+.1f"),
            "same winner in both orders (%)": ("position_consistency", 100.0, ".0f"),
        }
    for label, (key, scale, form) in measures.items():
        value, low, high = (calibration[key + end] for end in ("", "_low", "_high"))
        if value is not None and np.isfinite(value):
            value, low, high = (format(scale * number, form) for number in (value, low, high))
            rows[label] = {"value": value, "95 % interval": f"{low} to {high}"}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")
