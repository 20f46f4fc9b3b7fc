"""What the pairs of a batch say in numbers: TRL's metrics, those of ε-DPO, and the rows of the β record.

All are made of one table with a row per pair, gathered from all processes.
"""

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
    relaxed, tightened = float((pairs["decision"] == 1).mean()), float((pairs["decision"] == -1).mean())
    return {
        "kl/beta": beta,
        "kl/p_epsilon_steps": relaxed,
        "kl/n_epsilon_steps": tightened,
        "kl/avg_steps": relaxed - tightened,
    }


def preference_metrics(pairs: pd.DataFrame) -> dict[str, float]:
    """TRL's metrics under TRL's names; rewards are scaled by each pair's β̃, and are of pairs in the loss alone."""
    scaled = pairs.dropna(subset=["beta"])
    chosen_rewards = scaled["beta"] * log_ratio(scaled, "chosen")
    rejected_rewards = scaled["beta"] * log_ratio(scaled, "rejected")
    chosen_tokens, rejected_tokens = pairs["chosen_tokens"].sum(), pairs["rejected_tokens"].sum()
    metrics = {
        "entropy": pairs["entropy_sum"].sum() / (chosen_tokens + rejected_tokens),
        "logits/chosen": pairs["chosen_logits_sum"].sum() / chosen_tokens,
        "logits/rejected": pairs["rejected_logits_sum"].sum() / rejected_tokens,
        "mean_token_accuracy": pairs["chosen_top1"].sum() / chosen_tokens,
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/chosen": pairs["chosen_logps"].mean(),
        "logps/rejected": pairs["rejected_logps"].mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def step_row(pairs: pd.DataFrame, beta_before: float, beta_after: float) -> dict[str, float]:
    """What the β record says of one optimiser step, from all its pairs (see `STEP_COLUMNS`)."""
    decisions, margin = decision_metrics(pairs, beta_before), log_ratio_margin(pairs)
    return {
        "beta_before": beta_before,
        "beta_after": beta_after,
        "relaxed": decisions["kl/p_epsilon_steps"],
        "tied": float((pairs["decision"] == 0).mean()),
        "tightened": decisions["kl/n_epsilon_steps"],
        "mean_step": decisions["kl/avg_steps"],
        "loss": float(pairs["loss"].mean()),
        "reward_margin": float((pairs["beta"] * margin).mean()),
        "log_ratio_margin": float(margin.mean()),
        "chosen_log_ratio": float(log_ratio(pairs, "chosen").mean()),
        "rejected_log_ratio": float(log_ratio(pairs, "rejected").mean()),
        "reward_accuracy": float((margin[pairs["beta"].notna()] > 0).mean()),  # of the pairs in the loss, as TRL's
    }
