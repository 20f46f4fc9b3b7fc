"""What the criterion decides in each arithmetic on given models and pairs, beside what rounding should lead to.

Each pair is looked at in those of `criterion_dtype`: exact; with both models' logits rounded to bfloat16; with
everything rounded (logits, perturbed logits, log-softmax, sums), to bfloat16 or to float16. And, as no launch does it,
with its sums rounded to bfloat16 and nothing else, which is what the model describes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.evaluation.scores.clusters import conversations_of_rendered
from epsdpo.evaluation.scores.intervals import share_interval
from epsdpo.methods import kernels
from epsdpo.methods.heads import head_of
from epsdpo.methods.kernels import pair_steps, score_tokens
from epsdpo.paper.frozen import completion_states
from epsdpo.paper.precision import rounding
from epsdpo.paper.precision.logit_noise import slope_variances
from epsdpo.trajectory.summary import DECISIONS

# From the finest to the coarsest.
ARITHMETICS = ("float32", "bfloat16_logits", "float16", "sums_rounded", "bfloat16")
_ROUNDED = {name: arithmetic for name, arithmetic in kernels.ARITHMETICS.items() if arithmetic != kernels.EXACT}
# The paper's values and, beyond them, up to where rounding no longer matters in small models.
EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class ExactSums:
    """Log-probabilities of one batch of pairs, summed over completion tokens, in nats; chosen first, then rejected.

    Attributes:
        exact: (3, 2·pairs) float64, at 0, +ε and -ε, from float32 arithmetic.
        slope_variances: (2·pairs,) nats², of the slope of each by rounding both models' logits to bfloat16, as derived.
        log_ratios: (2·pairs,) float64, log π - log π_ref.
        tokens: (2·pairs,) length of each completion.
    """

    exact: np.ndarray
    slope_variances: np.ndarray
    log_ratios: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class CriterionSums(ExactSums):
    """The same, and what arithmetic that rounds decides.

    Attributes:
        steps: name of an arithmetic that rounds -> decisions (pairs,) of the kernel in it.
    """

    steps: dict[str, np.ndarray]


# Hidden states of policy and reference at completion tokens, these tokens, and where they stand: `completion_states`.
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Heads = tuple[kernels.Head, kernels.Head]


@torch.no_grad()
def exact_sums(states: States, heads: Heads, epsilon: float, variances: np.ndarray) -> ExactSums:
    """The sums at one ε in exact arithmetic, from which all that is foretold follows.

    Args:
        variances: of `variance_sums`, which depend on no ε.
    """
    *_, completion_mask = states
    scores = score_tokens(*_arguments(states, heads), epsilon)
    return ExactSums(
        # The exact criterion is known up to the current log-probability, which the rounding needs.
        exact=_summed(scores.criterion.double() + scores.logps.double(), completion_mask),
        slope_variances=variances,
        log_ratios=_summed(scores.logps.double() - scores.ref_logps.double(), completion_mask),
        tokens=completion_mask.sum(dim=1).cpu().numpy(),
    )


@torch.no_grad()
def variance_sums(states: States, heads: Heads) -> np.ndarray:
    """`ExactSums.slope_variances`."""
    return _summed(slope_variances(*_arguments(states, heads)), states[-1])


@torch.no_grad()
def rounded_steps(states: States, heads: Heads, epsilon: float) -> dict[str, np.ndarray]:
    """`CriterionSums.steps`: each arithmetic that rounds is run."""
    steps = {}
    for name, arithmetic in _ROUNDED.items():
        criterion = score_tokens(*_arguments(states, heads), epsilon, arithmetic).criterion
        placed = _placed(criterion, states[-1])
        steps[name] = pair_steps(placed.sum(dim=-1), arithmetic.criterion).cpu().numpy()
    return steps


def criterion_sums(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, torch.Tensor], epsilons: Sequence[float]
) -> list[CriterionSums]:
    """The sums behind the criterion at each ε; both models run once.

    Args:
        policy, reference, batch: as for `decisions_at`.
    """
    states, heads = completion_states(policy, reference, batch), (head_of(policy), head_of(reference))
    variances = variance_sums(states, heads)
    return [
        CriterionSums(
            **vars(exact_sums(states, heads, epsilon, variances)), steps=rounded_steps(states, heads, epsilon)
        )
        for epsilon in epsilons
    ]


def _arguments(states: States, heads: Heads) -> tuple:
    hidden, ref_hidden, labels, _ = states
    return hidden, heads[0], ref_hidden, heads[1], labels


def _placed(per_token: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    placed = per_token.new_zeros(*per_token.shape[:-1], *completion_mask.shape)
    return placed.masked_scatter_(completion_mask.expand_as(placed), per_token)


def _summed(per_token: torch.Tensor, completion_mask: torch.Tensor) -> np.ndarray:
    return _placed(per_token, completion_mask).sum(dim=-1).double().cpu().numpy()


def foretold_table(pairs: Sequence[str], epsilon: float, sums: ExactSums) -> pd.DataFrame:
    """One row per pair: what exact arithmetic decides, and what rounding should lead to; nothing rounded is run.

    Returns:
        pair_id, epsilon; float32, the exact decision (+1, 0, -1); the chances that a model of rounding gives each
        decision, such as "bfloat16 relaxed", for all other `ARITHMETICS`; size (of the larger sum, nats), spacing (its
        bfloat16 grid, nats), slope_chosen and slope_rejected (d log π̂/dε, nats), slope_noise (deviation of their
        difference by rounded logits, nats), grid_shift (ε times the larger slope, in steps of that grid), tokens (of
        both completions), chosen_log_ratio and rejected_log_ratio (nats).
    """
    count = len(pairs)
    size = np.abs(sums.exact[0]).reshape(2, count).max(axis=0)
    slopes = ((sums.exact[1] - sums.exact[2]) / (2.0 * epsilon)).reshape(2, count)
    noise = np.sqrt(sums.slope_variances.reshape(2, count).sum(axis=0))
    chosen, rejected = sums.log_ratios.reshape(2, count)
    table = {
        "pair_id": list(pairs),
        "epsilon": epsilon,
        "float32": rounding.decisions(sums.exact),
        "size": size,
        "spacing": rounding.grid_spacing(size),
        "slope_chosen": slopes[0],
        "slope_rejected": slopes[1],
        "slope_noise": noise,
        "grid_shift": epsilon * np.abs(slopes).max(axis=0) / rounding.grid_spacing(size),
        "tokens": sums.tokens.reshape(2, count).sum(axis=0),
        "chosen_log_ratio": chosen,
        "rejected_log_ratio": rejected,
    }
    coarse = rounding.step_chances(sums.exact)
    chances = {
        "bfloat16_logits": rounding.noisy_chances(sums.exact, epsilon * noise),
        "float16": rounding.step_chances(sums.exact, rounding.FLOAT16),
        "sums_rounded": coarse,
        "bfloat16": coarse,
    }
    for arithmetic, of_pairs in chances.items():
        table |= {f"{arithmetic} {name}": of_pairs[:, place] for place, name in enumerate(DECISIONS)}
    return pd.DataFrame(table)


def decisions_table(pairs: Sequence[str], epsilon: float, sums: CriterionSums) -> pd.DataFrame:
    """`foretold_table`, and the decision in each of `ARITHMETICS`, one row per pair."""
    return foretold_table(pairs, epsilon, sums).assign(
        sums_rounded=rounding.rounded_decisions(sums.exact), **sums.steps
    )


def measure_pairs(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: Dataset, max_length: int, epsilons: Sequence[float]
) -> pd.DataFrame:
    """`decisions_table` of prepared pairs, in one batch, at each ε, and the prompt of each pair where it is known."""
    rows = pairs.to_list()
    # Padding is masked: any token will do.
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length)(rows)
    sums = criterion_sums(policy, reference, batch, epsilons)
    identifiers = [row["pair_id"] for row in rows]
    tables = [
        decisions_table(identifiers, epsilon, of_epsilon) for epsilon, of_epsilon in zip(epsilons, sums, strict=True)
    ]
    if "prompt" in pairs.column_names:
        prompts = conversations_of_rendered([row["prompt"] for row in rows])
        tables = [table.assign(prompt=prompts) for table in tables]
    return pd.concat(tables, ignore_index=True)


def shares(table: pd.DataFrame, by: str = "epsilon") -> pd.DataFrame:
    """Shares of each decision in each arithmetic among rows alike in `by`, measured and predicted.

    Args:
        table: rows of `decisions_table`, or of `measure_pairs` for several policies.

    Returns:
        One row per value of `by`, arithmetic and decision: by, arithmetic, decision, pairs, distinct (prompts of
        these), share, low, high (95 % Wilson interval over prompts, or pairs where these are not known) and predicted
        (mean chance by the model of rounding; NaN for float32).
    """
    rows = []
    for value, alike in table.groupby(by):
        # A prompt that several policies were measured on is one observation of what prompts there are.
        prompts = alike["prompt"] if "prompt" in alike else alike["pair_id"]
        for arithmetic in ARITHMETICS:
            for name, decision in DECISIONS.items():
                hits = alike[arithmetic] == decision
                interval = share_interval(hits, prompts)
                row = {by: value, "arithmetic": arithmetic, "decision": name, "pairs": len(alike)}
                row |= {"distinct": prompts.nunique(), "share": int(hits.sum()) / len(alike)}
                row |= {"low": interval.low, "high": interval.high}
                row["predicted"] = np.nan if arithmetic == "float32" else alike[f"{arithmetic} {name}"].mean()
                rows.append(row)
    return pd.DataFrame(rows)


def in_bins(table: pd.DataFrame, quantity: str, bins: int = 6) -> pd.DataFrame:
    """The table with `bin`, the median of `quantity` among the rows that are alike in it; bins hold about equally many.

    Bins that coincide because many values are equal are merged.
    """
    values = table[quantity]
    edges = np.unique(values.quantile(np.linspace(0, 1, bins + 1)))
    return table.assign(bin=values.groupby(np.digitize(values, edges[1:-1], right=True)).transform("median"))
