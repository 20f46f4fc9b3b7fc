"""What a notebook shows of a judge beside the published one: in a sentence whether it can judge, and its numbers."""

import html
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.evaluation.judges.counts import completeness


def verdict(calibration: dict[str, Any]) -> str:
    """HTML: whether all was judged, whether winners are the published judge's, and whether the order decides them."""
    same, chance, low, high = (calibration[key] for key in ("agreement", "chance", "chance_low", "chance_high"))
    against = [completeness(calibration)] if calibration["n_failed"] else []
    if not same > high:
        against.append(
            "Nothing here shows that this judge picks the published one's winner more often than chance has it. Its "
            "win rates deserve no trust."
        )
    said = [
        f"The winner is the same in {same:.1f} % of {calibration['n_scored']} comparisons. Were this judge's answers "
        f"dealt to them at random, it would be in {chance:.1f} %, and in 95 % of deals in {low:.1f} to {high:.1f} %."
    ]
    if both := calibration["n_both_orders"]:
        if calibration["position_consistency_high"] < 0.5:
            place = "first" if calibration["position_bias"] > 0.0 else "second"
            against.append(f"What it says hangs on the order more than on the outputs: it leans to the {place}.")
        changed = 100.0 * (1.0 - calibration["position_consistency"])
        said.append(f"In {changed:.0f} % of {both} the winner is another one when the two change places.")
    bold = f"<b style='color: #D55E00'>{html.escape(' '.join(against))}</b> " if against else ""
    return f"<p>{bold}{html.escape(' '.join(said))}</p>"


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
