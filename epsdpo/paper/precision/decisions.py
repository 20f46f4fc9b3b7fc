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
class CriterionSums:
    """Log-probabilities of one batch of pairs, summed over completion tokens, in nats; chosen first, then rejected.

    Attributes:
        exact: (3, 2·pairs) float64, at 0, +ε and -ε, from float32 arithmetic.
        slope_variances: (2·pairs,) nats², of the slope of each by rounding both models' logits to bfloat16, as derived.
        steps: name of an arithmetic that rounds -> decisions (pairs,) of the kernel in it.
        tokens: (2·pairs,) length of each completion.
    """

    exact: np.ndarray
    slope_variances: np.ndarray
    steps: dict[str, np.ndarray]
    tokens: np.ndarray


def criterion_sums(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, torch.Tensor], epsilons: Sequence[float]
) -> list[CriterionSums]:
    """The sums behind the criterion at each ε; both models run once.

    Args:
        policy, reference, batch: as for `decisions_at`.
    """
    hidden, ref_hidden, labels, completion_mask = completion_states(policy, reference, batch)

    heads = head_of(policy), head_of(reference)

    def summed(per_token: torch.Tensor) -> torch.Tensor:
        placed = per_token.new_zeros(*per_token.shape[:-1], *completion_mask.shape)
        placed.masked_scatter_(completion_mask.expand_as(placed), per_token)
        return placed.sum(dim=-1)

    results = []
    with torch.no_grad():
        variances = summed(slope_variances(hidden, heads[0], ref_hidden, heads[1], labels)).double().cpu().numpy()
        for epsilon in epsilons:
            arguments = (hidden, heads[0], ref_hidden, heads[1], labels, epsilon)
            exact = score_tokens(*arguments)
            steps = {
                name: pair_steps(summed(score_tokens(*arguments, arithmetic).criterion), arithmetic.criterion)
                for name, arithmetic in _ROUNDED.items()
            }
            results.append(
                CriterionSums(
                    # The exact criterion is known up to the current log-probability, which the rounding needs.
                    exact=summed(exact.criterion.double() + exact.logps.double()).cpu().numpy(),
                    slope_variances=variances,
                    steps={name: of_arithmetic.cpu().numpy() for name, of_arithmetic in steps.items()},
                    tokens=completion_mask.sum(dim=1).cpu().numpy(),
                )
            )
    return results


def decisions_table(pairs: Sequence[str], epsilon: float, sums: CriterionSums) -> pd.DataFrame:
    """One row per pair: what each arithmetic decides and what rounding should lead to.

    Returns:
        pair_id, epsilon; the decision (+1, 0, -1) in each of `ARITHMETICS`; the chances that a model of rounding gives
        it, such as "bfloat16 relaxed", for all but float32; size (of the larger sum, nats), spacing (its bfloat16 grid,
        nats), slope_chosen and slope_rejected (d log π̂/dε, nats), slope_noise (deviation of their difference by
        rounded logits, nats), grid_shift (ε times the larger slope, in steps of that grid), tokens (of both
        completions).
    """
    count = len(pairs)
    size = np.abs(sums.exact[0]).reshape(2, count).max(axis=0)
    slopes = ((sums.exact[1] - sums.exact[2]) / (2.0 * epsilon)).reshape(2, count)
    noise = np.sqrt(sums.slope_variances.reshape(2, count).sum(axis=0))
    table = {
        "pair_id": list(pairs),
        "epsilon": epsilon,
        "float32": rounding.decisions(sums.exact),
        "sums_rounded": rounding.rounded_decisions(sums.exact),
        **sums.steps,
        "size": size,
        "spacing": rounding.grid_spacing(size),
        "slope_chosen": slopes[0],
        "slope_rejected": slopes[1],
        "slope_noise": noise,
        "grid_shift": epsilon * np.abs(slopes).max(axis=0) / rounding.grid_spacing(size),
        "tokens": sums.tokens.reshape(2, count).sum(axis=0),
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
