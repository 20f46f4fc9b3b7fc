"""The mathematics of β-DPO (arXiv 2407.08639): numbers of one batch in, its β and its pairs out.

It knows the equations and the choices below; when a batch is whole is the business of `epsdpo.methods.batch_beta`.
M_i is the log-ratio margin z - γ of pair i, M_0 and σ are running estimates of its mean and standard deviation:

    M_0 ← m M_0 + (1 - m) E[M]        σ ← m σ + (1 - m) √V[M]
    pairs are kept without replacement, with probability ∝ exp(-(M_i - M_0)² / 2σ²)
    β = max(1e-3, β_0 (1 + α (E[M of the kept pairs] - M_0)))

Where paper and released code differ, or the paper is silent:

- M_i has no factor β_0, as in the released code, whose α = 0.6 belongs to such margins. The paper writes M_i as a
  difference of rewards; give α·β_0 as α to have its reading.
- M_0 and σ start from 0 and take in a batch before they are used on it, as in the released code. Where σ is still 0,
  as in the first step, in which policy and reference are equal, every pair is as likely as any other.
- A batch is all pairs of an optimiser step, over micro-batches and processes; the released code takes each micro-batch
  for itself, so that its β depends on their size.
- V is the variance over the batch, without Bessel's correction.
- Evaluation changes nothing; in the released code it moves M_0 and σ.
"""

from dataclasses import dataclass

import numpy as np

LOWEST_BETA = 1e-3


@dataclass(frozen=True)
class MarginStatistics:
    """Running mean M_0 and standard deviation σ of the log-ratio margin, in nats."""

    mean: float = 0.0
    std: float = 0.0

    def after(self, margins: np.ndarray, momentum: float) -> "MarginStatistics":
        """The statistics once a batch with these margins (pairs,) has been taken in."""
        return MarginStatistics(
            mean=momentum * self.mean + (1.0 - momentum) * float(margins.mean()),
            std=momentum * self.std + (1.0 - momentum) * float(margins.std()),
        )


def keep_pairs(
    margins: np.ndarray, statistics: MarginStatistics, keep_ratio: float, random: np.random.Generator
) -> np.ndarray:
    """Which pairs of a batch the loss is made of: (pairs,) bool, round(`keep_ratio`·pairs) of them true, at least one.

    Drawing one after another with probabilities ∝ w is taking the largest log w plus Gumbel noise, which bears weights
    that are 0 in floating point.
    """
    kept = max(1, round(keep_ratio * len(margins)))
    log_weights = np.zeros(len(margins))
    if statistics.std > 0.0:
        log_weights = -(((margins - statistics.mean) / statistics.std) ** 2) / 2.0
    order = np.argsort(-(log_weights + random.gumbel(size=len(margins))), kind="stable")
    return np.isin(np.arange(len(margins)), order[:kept])


def batch_beta(beta: float, kept_margins: np.ndarray, statistics: MarginStatistics, alpha: float) -> float:
    """β of a batch from the margins of its kept pairs; `beta` is β_0."""
    return max(LOWEST_BETA, beta * (1.0 + alpha * (float(kept_margins.mean()) - statistics.mean)))
