"""The answer of the precision study in words, from its numbers."""

import numpy as np
import pandas as pd


def answer(released: pd.DataFrame, miniature: pd.DataFrame, changes: pd.DataFrame) -> str:
    """The study's answer in three sentences, from its numbers.

    Args:
        released, miniature: shares by ε on the pairs of the recorded launches and of the batch's policies.
        changes: from `differences`; empty if the batch has no twins.
    """
    steps = {
        arithmetic: 1.0 - _shares_of(miniature, arithmetic, "tied").set_index("epsilon")["share"]
        for arithmetic in ("float32", "bfloat16_logits", "bfloat16")
    }
    low, high = miniature["epsilon"].min(), miniature["epsilon"].max()
    occurrence = (
        f"On held-out pairs of this batch's policies, {steps['float32'][low]:.0%} step in float32 at ε = {low:g} and "
        f"{steps['float32'][high]:.0%} at ε = {high:g}; with bfloat16 logits {steps['bfloat16_logits'][low]:.0%} and "
        f"{steps['bfloat16_logits'][high]:.0%}, all in bfloat16 {steps['bfloat16'][low]:.0%} and "
        f"{steps['bfloat16'][high]:.0%}."
    )

    def miss(arithmetic: str) -> str:
        return " and ".join(f"{_largest_miss(table, arithmetic):.0f}" for table in (miniature, released))

    model = (
        "Where the sums alone are rounded, the model, which has no free parameter, misses no share by more than "
        f"{miss('sums_rounded')} points, on these pairs and on those of the recorded launches; rounding the tokens as "
        f"well moves shares by up to {_effect_of_tokens(miniature):.0f} and {_effect_of_tokens(released):.0f}. With "
        f"bfloat16 logits the shares are missed by up to {miss('bfloat16_logits')} points, all in float16 by up to "
        f"{miss('float16')}."
    )
    if changes.empty:
        consequence = (
            "What it does to β and to the win rate this folder cannot show: it holds no two ε-DPO runs that differ in "
            "`criterion_dtype` alone."
        )
    else:
        parts = [
            f"with `{precision}` in place of `float32`, {'; '.join(_changes_in_words(rows))}"
            for precision, rows in changes.groupby("precision", sort=False)
        ]
        consequence = f"In whole runs, {'; '.join(parts)}."
    return "\n\n".join((occurrence, model, consequence))


def _changes_in_words(of_precision: pd.DataFrame) -> list[str]:
    """What an arithmetic changes at each setting."""
    return [_change_in_words(rows.set_index("measure")) for _, rows in of_precision.groupby("setting", sort=False)]


def _change_in_words(of_setting: pd.DataFrame) -> str:
    beta, win_rate = of_setting.loc["beta_final"], of_setting.loc["win_rate"]
    text = f"at {beta['setting']} β ends at {beta['rounded']:.3g} in place of {beta['exact']:.3g}"
    if not win_rate["twins"]:
        return f"{text} (win rates were not judged)"
    text += f" and the win rate moves by {win_rate['change']:+.1f} points"
    if np.isnan(win_rate["low"]):
        return f"{text} (one pair of runs, no interval)"
    chance = ", which may be chance" if win_rate["low"] <= 0.0 <= win_rate["high"] else ""
    return f"{text} [{win_rate['low']:+.1f}, {win_rate['high']:+.1f}]{chance}"


def _largest_miss(table: pd.DataFrame, arithmetic: str) -> float:
    rounded = table[table["arithmetic"] == arithmetic]
    return 100.0 * (rounded["share"] - rounded["predicted"]).abs().max()


def _effect_of_tokens(table: pd.DataFrame) -> float:
    by_arithmetic = table.pivot(index=["epsilon", "decision"], columns="arithmetic", values="share")
    return 100.0 * (by_arithmetic["bfloat16"] - by_arithmetic["sums_rounded"]).abs().max()


def _shares_of(table: pd.DataFrame, arithmetic: str, decision: str) -> pd.DataFrame:
    return table[(table["arithmetic"] == arithmetic) & (table["decision"] == decision)]
