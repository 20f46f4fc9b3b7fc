"""The mathematics of ε-DPO against full logits, hand-computed numbers and finite differences."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from epsdpo.methods import kernels
from epsdpo.methods.kernels import (
    ARITHMETICS,
    Head,
    dpo_loss,
    pair_beta,
    pair_steps,
    score_tokens,
    token_kl,
    updated_beta,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that no size in these tests is a multiple of, so that every edge is met; on a GPU without being fused."""
    for name in ("TOKENS_PER_TILE", "TOKENS_PER_TILE_ON_CPU"):
        monkeypatch.setattr(kernels, name, 5)
    for name in ("VOCABULARY_PER_TILE", "VOCABULARY_PER_TILE_ON_CPU"):
        monkeypatch.setattr(kernels, name, 11)
    for name, function in PLAIN.items():
        monkeypatch.setattr(kernels, f"_fused{name}", function)


PLAIN = {name: getattr(kernels, name) for name in ("_fold_columns", "_logits_gradient")}
FUSED = {name: getattr(kernels, f"_fused{name}") for name in PLAIN}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def random_problem(
    tokens=12, vocabulary=37, size=6, ref_size=4, dtype=torch.float64, seed=0, spread=1.0, device="cpu", **head
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    policy = Head(spread * normal(vocabulary, size), normal(vocabulary), **head)
    reference = Head(spread * normal(vocabulary, ref_size), **head)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    return normal(tokens, size), policy, normal(tokens, ref_size), reference, labels


def full_logits(hidden, head):
    logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def label_log_probs(logits, labels):
    return logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}])
def test_scores_equal_the_formulas_on_full_logits(device, head):
    hidden, policy, ref_hidden, reference, labels = random_problem(device=device, **head)
    z, r = full_logits(hidden, policy), full_logits(ref_hidden, reference)
    scores = score_tokens(hidden, policy, ref_hidden, reference, labels, epsilon=0.1)

    logps = label_log_probs(z, labels)
    torch.testing.assert_close(scores.logps, logps)
    torch.testing.assert_close(scores.ref_logps, label_log_probs(r, labels))
    torch.testing.assert_close(scores.criterion[0], torch.zeros_like(logps))
    torch.testing.assert_close(scores.criterion[1], label_log_probs(1.1 * z - 0.1 * r, labels) - logps)  # Eq. 3
    torch.testing.assert_close(scores.criterion[2], label_log_probs(0.9 * z + 0.1 * r, labels) - logps)  # Eq. 4
    torch.testing.assert_close(scores.entropy, torch.distributions.Categorical(logits=z).entropy())
    torch.testing.assert_close(scores.mean_logits, z.mean(dim=1))
    assert torch.equal(scores.is_top1, z.argmax(dim=1) == labels)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 17),
    vocabulary=st.integers(2, 60),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    epsilon=st.sampled_from([0.005, 0.01, 0.1, 0.5]),
    seed=st.integers(0, 10_000),
)
def test_float32_criterion_is_accurate_for_any_shape_and_spread(tokens, vocabulary, spread, epsilon, seed):
    """Against float64 on the same float32 numbers: also where the difference is far below the log-probability."""
    problem = random_problem(tokens, vocabulary, dtype=torch.float32, seed=seed, spread=spread)
    hidden, policy, ref_hidden, reference, labels = problem
    z = full_logits(hidden.double(), Head(policy.weight.double(), policy.bias.double()))
    r = full_logits(ref_hidden.double(), Head(reference.weight.double()))
    # Beyond a change of 4 nats in a logit, float32 loses digits; ε = 0.01 gets there when logits differ by 400.
    epsilon = min(epsilon, 4.0 / (z - r).abs().max().item())
    scores = score_tokens(*problem, epsilon)
    logps = label_log_probs(z, labels)
    for row, sign in ((1, 1.0), (2, -1.0)):
        exact = label_log_probs(z + sign * epsilon * (z - r), labels) - logps
        scale = epsilon * (z - r).abs().max().item()  # an error in the logits enters the difference times ε
        torch.testing.assert_close(scores.criterion[row].double(), exact, rtol=1e-4, atol=1e-4 * scale + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 17),
    vocabulary=st.integers(2, 60),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_and_gradients_accumulate_in_float32_for_any_input(device, tokens, vocabulary, spread, dtype, seed):
    """Against full logits in float64 on the same numbers, whatever dtype they are stored in."""
    hidden, policy, ref_hidden, reference, labels = random_problem(
        tokens, vocabulary, dtype=dtype, seed=seed, spread=spread, device=device
    )
    weight_per_token = torch.linspace(-1.0, 1.0, tokens, device=device)
    ours = [tensor.detach().clone().requires_grad_() for tensor in (hidden, policy.weight, policy.bias)]
    scores = score_tokens(ours[0], Head(*ours[1:]), ref_hidden, reference, labels, 0.01)
    (scores.logps * weight_per_token).sum().backward()

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, policy.weight, policy.bias)]
    z = full_logits(exact[0], Head(*exact[1:]))
    logps = label_log_probs(z, labels)
    (logps * weight_per_token).sum().backward()
    torch.testing.assert_close(scores.logps.double(), logps, rtol=1e-5, atol=2e-5 * max(1.0, spread))
    # What float32 makes of the largest logit is off in every probability, also where the gradient is next to nothing.
    logit_unit = torch.finfo(torch.float32).eps * z.abs().max().item()
    factor = max(tensor.abs().max().item() for tensor in exact[:2])
    for mine, theirs in zip(ours, exact, strict=True):
        # A gradient is stored in the dtype of what it belongs to, and rounded to it once.
        unit = torch.finfo(dtype).eps
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(
            mine.grad.double(),
            theirs.grad,
            rtol=unit,
            atol=(unit + 1e-5 * spread) * scale + logit_unit * max(factor, 1.0) * tokens + 1e-7,
        )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 60),
    spread=st.sampled_from([0.03, 1.0, 30.0, 3_000.0]),
    epsilon=st.sampled_from([0.005, 0.1, 0.9]),
    seed=st.integers(0, 10_000),
)
@pytest.mark.parametrize("device", DEVICES)
def test_decisions_equal_those_of_full_logits(device, tokens, vocabulary, spread, epsilon, seed):
    """Up to logits of many thousands, where exponentials overflow: the step of every pair that is no near tie."""
    problem = random_problem(2 * tokens, vocabulary, dtype=torch.float32, seed=seed, spread=spread, device=device)
    hidden, policy, ref_hidden, reference, labels = problem
    scores = score_tokens(*problem, epsilon)
    assert scores.criterion.isfinite().all()
    z = full_logits(hidden.double(), Head(policy.weight.double(), policy.bias.double()))
    r = full_logits(ref_hidden.double(), Head(reference.weight.double()))
    exact = torch.stack([label_log_probs(z + sign * epsilon * (z - r), labels) for sign in (0.0, 1.0, -1.0)])
    chosen, rejected = exact.chunk(2, dim=1)
    gaps = (chosen - rejected) - (chosen - rejected)[0]
    clear = (gaps[1:].abs() > 1e-5 * max(z.abs().max(), r.abs().max(), 1.0)).all(dim=0)
    assert torch.equal(pair_steps(scores.criterion)[clear], pair_steps(exact, torch.float64)[clear])


def test_a_constant_offset_between_the_models_logits_changes_nothing():
    hidden, policy, ref_hidden, reference, labels = random_problem(dtype=torch.float32)
    plain = score_tokens(hidden, policy, ref_hidden, reference, labels, 0.1).criterion
    offset = Head(policy.weight, policy.bias + 200.0)
    shifted = score_tokens(hidden, offset, ref_hidden, reference, labels, 0.1).criterion
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)


def test_criterion_is_exactly_zero_where_policy_is_reference():
    hidden, policy, *_, labels = random_problem(dtype=torch.float32)
    scores = score_tokens(hidden, policy, hidden, policy, labels, epsilon=0.3)
    assert torch.count_nonzero(scores.criterion) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_bfloat16_criterion_equals_full_logits_in_bfloat16(device, epsilon):
    hidden, policy, ref_hidden, reference, labels = random_problem(device=device, tokens=64, dtype=torch.bfloat16)
    policy = Head(policy.weight)  # with a bias, full logits would be rounded twice
    z, r = full_logits(hidden, policy), full_logits(ref_hidden, reference)
    scores = score_tokens(hidden, policy, ref_hidden, reference, labels, epsilon, ARITHMETICS["bfloat16"])
    expected = torch.stack(
        [
            label_log_probs(logits, labels)
            for logits in (z, (1 + epsilon) * z - epsilon * r, (1 - epsilon) * z + epsilon * r)
        ]
    )
    # Sums in another order may fall on the other side of a rounding boundary, by one unit, once in a while.
    assert (scores.criterion.bfloat16() == expected).float().mean() > 0.98
    torch.testing.assert_close(scores.criterion.bfloat16(), expected, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_with_rounded_logits_all_is_of_them(device):
    """Products of bfloat16 states and weights, rounded once; nothing after them is."""
    hidden, policy, ref_hidden, reference, labels = random_problem(device=device, tokens=64, dtype=torch.float32)
    scores = score_tokens(hidden, policy, ref_hidden, reference, labels, 0.1, ARITHMETICS["bfloat16_logits"])

    def rounded(states, head):
        products = states.bfloat16().double() @ head.weight.bfloat16().double().T
        return (products if head.bias is None else products + head.bias.double()).bfloat16().double()

    z, r = rounded(hidden, policy), rounded(ref_hidden, reference)
    logps = label_log_probs(z, labels)
    raised, lowered = (label_log_probs(z + shift * (z - r), labels) - logps for shift in (-0.1, 0.1))
    torch.testing.assert_close(scores.logps.double(), logps, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.ref_logps.double(), label_log_probs(r, labels), rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.criterion[1].double(), lowered, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.criterion[2].double(), raised, rtol=0, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.mean_logits.double(), z.mean(dim=1), rtol=0, atol=1e-6)
    assert torch.equal(scores.is_top1, z.gather(1, labels[:, None])[:, 0] == z.amax(dim=1))  # also of several


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_but_the_criterion_is_exact_where_that_alone_is_rounded(device, dtype, arithmetic):
    problem = random_problem(device=device, tokens=64, dtype=dtype, softcap=5.0)
    exact, rounded = (score_tokens(*problem, 0.1, ARITHMETICS[name]) for name in ("float32", arithmetic))
    for name in exact._fields:
        assert torch.equal(getattr(exact, name), getattr(rounded, name)) == (name != "criterion"), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [{}, {"scale": 1.5, "softcap": 4.0}])
def test_gradients_pass_a_float64_check(device, head):
    hidden, policy, ref_hidden, reference, labels = random_problem(device=device, tokens=7, vocabulary=23, **head)

    def logps(hidden, weight, bias):
        return score_tokens(hidden, Head(weight, bias, **head), ref_hidden, reference, labels, 0.1).logps

    leaves = [tensor.requires_grad_() for tensor in (hidden, policy.weight, policy.bias)]
    assert torch.autograd.gradcheck(logps, leaves)


@pytest.mark.skipif(shutil.which("cc") is None, reason="torch.compile needs a C compiler")
@pytest.mark.parametrize(
    ("device", "dtype", "arithmetic"),
    [
        ("cpu", torch.bfloat16, "bfloat16"),
        ("cpu", torch.bfloat16, "bfloat16_logits"),
        pytest.param("cuda", torch.float32, "float32", marks=NEEDS_GPU),
        pytest.param("cuda", torch.bfloat16, "float32", marks=NEEDS_GPU),
        pytest.param("cuda", torch.bfloat16, "bfloat16", marks=NEEDS_GPU),
        pytest.param("cuda", torch.bfloat16, "bfloat16_logits", marks=NEEDS_GPU),
        pytest.param("cuda", torch.float16, "float16", marks=NEEDS_GPU),
    ],
)
def test_what_a_gpu_runs_compiled_rounds_like_what_is_not_compiled(monkeypatch, device, dtype, arithmetic):
    """The same criterion, to the bit where it is rounded, and the same gradients."""
    torch.compiler.reset()  # beyond eight variants of a function torch compiles no more
    for name in ("TOKENS_PER_TILE", "TOKENS_PER_TILE_ON_CPU"):
        monkeypatch.setattr(kernels, name, 100)
    for name in ("VOCABULARY_PER_TILE", "VOCABULARY_PER_TILE_ON_CPU"):
        monkeypatch.setattr(kernels, name, 512)
    softcap = 30.0 if ARITHMETICS[arithmetic].criterion == torch.float32 else None  # where it is compiled with one
    hidden, head, *rest = random_problem(257, 1300, 64, 32, dtype, spread=0.3, device=device, softcap=softcap)
    results = []
    for functions in (PLAIN, FUSED):
        for name, function in functions.items():
            monkeypatch.setattr(kernels, name, function)
            monkeypatch.setattr(kernels, f"_fused{name}", function)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
        scores = score_tokens(leaves[0], Head(*leaves[1:], softcap=softcap), *rest, 0.01, ARITHMETICS[arithmetic])
        scores.logps.mean().backward()
        results.append((scores, [leaf.grad for leaf in leaves]))
    (plain, plain_gradients), (compiled, compiled_gradients) = results
    if ARITHMETICS[arithmetic].criterion == torch.float32:
        torch.testing.assert_close(compiled.criterion, plain.criterion, rtol=1e-4, atol=1e-6)
    else:  # sums in another order may fall on the other side of a rounding boundary once in a while
        assert (compiled.criterion == plain.criterion).float().mean() > 0.98
    for name in ("logps", "ref_logps", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(compiled_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-3 * theirs.abs().max().item())


def test_no_tensor_over_tokens_and_vocabulary_is_made():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            nonlocal largest
            result = function(*arguments, **(named or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    tokens, vocabulary, size = 100, 200, 8
    hidden, policy, ref_hidden, reference, labels = random_problem(tokens, vocabulary, size)
    policy.weight.requires_grad_()
    with Watch():
        score_tokens(hidden, policy, ref_hidden, reference, labels, 0.1).logps.sum().backward()
    assert largest <= vocabulary * size < tokens * vocabulary


@pytest.mark.parametrize("device", DEVICES)
def test_token_kl_equals_the_sum_over_the_vocabulary(device):
    hidden, policy, ref_hidden, reference, _ = random_problem(device=device, softcap=4.0)
    log_p = full_logits(hidden, policy).log_softmax(-1)
    log_q = full_logits(ref_hidden, reference).log_softmax(-1)
    torch.testing.assert_close(
        token_kl(hidden, policy, ref_hidden, reference), (log_p.exp() * (log_p - log_q)).sum(dim=1)
    )
    assert torch.count_nonzero(token_kl(hidden, policy, hidden, policy)) == 0


def test_steps_by_hand():
    #             pair:  0     1     2     3     4
    chosen = [
        [-1.0, -1.0, -1.0, -1.0, -1.0],  # under z
        [-0.9, -1.1, -1.0, -0.9, -0.9],  # under z + εd
        [-1.1, -0.9, -1.0, -0.9, -1.0],  # under z - εd
    ]
    rejected = [[-2.0] * 5] * 3
    criterion = torch.cat([torch.tensor(chosen), torch.tensor(rejected)], dim=1)
    # Rising, falling, flat, a peak on both sides, rising on one side only: strict monotonicity needs both.
    assert pair_steps(criterion).tolist() == [1, -1, 0, 0, 0]


def test_rounding_turns_small_changes_into_ties():
    """A sum near -128 has a resolution of 1 nat in bfloat16, so a change of 0.2 nats is lost."""
    criterion = torch.tensor([[-128.0, -100.0], [-127.8, -100.0], [-128.2, -100.0]])
    assert pair_steps(criterion).item() == 1
    assert pair_steps(criterion, torch.bfloat16).item() == 0


def test_pair_beta_by_hand():
    beta = pair_beta(0.1, torch.tensor([1, 0, -1]), epsilon_step=0.25)
    torch.testing.assert_close(beta, torch.tensor([0.1 / 1.25, 0.1, 0.1 / 0.75]))


def test_updated_beta_by_hand():
    # Of 8 pairs 4 relax and 2 tighten: the mean step is 1/4; the mean β̃ is (4/1.1 + 2/0.9 + 2)/8.
    assert updated_beta(0.2, 4, 2, 8, 0.1, "mean_step") == pytest.approx(0.2 / 1.025, rel=1e-15)
    assert updated_beta(0.2, 4, 2, 8, 0.1, "mean_beta") == pytest.approx(0.2 * (4 / 1.1 + 2 / 0.9 + 2) / 8, rel=1e-15)


@settings(max_examples=50, deadline=None)
@given(relaxed=st.integers(0, 50), tightened=st.integers(0, 50), tied=st.integers(0, 50))
def test_the_two_update_rules_differ_by_epsilon_squared_times_the_variance(relaxed, tightened, tied):
    pairs = relaxed + tightened + tied
    if pairs == 0:
        return
    epsilon, mean = 1e-3, (relaxed - tightened) / pairs
    variance = (relaxed + tightened) / pairs - mean**2
    ratio = updated_beta(1.0, relaxed, tightened, pairs, epsilon, "mean_beta") / updated_beta(
        1.0, relaxed, tightened, pairs, epsilon, "mean_step"
    )
    assert ratio - 1 == pytest.approx(epsilon**2 * variance, abs=5 * epsilon**3)


def test_loss_by_hand_and_beta_has_no_gradient():
    margin = torch.tensor([2.0, -1.0], requires_grad=True)
    beta = torch.tensor([0.5, 0.1], requires_grad=True)
    losses = dpo_loss(margin, beta)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(0.1))])
    losses.sum().backward()
    assert beta.grad is None
    assert margin.grad.tolist() == pytest.approx([-0.5 / (1 + math.exp(1.0)), -0.1 / (1 + math.exp(-0.1))])
