"""The mathematics of ε-DPO: tensors in, tensors out.

The paper's equations, evaluated over a large vocabulary in tiles; nothing here knows a model, a batch or a trainer.
Notation, per completion token: z and r are the logits of policy and reference, y the label, d = z - r. Equation numbers
are those of arXiv 2502.13177.

The two perturbed policies of Eqs. 3 and 4 are softmax(z + εd) and softmax(z - εd). With e_v = exp(z_v - max z),

    log softmax(z ± εd)_y - log softmax(z)_y = ±(ε d_y - c) - log1p(Σ_v e_v expm1(±(ε d_v - c)) / Σ_v e_v),

for any constant c, so one running maximum and one running sum serve all three softmaxes, and the differences, which
are what the criterion compares, are exact where policy and reference agree. With c = ε d_y the logarithm's argument
stays clear of 0 wherever the label is likely, and a constant offset between the two models' logits cancels. Nothing of
size tokens × vocabulary is ever kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from epsdpo.methods.fusing import fused, rounded

# Two to four float32 tiles are alive at once. On a GPU they are of 256 MiB, since gradients are read and written once
# for each. On the CPU they are of 4 MiB: those stay in the cache, and malloc hands the same pages out again, where it
# maps and clears larger ones anew.
TOKENS_PER_TILE = 4_096
TOKENS_PER_TILE_ON_CPU = 512
VOCABULARY_PER_TILE = 16_384
VOCABULARY_PER_TILE_ON_CPU = 2_048


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap·tanh(scale/divisor·(hidden @ weightᵀ + bias) / softcap).

    Attributes:
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        scale: factor on the logits (Cohere's `logit_scale`).
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`), or None.
        divisor: what the logits are divided by (Granite's `logits_scaling`), which rounds otherwise than a factor.
        divides_hidden: whether the model divides its hidden states in place of the logits, as MiniCPM3 does.
        gathered: makes the context in which a weight that is sharded between processes is whole.
        rounded_to: dtype of states and weight in the product, and of what each operation after it is rounded to; None
            rounds nothing.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    divisor: float = 1.0
    divides_hidden: bool = False
    gathered: Callable[[], AbstractContextManager] = nullcontext
    rounded_to: torch.dtype | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of `hidden` (tokens, hidden), summed and returned in float32 (or float64)."""
        if self.rounded_to is None:
            return self._shaped(self._products(hidden))
        hidden = hidden.to(self.rounded_to)
        return self._rounded(self._products(hidden), hidden, self.rounded_to).float()

    def of(self, columns: slice) -> "Head":
        """The head of a part of the vocabulary."""
        return replace(self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns])

    def exact_and_rounded_logits(self, hidden: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`logits`, and what a model makes of them that computes in `dtype`: rounded to it after each operation."""
        products = self._products(hidden)
        return self._shaped(products), self._rounded(products, hidden, dtype)

    def _rounded(self, products: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        logits = rounded(products, dtype)
        if self.divides_hidden:
            logits = rounded(self._products(hidden / self.divisor), dtype)
        elif self.divisor != 1.0:
            logits = logits / self.divisor
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def label_logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The logit (tokens,) of each token's label alone, not rounded: `logits` up to that, and the order of a sum."""
        accumulate = _accumulation_dtype(hidden)
        logits = (hidden.to(accumulate) * self.weight[labels].to(accumulate)).sum(dim=1)
        return self._shaped(logits if self.bias is None else logits + self.bias[labels])

    def _products(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden.dtype)
        if hidden.dtype not in (torch.float16, torch.bfloat16):
            products = hidden @ weight.T
        elif hidden.is_cuda:
            products = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            products = hidden.float() @ weight.float().T
        return products if self.bias is None else products + self.bias

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        if self._factor != 1.0:
            logits = logits * self._factor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def _factor(self) -> float:
        return self.scale / self.divisor

    def logits_gradient(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Carry a gradient with respect to the logits back through soft-capping and scale."""
        if self.softcap is not None:
            gradient = gradient * (1.0 - (logits / self.softcap) ** 2)
        return gradient if self._factor == 1.0 else gradient * self._factor


class Arithmetic(NamedTuple):
    """Where the pass over both heads rounds.

    Attributes:
        criterion: dtype that every operation of the criterion is rounded to, from the heads' products to sums and
            log-ratios, as a model does that computes in it throughout. float32 evaluates the criterion exactly.
        logits: dtype that both models' logits are rounded to, for the criterion and for the loss; None rounds neither.
    """

    criterion: torch.dtype = torch.float32
    logits: torch.dtype | None = None


EXACT = Arithmetic()

# By the names that `criterion_dtype` has for them.
ARITHMETICS = {
    "float32": EXACT,
    "bfloat16": Arithmetic(torch.bfloat16),
    "bfloat16_logits": Arithmetic(logits=torch.bfloat16),
    "float16": Arithmetic(torch.float16),
}


class TokenScores(NamedTuple):
    """What one pass over both heads yields; each field has one value per token, `criterion` has three.

    Attributes:
        logps: log-probability of the label under the policy, in nats; the only field with a gradient.
        ref_logps: log-probability of the label under the reference, in nats.
        criterion: (3, tokens), the label's log-probability under z, z + εd and z - εd, up to one constant per token
            that cancels when the three are compared (in float32 it is log softmax(z)_y itself, so that row 0 is 0).
        entropy: entropy of the policy's next-token distribution, in nats.
        mean_logits: mean of the policy's logits over the vocabulary.
        is_top1: whether no token is likelier than the label.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    criterion: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


# ------------------------------------------------------------------------------------------- over pairs, no vocabulary


def pair_steps(criterion: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The decision of Eq. 5 for each pair: is the pair's log-ratio strictly monotone in β around the current β?

    Args:
        criterion: (3, 2·pairs), sums over completion tokens of `TokenScores.criterion`, chosen first, then rejected.
        dtype: arithmetic in which sums and log-ratios are compared.

    Returns:
        (pairs,) int64: +1 if the log-ratio grows when the KL penalty is lowered (Eq. 1: choose β⁻ = β/(1+ε)), -1 if it
        grows when the penalty is raised (Eq. 2: choose β⁺ = β/(1-ε)), 0 otherwise.
    """
    chosen, rejected = criterion.to(dtype).chunk(2, dim=1)
    current, lowered, raised = chosen - rejected
    relax = (lowered > current) & (current > raised)
    tighten = (lowered < current) & (current < raised)
    return relax.long() - tighten.long()


def pair_beta(beta: float, steps: torch.Tensor, epsilon_step: float) -> torch.Tensor:
    """β̃ of Eq. 5 for each pair: β/(1+ε) where the step is +1, β/(1-ε) where it is -1, β where it is 0."""
    return beta / (1.0 + epsilon_step * steps.float())


def updated_beta(beta: float, relaxed: int, tightened: int, pairs: int, epsilon_step: float, rule: str) -> float:
    """β for the next batch, from how many of `pairs` chose β⁻ (`relaxed`) and β⁺ (`tightened`).

    Rule "mean_step" is the released code's β/(1 + ε·mean step); "mean_beta" is line 5 of Algorithm 1, β ← E[β̃].
    The two differ by ε²·variance of the steps, to leading order.
    """
    if rule == "mean_beta":
        tied = pairs - relaxed - tightened
        return beta * (relaxed / (1.0 + epsilon_step) + tightened / (1.0 - epsilon_step) + tied) / pairs
    return beta / (1.0 + epsilon_step * (relaxed - tightened) / pairs)


def dpo_loss(log_ratio_margin: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """-log σ(β̃ (z - γ)) for each pair, where z - γ = `log_ratio_margin` (pairs,) and β̃ = `beta` is a constant."""
    return -F.logsigmoid(beta.detach() * log_ratio_margin)


# ------------------------------------------------------------------------------------------ over tokens and vocabulary


def score_tokens(
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor,
    ref_head: Head,
    labels: torch.Tensor,
    epsilon: float,
    arithmetic: Arithmetic = EXACT,
) -> TokenScores:
    """Score completion tokens under policy, reference and both perturbed policies (Eqs. 3, 4) in one tiled pass.

    Args:
        hidden: (tokens, hidden size), the policy's last hidden states at the positions that predict `labels`.
        head: the policy's head.
        ref_hidden: (tokens, reference's hidden size), likewise of the reference.
        ref_head: the reference's head, over the same vocabulary.
        labels: (tokens,) int64.
        epsilon: size ε_c of the perturbation.
        arithmetic: of the criterion, and of the logits behind all that is returned.

    Returns:
        TokenScores of `tokens` values. Gradients flow from `logps` to `hidden`, `head.weight` and `head.bias`.
    """
    if arithmetic.logits is not None:
        head, ref_head = (replace(each, rounded_to=arithmetic.logits) for each in (head, ref_head))
    with head.gathered(), ref_head.gathered():
        # Weight and bias are passed beside the head that holds them: autograd tracks only arguments that are tensors.
        scores = _ScoreTokens.apply(
            hidden, head.weight, head.bias, head, ref_hidden, ref_head, labels, epsilon, arithmetic.criterion
        )
    return TokenScores(*scores)


def token_kl(hidden: torch.Tensor, head: Head, ref_hidden: torch.Tensor, ref_head: Head) -> torch.Tensor:
    """KL(π‖π_ref) of the next-token distributions, exact over the vocabulary, in nats: (tokens,), without gradient."""
    divergences = []
    with torch.no_grad(), head.gathered(), ref_head.gathered():
        for tokens in _token_tiles(hidden):
            policy, reference = _RunningSoftmax(hidden[tokens], ("difference",)), _RunningSoftmax(hidden[tokens])
            for columns in _vocabulary_tiles(head):
                z, r = head.of(columns).logits(hidden[tokens]), ref_head.of(columns).logits(ref_hidden[tokens])
                difference = z - r
                reference.fold(r)
                weights = policy.fold(z)
                policy.weigh("difference", difference, weights)
            divergences.append(policy.mean("difference") - policy.log_normaliser() + reference.log_normaliser())
    return torch.cat(divergences) if divergences else hidden.new_zeros(0)


class _ScoreTokens(torch.autograd.Function):
    """The pass behind `score_tokens`. Backward recomputes each tile of logits; only `logps` has a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, ref_hidden, ref_head, labels, epsilon, criterion_dtype):
        tiles = [
            _score_tile(hidden[tokens], head, ref_hidden[tokens], ref_head, labels[tokens], epsilon, criterion_dtype)
            for tokens in _token_tiles(hidden)
        ]
        if not tiles:
            raise ValueError("score_tokens got no completion token; every pair needs at least one")
        *fields, log_normaliser = (torch.cat(field, dim=-1) for field in zip(*tiles, strict=True))
        ctx.save_for_backward(hidden, labels, log_normaliser)
        ctx.head = head
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*fields[1:])
        return tuple(fields)

    @staticmethod
    def backward(ctx, gradient, *_):
        if gradient is None:
            return (None,) * 9
        hidden, labels, log_normaliser = ctx.saved_tensors
        head, accumulate = ctx.head, log_normaliser.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with head.gathered():
            weight, bias = head.weight, head.bias
            hidden_gradient = torch.zeros_like(hidden, dtype=accumulate) if needs_hidden else None
            weight_gradient = torch.empty_like(weight) if needs_weight else None
            bias_gradient = torch.empty_like(bias) if needs_bias else None
            # On a GPU a product of bfloat16 is some fifteen times as fast as one of float32. Sums are float32 in both.
            operand = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else accumulate
            logits_gradient = _fused_logits_gradient if hidden.is_cuda else _logits_gradient
            # The vocabulary is the outer loop, so that the weight's gradient needs float32 for one tile at a time only.
            for columns in _vocabulary_tiles(head):
                part = head.of(columns)
                weight_part = part.weight.to(head.rounded_to or weight.dtype).to(operand)
                weight_tile = bias_tile = None
                for tokens in _token_tiles(hidden):
                    tile = logits_gradient(
                        part,
                        hidden[tokens],
                        labels[tokens] - columns.start,
                        log_normaliser[tokens],
                        gradient[tokens],
                        operand,
                    )
                    if needs_hidden:
                        _add_product(tile, weight_part, hidden_gradient[tokens])
                    if needs_weight:
                        weight_tile = _add_product(tile.T, hidden[tokens].to(operand), weight_tile)
                    if needs_bias:
                        bias_sum = tile.sum(dim=0, dtype=accumulate)
                        bias_tile = bias_sum if bias_tile is None else bias_tile + bias_sum
                if needs_weight:
                    weight_gradient[columns] = weight_tile
                if needs_bias:
                    bias_gradient[columns] = bias_tile
            if needs_hidden:
                hidden_gradient = hidden_gradient.to(hidden.dtype)
            return (hidden_gradient, weight_gradient, bias_gradient, *(None,) * 6)


def _add_product(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """`total` + left @ right, in its place, or a new total: in float32 also where the factors are bfloat16."""
    wide = {} if left.dtype != torch.bfloat16 else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(left, right, **wide)
    return torch.addmm(total, left, right, out=total, **wide)


def _logits_gradient(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    log_normaliser: torch.Tensor,
    gradient: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient in `dtype` with respect to one tile of raw logits, from that with respect to each log-probability.

    `labels` count from the tile's first column.
    """
    logits = head.logits(hidden)
    # ∂ log softmax(z)_y / ∂z = 1[y] - softmax(z)
    # In the place of the logits, unless soft-capping needs them for its own gradient below.
    tile = torch.sub(logits, log_normaliser.unsqueeze(1), out=logits if head.softcap is None else None)
    tile.exp_().mul_(-gradient.unsqueeze(1))
    within, column = _label_columns(labels, head)
    tile.scatter_add_(1, column, torch.where(within, gradient, 0.0).unsqueeze(1))
    return head.logits_gradient(tile, logits).to(dtype)


_fused_logits_gradient = fused(_logits_gradient)


def _score_tile(
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor,
    ref_head: Head,
    labels: torch.Tensor,
    epsilon: float,
    criterion_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """The fields of `TokenScores` for one tile of tokens, and the policy's log-normaliser for the backward pass."""
    arguments = (hidden, head, ref_hidden, ref_head, labels, epsilon)
    if criterion_dtype != torch.float32:
        return _fold_tile(*arguments, plain_dtype=criterion_dtype)
    fields = _fold_tile(*arguments, plain_dtype=None)
    # Where a logit is shifted by more than some 88 nats its exponential overflows. The plain formula bears that.
    criterion = fields[2]
    if not criterion.isfinite().all():
        return _fold_tile(*arguments, plain_dtype=criterion.dtype)
    return fields


def _fold_tile(
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor,
    ref_head: Head,
    labels: torch.Tensor,
    epsilon: float,
    plain_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, ...]:
    """`_score_tile`, with the criterion from three plain softmaxes in `plain_dtype`, or from exact differences."""
    centre = epsilon * (head.label_logits(hidden, labels) - ref_head.label_logits(ref_hidden, labels))
    seen = _PassOverVocabulary(hidden, plain_dtype)
    # What rounds after soft-capping did not come out of the compiler to the bit (measured with torch 2.11).
    compiled = hidden.is_cuda and (plain_dtype is None or head.softcap is None)
    fold = _fused_fold_columns if compiled else _fold_columns
    for columns in _vocabulary_tiles(head):
        # Parts of the vocabulary and not their places, to which compiled code would be bound.
        part, ref_part = head.of(columns), ref_head.of(columns)
        fold(seen, hidden, part, ref_hidden, ref_part, labels - columns.start, centre, epsilon)
    policy = seen.policy
    if plain_dtype is None:
        shift = (seen.z_label - seen.r_label) * epsilon - centre
        lowered = shift - torch.log1p(policy.mean("lowered"))
        raised = -shift - torch.log1p(policy.mean("raised"))
        criterion = torch.stack([torch.zeros_like(lowered), lowered, raised])
    else:
        label_logits = _perturbed_logits(seen.plain_z_label, seen.plain_r_label, epsilon)
        criterion = torch.stack(
            [softmax.rounded_log_prob(logits) for softmax, logits in zip(seen.plain, label_logits, strict=True)]
        )
    log_normaliser = policy.log_normaliser()
    return (
        policy.log_prob(seen.z_label),
        seen.reference.log_prob(seen.r_label),
        criterion,
        log_normaliser - policy.mean("logit"),
        seen.logits_sum / head.weight.shape[0],
        seen.z_label >= policy.maximum,
        log_normaliser,
    )


class _PassOverVocabulary:
    """What is known of a tile of tokens after each tile of the vocabulary.

    Each value is a tensor of its own, and there are the same ones whatever is exact: compiled code is bound to them.
    """

    def __init__(self, hidden: torch.Tensor, plain_dtype: torch.dtype | None):
        self.plain_dtype = plain_dtype
        self.policy = _RunningSoftmax(hidden, ("logit", "lowered", "raised"))
        self.reference = _RunningSoftmax(hidden)
        self.plain = [_RunningSoftmax(hidden) for _ in range(3)]
        self.z_label, self.r_label, self.logits_sum = (torch.zeros_like(self.policy.total) for _ in range(3))
        self.plain_z_label, self.plain_r_label = (torch.zeros_like(self.z_label, dtype=plain_dtype) for _ in range(2))


def _fold_columns(
    seen: _PassOverVocabulary,
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor,
    ref_head: Head,
    labels: torch.Tensor,
    centre: torch.Tensor,
    epsilon: float,
) -> None:
    """Take one tile of the vocabulary into what was `seen`; `labels` count from its first column."""
    policy, reference, exact = seen.policy, seen.reference, seen.plain_dtype is None
    if seen.plain_dtype in (None, policy.total.dtype):
        z, r = head.logits(hidden), ref_head.logits(ref_hidden)
        plain_z, plain_r = z, r
    else:
        z, plain_z = head.exact_and_rounded_logits(hidden, seen.plain_dtype)
        r, plain_r = ref_head.exact_and_rounded_logits(ref_hidden, seen.plain_dtype)
    within, column = _label_columns(labels, head)
    seen.z_label = torch.where(within, z.gather(1, column).squeeze(1), seen.z_label)
    seen.r_label = torch.where(within, r.gather(1, column).squeeze(1), seen.r_label)
    seen.logits_sum = seen.logits_sum + z.sum(dim=1)
    if exact:
        shift = torch.sub(z, r).mul_(epsilon).sub_(centre.unsqueeze(1))
    else:
        seen.plain_z_label = torch.where(within, plain_z.gather(1, column).squeeze(1), seen.plain_z_label)
        seen.plain_r_label = torch.where(within, plain_r.gather(1, column).squeeze(1), seen.plain_r_label)
        for softmax, logits in zip(seen.plain, _perturbed_logits(plain_z, plain_r, epsilon), strict=True):
            softmax.fold(logits.to(z.dtype))
    # From here on the tiles are overwritten one after the other: new ones cost more than filling them.
    reference.fold(r, out=r)
    weights = policy.fold(z, out=r)
    policy.weigh("logit", z, weights)
    if exact:
        policy.weigh("lowered", torch.expm1(shift, out=z), weights)
        policy.weigh("raised", shift.neg_().expm1_(), weights)


_fused_fold_columns = fused(_fold_columns)


def _perturbed_logits(
    z: torch.Tensor, r: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, (1+ε)z - εr and (1-ε)z + εr (Eqs. 3, 4), each product and sum rounded to the dtype of z and r."""
    return z, (1.0 + epsilon) * z - epsilon * r, (1.0 - epsilon) * z + epsilon * r


class _RunningSoftmax:
    """Statistics of one softmax per token over a vocabulary that is seen tile by tile.

    After every tile was folded, `mean(name)` is the expectation under the softmax of the values weighed as `name`.
    """

    def __init__(self, hidden: torch.Tensor, weighed: tuple[str, ...] = ()):
        dtype = _accumulation_dtype(hidden)
        self.maximum = torch.full(hidden.shape[:1], -torch.inf, device=hidden.device, dtype=dtype)
        self.total = torch.zeros_like(self.maximum)
        self._weighted = {name: torch.zeros_like(self.total) for name in weighed}

    def fold(self, logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Take in a tile of logits and return its weights in the softmax, times the total so far; in `out` if given."""
        maximum = torch.maximum(self.maximum, logits.amax(dim=1))
        rescale = torch.exp(self.maximum - maximum)
        weights = torch.sub(logits, maximum.unsqueeze(1), out=out).exp_()
        self.maximum = maximum
        self.total = self.total * rescale + weights.sum(dim=1)
        self._weighted = {name: weighted * rescale for name, weighted in self._weighted.items()}
        return weights

    def weigh(self, name: str, values: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in the tile's values of a quantity whose mean is wanted, with the weights that `fold` returned.

        `values` is overwritten.
        """
        self._weighted[name] = self._weighted[name] + values.mul_(weights).sum(dim=1)

    def mean(self, name: str) -> torch.Tensor:
        return self._weighted[name] / self.total

    def log_normaliser(self) -> torch.Tensor:
        return self.maximum + torch.log(self.total)

    def log_prob(self, label_logits: torch.Tensor) -> torch.Tensor:
        # In this order, as log_softmax does it: the maximum cancels before the small logarithm is added.
        return (label_logits - self.maximum) - torch.log(self.total)

    def rounded_log_prob(self, label_logits: torch.Tensor) -> torch.Tensor:
        """`log_prob` rounded to the dtype of `label_logits`, where torch's own log_softmax rounds in that dtype.

        On CUDA that is once, at the end; on the CPU also the sum and its logarithm (read off torch 2.13).
        """
        dtype, total = label_logits.dtype, self.total
        log_total = torch.log(total)
        if total.device.type == "cpu":
            log_total = torch.log(total.to(dtype).to(total.dtype)).to(dtype).to(total.dtype)
        return ((label_logits.to(total.dtype) - self.maximum) - log_total).to(dtype).to(total.dtype)


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _token_tiles(hidden: torch.Tensor) -> Iterator[slice]:
    return _tiles(hidden.shape[0], TOKENS_PER_TILE if hidden.is_cuda else TOKENS_PER_TILE_ON_CPU)


def _vocabulary_tiles(head: Head) -> Iterator[slice]:
    on_cpu = head.weight.device.type == "cpu"
    return _tiles(head.weight.shape[0], VOCABULARY_PER_TILE_ON_CPU if on_cpu else VOCABULARY_PER_TILE)


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _label_columns(labels: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each label lies in the head's part of the vocabulary (tokens,), and its place there (tokens, 1).

    Where it does not, the place is some valid one: picking out rows instead would make a GPU wait for the CPU.
    """
    size = head.weight.shape[0]
    return (labels >= 0) & (labels < size), labels.clamp(0, size - 1).unsqueeze(1)
