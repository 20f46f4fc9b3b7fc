"""The rounded criterion against models' own forward in bfloat16 and the released code's formulas on their logits.

Heads that do more than a product round after each operation: soft-capping, a factor, a divisor, a bias.
"""

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
    RecurrentGemmaConfig,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.methods.heads import expose_hidden_states, head_of
from epsdpo.methods.kernels import ARITHMETICS, Head
from epsdpo.paper.frozen import decisions_at

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
}
EPSILONS = (0.01, 0.05, 0.2)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """A policy and a reference in bfloat16 that is a perturbed copy, with logits that reach into the cap's bend."""
    config_class, settings = FAMILIES[request.param]
    config = config_class(**{**SIZES, **settings})
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_config(config).bfloat16().eval() for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            theirs.copy_(ours + 0.03 * torch.randn_like(ours))
        if policy.get_output_embeddings().bias is not None:
            for model in (policy, reference):
                model.get_output_embeddings().bias.normal_()
    return policy, reference


@pytest.fixture(scope="module")
def batch(official_pairs):
    return DataCollatorForPreference(pad_token_id=0, max_length=128)(official_pairs.to_list())


def own_logits(model, batch):
    """(2·pairs, sequence - 1, vocabulary) in bfloat16, of the model's own forward."""
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


def released_decisions(z, r, batch, epsilon):
    """Eq. 5 as the released code has it on logits in bfloat16: every operation in that dtype."""
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:].bool()

    def log_ratio(logits):
        per_token = logits.log_softmax(-1).gather(2, labels).squeeze(2)
        chosen, rejected = (per_token * mask).sum(-1).chunk(2)
        return chosen - rejected

    now = log_ratio(z)
    lowered, raised = log_ratio((1 + epsilon) * z - epsilon * r), log_ratio((1 - epsilon) * z + epsilon * r)
    return ((lowered > now) & (now > raised)).long() - ((lowered < now) & (now < raised)).long()


def test_decisions_are_those_of_the_formulas_on_the_models_own_logits(models, batch):
    policy, reference = models
    z, r = own_logits(policy, batch), own_logits(reference, batch)
    assert z.dtype == torch.bfloat16
    for model in models:
        expose_hidden_states(model)
    decided = decisions_at(policy, reference, batch, EPSILONS, ARITHMETICS["bfloat16"])
    for epsilon, decisions in zip(EPSILONS, decided, strict=True):
        expected = released_decisions(z, r, batch, epsilon)
        assert decisions.tolist() == expected.tolist()
    assert 0 < expected.count_nonzero() < len(expected) == 96  # there are ties and steps to tell apart


def test_rounded_logits_are_the_models_own(models, batch):
    """But for those where another order of the product's sum rounds otherwise; the exact ones are no more than near."""
    policy, _ = models
    with torch.no_grad():
        hidden = policy.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state[:, :-1]
        exact, rounded = head_of(policy).exact_and_rounded_logits(hidden[0], slice(0, 355), torch.bfloat16)
    own = own_logits(policy, batch)[0]
    assert (rounded == own).float().mean() > 0.9999
    torch.testing.assert_close(exact, own.float(), rtol=0.02, atol=0.02)
    if policy.config.model_type not in ("llama", "phi"):
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
    _, rounded = head.exact_and_rounded_logits(hidden, slice(0, 355), torch.bfloat16)
    equal = (rounded == logits).float().mean()
    assert equal > 0.9999 if left_out is None else equal < 0.9
