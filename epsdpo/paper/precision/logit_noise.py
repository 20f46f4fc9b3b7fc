"""How much rounding both models' logits to bfloat16 disturbs the slope of a log-probability, which ε multiplies.

**The derivation.** At a token with label y the slope is d_y - Σ_v π_v d_v, where d = z - r. Rounding adds an error
ζ_v to z_v for each word of the vocabulary, and η_v to d_v. Both enter before the perturbation, and so are the same at
0, +ε and -ε. To first order in them the slope changes by Σ_v (a_v η_v + b_v ζ_v) with a_v = 1[v=y] - π_v, for what d
becomes, and b_v = -π_v (d_v - Σ π d), for what π becomes.

Let z lie anywhere in its grid cell, of size q as `rounding` has it: ζ has mean 0 and variance q²/12. The rounded z
less the rounded r is one of the two multiples of q next to d. With f the fraction of |d|/q beyond a whole number, η
has mean 0 and variance h = q² f (1 - f): none where the models agree, q²/6 on average where they differ by more than
the grid, as of two independent roundings. Since both logits are rounded alike, the covariance of η and ζ is h/2.
Errors of different words and tokens are taken as independent, so that variances add up: Σ_v ((a_v + b_v) a_v h_v +
b_v² q_v²/12).

**Left out**: what rounding hidden states and weights adds where these are float32; that words of equal logits round
alike; that z and r may lie on two grids, of which the coarser is taken for both.
"""

import torch

from epsdpo.methods.kernels import Head
from epsdpo.paper.precision.rounding import BFLOAT16

_TOKENS_AT_ONCE = 256


def slope_variances(
    hidden: torch.Tensor, head: Head, ref_hidden: torch.Tensor, ref_head: Head, labels: torch.Tensor
) -> torch.Tensor:
    """Variance of each token's slope by the rounding of logits, in nats²: (tokens,).

    Args:
        hidden, head, ref_hidden, ref_head, labels: as for `score_tokens`.
    """
    tiles = zip(*(states.split(_TOKENS_AT_ONCE) for states in (hidden, ref_hidden, labels)), strict=True)
    return torch.cat(
        [_variances(head.logits(states), ref_head.logits(ref_states), of_tile) for states, ref_states, of_tile in tiles]
    )


def _variances(z: torch.Tensor, r: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`slope_variances` from logits (tokens, vocabulary)."""
    d, policy = z - r, torch.softmax(z, dim=1)
    _, exponent = torch.frexp(torch.maximum(z.abs(), r.abs()))
    spacing = torch.ldexp(torch.ones_like(z), exponent - BFLOAT16)
    fraction = (d.abs() / spacing).frac()
    of_difference = spacing**2 * fraction * (1.0 - fraction)
    b = -policy * (d - (policy * d).sum(dim=1, keepdim=True))
    a = (-policy).scatter_add(1, labels.unsqueeze(1), torch.ones_like(policy[:, :1]))
    return ((a + b) * a * of_difference + b**2 * spacing**2 / 12.0).sum(dim=1)
