"""The criterion in each arithmetic against models' own forward and the released code's formulas on their whole logits.

Heads that do more than a product round after each operation: soft-capping, a factor, a divisor, a bias.
"""

import contextlib
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MiniCPM3Config,
    PhiConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.methods.heads import expose_hidden_states, head_of
from epsdpo.methods.kernels import ARITHMETICS, Head, dpo_loss, score_tokens
from epsdpo.methods.record import read_pairs
from epsdpo.paper.frozen import completion_states, decisions_at

SIZES = {
    "vocab_size": 355,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 5.0, "head_dim": 8}),
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 0.3}),
    "minicpm3": (MiniCPM3Config, {"dim_model_base": 11, "num_key_value_heads": 4, **LATENT}),
    "recurrent_gemma": (RecurrentGemmaConfig, {"logits_soft_cap": 5.0, "num_hidden_layers": 3, "head_dim": 8}),
    "phi": (PhiConfig, {}),  # has a bias
    "llama": (LlamaConfig, {}),
    # More rows than the tokenizer has tokens, as Qwen's embeddings have, and tied to the head.
    "qwen2": (Qwen2Config, {"vocab_size": 384, "tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Launch:
    """How the released code is launched to decide in the arithmetic of a `criterion_dtype`."""

    criterion_dtype: str
    weights: torch.dtype
    autocast: bool = False

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()


LAUNCHES = {
    "float32": Launch("float32", torch.float32),
    "bfloat16": Launch("bfloat16", torch.bfloat16),
    "bfloat16_logits": Launch("bfloat16_logits", torch.bfloat16, autocast=True),
    "bfloat16_logits, weights in float32": Launch("bfloat16_logits", torch.float32, autocast=True),
    "float16": Launch("float16", torch.float16),
}
EPSILONS = (0.01, 0.05, 0.2)


@functools.cache
def models_of(family, dtype):
    """A policy and a reference that is a perturbed copy, with logits that reach into the cap's bend."""
    config_class, settings = FAMILIES[family]
    config = config_class(**{**SIZES, **settings})
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_config(config).bfloat16().eval() for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            theirs.copy_(ours + 0.03 * torch.randn_like(ours))
        if policy.get_output_embeddings().bias is not None:
            for model in (policy, reference):
                model.get_output_embeddings().bias.normal_()
    for model in (policy, reference):
        expose_hidden_states(model.to(dtype))
    return policy, reference


@pytest.fixture(scope="module")
def batch(official_pairs):
    return DataCollatorForPreference(pad_token_id=0, max_length=128)(official_pairs.to_list())


def own_logits(model, batch):
    """(2·pairs, sequence - 1, vocabulary) of the model's own forward, in the dtype in which it ends."""
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


def released_decisions(z, r, batch, epsilon):
    """Eq. 5 as the released code has it on whole logits: every operation in their dtype."""
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:].bool()

    def log_ratio(logits):
        per_token = logits.log_softmax(-1).gather(2, labels).squeeze(2)
        chosen, rejected = (per_token * mask).sum(-1).chunk(2)
        return chosen - rejected

    now = log_ratio(z)
    lowered, raised = log_ratio((1 + epsilon) * z - epsilon * r), log_ratio((1 - epsilon) * z + epsilon * r)
    return ((lowered > now) & (now > raised)).long() - ((lowered < now) & (now < raised)).long()


def logits_as_launched(family, launch, batch):
    """Whole logits of policy and reference; under autocast accelerate hands them on in float32."""
    with launch.precision():
        logits = [own_logits(model, batch) for model in models_of(family, launch.weights)]
    assert {each.dtype for each in logits} == {torch.bfloat16 if launch.autocast else launch.weights}
    return [each.float() if launch.autocast else each for each in logits]


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "bfloat16") for family in FAMILIES]
    + [(family, name) for family in ("llama", "qwen2", "gemma2") for name in LAUNCHES if name != "bfloat16"],
)
def test_decisions_are_those_of_the_formulas_on_the_models_own_logits(family, name, batch):
    """And those of other arithmetics are not; but exact ones and those of rounded logits are here too much alike."""
    launch = LAUNCHES[name]
    z, r = logits_as_launched(family, launch, batch)
    expected = [released_decisions(z, r, batch, epsilon).tolist() for epsilon in EPSILONS]
    with launch.precision():
        decided = {
            other: decisions_at(*models_of(family, launch.weights), batch, EPSILONS, arithmetic).tolist()
            for other, arithmetic in ARITHMETICS.items()
        }
    equal = {other for other in decided if decided[other] == expected}
    alike = {"float32", "bfloat16_logits"}
    assert launch.criterion_dtype in equal <= (alike if launch.criterion_dtype in alike else {launch.criterion_dtype})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "bfloat16_logits, weights in float32"),
        ("qwen2", "bfloat16"),
        ("gemma2", "bfloat16"),
        ("gemma2", "bfloat16_logits"),
        ("llama", "float16"),
        ("llama", "float32"),
    ],
)
def test_a_training_decides_so_too(family, name, make_trainer, official_pairs):
    """With learning rate 0, so that every pair meets the same policy; one by one, since padding may round otherwise."""
    launch, pairs = LAUNCHES[name], official_pairs.select(range(24))
    collate = DataCollatorForPreference(pad_token_id=0, max_length=128)
    expected = []
    for row in pairs:
        alone = collate([row])
        expected += released_decisions(*logits_as_launched(family, launch, alone), alone, epsilon=0.2).tolist()
    policy, reference = models_of.__wrapped__(family, launch.weights)
    trainer = make_trainer(
        pairs,
        models={"model": policy, "ref_model": reference},
        criterion_dtype=launch.criterion_dtype,
        epsilon=0.2,
        bf16=launch.autocast,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=12,
        learning_rate=0.0,
        optim="sgd",
        num_train_epochs=1,
    )
    trainer.train()
    record = read_pairs(trainer.args.output_dir).set_index("pair_id")
    assert record["decision"].loc[pairs["pair_id"]].tolist() == expected
    assert len(set(expected)) > 1


def loss_and_gradients(launch, models, batch, log_ratios):
    """Mean loss at β = 0.1 of a batch, and its gradients, from summed log-ratios of policy and reference."""
    policy, reference = models
    policy.zero_grad()
    with launch.precision():
        chosen, rejected = log_ratios(policy, reference, batch).chunk(2)
    loss = dpo_loss(chosen - rejected, torch.tensor(0.1)).mean()
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.float().flatten() for weight in policy.parameters()])


def of_whole_logits(policy, reference, batch):
    """As the released code has them under autocast: logits in bfloat16, lifted to float32."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        r = reference(**inputs).logits[:, :-1].float().log_softmax(-1).gather(2, labels).squeeze(2)
    z = policy(**inputs).logits[:, :-1].float().log_softmax(-1).gather(2, labels).squeeze(2)
    return ((z - r) * mask).sum(1)


def of_the_pass(arithmetic):
    def log_ratios(policy, reference, batch):
        hidden, ref_hidden, labels, mask = completion_states.__wrapped__(policy, reference, batch)
        heads = head_of(policy), head_of(reference)
        with torch.autocast("cpu", enabled=False):
            scores = score_tokens(hidden, heads[0], ref_hidden, heads[1], labels, 0.01, ARITHMETICS[arithmetic])
        per_token = scores.logps - scores.ref_logps.detach()
        return per_token.new_zeros(mask.shape).masked_scatter(mask, per_token).sum(1)

    return log_ratios


@pytest.mark.parametrize("name", ["bfloat16_logits", "bfloat16_logits, weights in float32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_loss_and_gradient_of_rounded_logits_are_those_of_the_models_own(family, name, official_pairs):
    """The loss to float32's rounding; the gradient as near as its own rounding to bfloat16 in the launch permits."""
    launch = LAUNCHES[name]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=128)(official_pairs.select(range(8)).to_list())
    models = models_of.__wrapped__(family, launch.weights)
    loss, gradient = loss_and_gradients(launch, models, batch, of_whole_logits)
    ours, own_gradient = loss_and_gradients(launch, models, batch, of_the_pass("bfloat16_logits"))
    exact, _ = loss_and_gradients(launch, models, batch, of_the_pass("float32"))
    torch.testing.assert_close(ours, loss, rtol=2e-6, atol=0)
    assert (exact - loss).abs() > 1e-5 * loss
    assert (own_gradient - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_logits_are_the_models_own(family, batch):
    """But for those where another order of the product's sum rounds otherwise; the exact ones are no more than near."""
    policy, _ = models_of(family, torch.bfloat16)
    with torch.no_grad():
        hidden = policy.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state[:, :-1]
        exact, rounded = head_of(policy).exact_and_rounded_logits(hidden[0], torch.bfloat16)
    own = own_logits(policy, batch)[0]
    assert (rounded == own).float().mean() > 0.9999
    torch.testing.assert_close(exact, own.float(), rtol=0.02, atol=0.02)
    if family not in ("llama", "phi", "qwen2"):
        assert (exact.bfloat16() == own).float().mean() < 0.99


OPERATIONS = {
    "scale": lambda logits, head: logits * head.scale,
    "divided": lambda logits, head: logits / head.softcap,
    "tanh": lambda logits, head: torch.tanh(logits),
    "multiplied": lambda logits, head: logits * head.softcap,
}


@pytest.mark.parametrize("left_out", [None, "product", "scale", "divided", "tanh"])
def test_no_rounding_is_left_out(left_out):
    """A head that has all operations; where any one of them is not rounded, its logits are others."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((64, 32), (355, 32), (355,)))
    head = Head(weight, bias, scale=0.19611613513818404, softcap=5.0)
    logits = F.linear(hidden.float(), weight.float(), bias.float())  # whose bias is added before rounding
    logits = logits if left_out == "product" else logits.bfloat16()
    for name, operation in OPERATIONS.items():
        logits = operation(logits.float(), head)
        logits = logits if left_out == name else logits.bfloat16()
    _, rounded = head.exact_and_rounded_logits(hidden, torch.bfloat16)
    equal = (rounded == logits).float().mean()
    assert equal > 0.9999 if left_out is None else equal < 0.9
