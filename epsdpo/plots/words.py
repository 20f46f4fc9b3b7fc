"""What the columns of tables are called for people: words with units in place of the names that code gives them.

Tables keep their names in files and in code; a notebook shows them by `headed`.
"""

import pandas as pd

_SHARE = "share of pairs"

HEADS = {
    # β and the decisions of a run
    "title": "run",
    "steps": "optimiser steps",
    "beta_initial": "β at start",
    "beta_final": "β at end",
    "beta_min": "smallest β",
    "beta_max": "largest β",
    "relaxed": f"relaxed, chose β⁻ ({_SHARE})",
    "tied": f"tied, kept β ({_SHARE})",
    "tightened": f"tightened, chose β⁺ ({_SHARE})",
    "mean_step": "mean step (relaxed − tightened)",
    "seconds_per_step": "time per step (s, median)",
    "rows": "logged rows",
    "last_step": "last optimiser step",
    "beta_first": "first β logged",
    "beta_last": "last β logged",
    # a pair
    "pair_id": "pair",
    "prompt_id": "prompt's number",
    "step": "optimiser step",
    "reward_margin": "implicit reward margin",
    "chosen_tokens": "chosen (tokens)",
    "rejected_tokens": "rejected (tokens)",
    "chosen_score": "score of chosen",
    "rejected_score": "score of rejected",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    # judged runs; intervals are 95 % throughout
    "baseline": "compared with",
    "difference": "difference (points)",
    "better_share": "does better on (% of prompts)",
    "win_rate": "win rate (%)",
    "deviation": "deviation between seeds (points)",
    "low": "95 % interval from",
    "high": "to",
    "win_rate_low": "95 % from",
    "win_rate_high": "95 % to",
    "forward_kl_per_response": "KL(π_ref‖π) per response (nats)",
    "forward_kl_per_response_low": "KL, 95 % from",
    "forward_kl_per_response_high": "KL, 95 % to",
    # the precision of the criterion
    "epsilon": "ε",
    "precision": "criterion",
    "sums_rounded": "sums rounded",
    "bfloat16_logits": "bfloat16 logits",
    "launch": "launch of the released code",
    "twins": "pairs of runs",
    "reported": "Table 5",
    "rounded_sums": "rounded sums",
    "rounded_sums_residual": "rounded sums less Table 5",
    "exact": "exact arithmetic",
    "exact_residual": "exact arithmetic less Table 5",
}


def headed(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it is shown: columns, rows and what they are called by in words; others than those of `HEADS` stay."""
    renamed = table.rename(index=_in_words, columns=_in_words)
    return renamed.rename_axis(index=_in_words(table.index.name), columns=_in_words(table.columns.name))


def _in_words(name: object) -> object:
    return HEADS.get(name, name) if isinstance(name, str) else name
