"""What the pairs of a batch say in numbers: TRL's metrics, those of ε-DPO, and the rows of the β record.

All are made of one table with a row per pair, gathered from all processes.
"""

import numpy as np
import pandas as pd
import torch

PAIR_COLUMNS = (
    "loss",
    "decision",  # +1: β⁻, 0: tie, -1: β⁺
    "beta",  # the pair's β̃; NaN, like its loss, where it is left out of the loss
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_logits_sum",  # sums over completion tokens of what `TokenScores` holds per token
    "rejected_logits_sum",
    "chosen_top1",
    "entropy_sum",
    "tokens",  # of both sequences, prompt included
)


def stack_columns(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """`PAIR_COLUMNS` of a batch, each (pairs,), as one tensor (pairs, len(PAIR_COLUMNS)) in float32.

    Raises:
        ValueError: if they are not exactly these columns.
    """
    if wrong := sorted(columns.keys() ^ {*PAIR_COLUMNS}):
        raise ValueError(f"the columns of a pair are {', '.join(PAIR_COLUMNS)}; missing or unknown: {', '.join(wrong)}")
    return torch.stack([columns[name].detach().float() for name in PAIR_COLUMNS], dim=1)


def pair_table(pair_index: torch.Tensor, columns: torch.Tensor) -> pd.DataFrame:
    """The table of a batch from `pair_index` (pairs,) and `stack_columns` (pairs, len(PAIR_COLUMNS))."""
    pairs = pd.DataFrame(columns.double().cpu().numpy(), columns=list(PAIR_COLUMNS))
    pairs.insert(0, "pair_index", pair_index.cpu().numpy())
    return pairs


def log_ratio(pairs: pd.DataFrame, side: str) -> pd.Series:
    """log π - log π_ref of the "chosen" or the "rejected" response of each pair, in nats."""
    return pairs[f"{side}_logps"] - pairs[f"ref_{side}_logps"]


def log_ratio_margin(pairs: pd.DataFrame) -> pd.Series:
    """z - γ: how much more the policy prefers the chosen response than the reference does, in nats."""
    return log_ratio(pairs, "chosen") - log_ratio(pairs, "rejected")


def decision_metrics(pairs: pd.DataFrame, beta: float) -> dict[str, float]:
    """ε-DPO's metrics: β, the fractions of pairs that chose β⁻ and β⁺, and the mean step."""
    decision = pairs["decision"].to_numpy()
    relaxed, tightened = _mean(decision == 1), _mean(decision == -1)
    return {
        "kl/beta": beta,
        "kl/p_epsilon_steps": relaxed,
        "kl/n_epsilon_steps": tightened,
        "kl/avg_steps": relaxed - tightened,
    }


def preference_metrics(pairs: pd.DataFrame) -> dict[str, float]:
    """TRL's metrics under TRL's names; rewards are scaled by each pair's β̃, and are of pairs in the loss alone."""
    columns = _arrays(pairs)
    in_loss = ~np.isnan(columns["beta"])
    beta = columns["beta"][in_loss]
    chosen_rewards = beta * log_ratio(columns, "chosen")[in_loss]
    rejected_rewards = beta * log_ratio(columns, "rejected")[in_loss]
    chosen_tokens, rejected_tokens = columns["chosen_tokens"].sum(), columns["rejected_tokens"].sum()
    metrics = {
        "entropy": columns["entropy_sum"].sum() / (chosen_tokens + rejected_tokens),
        "logits/chosen": columns["chosen_logits_sum"].sum() / chosen_tokens,
        "logits/rejected": columns["rejected_logits_sum"].sum() / rejected_tokens,
        "mean_token_accuracy": columns["chosen_top1"].sum() / chosen_tokens,
        "rewards/chosen": _mean(chosen_rewards),
        "rewards/rejected": _mean(rejected_rewards),
        "rewards/accuracies": _mean(chosen_rewards > rejected_rewards),
        "rewards/margins": _mean(chosen_rewards - rejected_rewards),
        "logps/chosen": _mean(columns["chosen_logps"]),
        "logps/rejected": _mean(columns["rejected_logps"]),
    }
    return {name: float(value) for name, value in metrics.items()}


def step_row(pairs: pd.DataFrame, beta_before: float, beta_after: float) -> dict[str, float]:
    """What the β record says of one optimiser step, from all its pairs (see `STEP_COLUMNS`)."""
    columns = _arrays(pairs)
    decisions, margin = decision_metrics(pairs, beta_before), log_ratio_margin(columns)
    return {
        "beta_before": beta_before,
        "beta_after": beta_after,
        "relaxed": decisions["kl/p_epsilon_steps"],
        "tied": _mean(columns["decision"] == 0),
        "tightened": decisions["kl/n_epsilon_steps"],
        "mean_step": decisions["kl/avg_steps"],
        "loss": _mean(columns["loss"]),
        "reward_margin": _mean(columns["beta"] * margin),
        "log_ratio_margin": _mean(margin),
        "chosen_log_ratio": _mean(log_ratio(columns, "chosen")),
        "rejected_log_ratio": _mean(log_ratio(columns, "rejected")),
        "reward_accuracy": _mean(margin[~np.isnan(columns["beta"])] > 0),  # of the pairs in the loss, as TRL's
    }


def _arrays(pairs: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns as arrays, which for a few pairs are many times as fast as Series, at every step of a training."""
    return {name: pairs[name].to_numpy() for name in PAIR_COLUMNS}


def _mean(values: np.ndarray) -> float:
    """Of those that are not NaN, as pandas has it to the last bit; NaN of none."""
    missing = np.isnan(values)
    known = values.size - int(missing.sum())
    return float(np.where(missing, 0.0, values).sum() / known) if known else float("nan")
