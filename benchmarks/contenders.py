"""The losses that `step_cost.py` compares: DPO as others compute it and on full logits, and ε-DPO in two ways.

Each contender turns a batch of one pair into a loss, on the same models. How time and memory are measured is left to
`step_cost.py`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer

BETA, EPSILON = 0.1, 0.01
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """A model's shape, and the lengths of the two sequences of a pair, in tokens."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str
    lengths: tuple[int, ...]
    optimizer: bool  # whether a step ends in AdamW's update


SETTINGS = {
    # Small enough for any CPU, with the vocabulary of Llama 3, so that the head is what counts.
    "cpu": Setting(256, 688, 2, 4, 4, 128_256, "float32", (512, 2048), optimizer=False),
    # The head of Llama-3-8B on two of its layers.
    "llama3_8b_head": Setting(4096, 14_336, 2, 32, 8, 128_256, "bfloat16", (512, 2048), optimizer=False),
    # Llama-3.2-1B, whole, with AdamW: what a user waits for.
    "llama_1b_training": Setting(2048, 8192, 16, 32, 8, 128_256, "bfloat16", (512, 2048), optimizer=True),
    # A fifth of the head's cost and a whole benchmark in minutes: what `make paper-mini` has time for.
    "mini": Setting(256, 688, 2, 4, 4, 32_000, "float32", (256,), optimizer=False),
    # SmolLM2-135M, whose head is a fifth of the arithmetic at 256 tokens: as much as in models that are trained.
    "smollm2_135m": Setting(576, 1536, 30, 9, 3, 49_152, "float32", (256,), optimizer=False),
    # For the tests of this benchmark.
    "tiny": Setting(16, 32, 1, 2, 2, 300, "float32", (16,), optimizer=True),
}


def build_models(setting: Setting, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and reference with random weights, a little apart from each other."""
    torch.manual_seed(0)
    with device:
        policy = LlamaForCausalLM(llama_config(setting)).to(getattr(torch, setting.dtype))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return policy, reference


def llama_config(setting: Setting) -> LlamaConfig:
    """A Llama of the setting's shape."""
    return LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        max_position_embeddings=max(setting.lengths),
        tie_word_embeddings=True,
        dtype=setting.dtype,
    )


def one_pair(setting: Setting, length: int) -> dict[str, list[int]]:
    """Random tokens; prompt and response together have `length` tokens on both sides."""
    generator = torch.Generator().manual_seed(length)
    prompt, chosen, rejected = (
        torch.randint(3, setting.vocabulary, (size,), generator=generator).tolist()
        for size in (PROMPT_TOKENS, length - PROMPT_TOKENS, length - PROMPT_TOKENS)
    )
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def trl_dpo(policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int) -> tuple[Any, Loss]:
    """DPO by TRL's own trainer."""

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    trainer = TokenisedDPOTrainer(policy, reference, _arguments(DPOConfig, length), **_data(data))
    return trainer, lambda batch: trainer.compute_loss(trainer.model, batch)


def epsilon_dpo(policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int) -> tuple[Any, Loss]:
    """ε-DPO by this project's trainer."""
    trainer = EpsilonDPOTrainer(policy, reference, _arguments(EpsilonDPOConfig, length, epsilon=EPSILON), **_data(data))
    return trainer, lambda batch: trainer.compute_loss(trainer.model, batch)


def epsilon_dpo_rounded(
    policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int
) -> tuple[Any, Loss]:
    """ε-DPO by this project's trainer, with the criterion in the arithmetic of the published launch."""
    arguments = _arguments(EpsilonDPOConfig, length, epsilon=EPSILON, criterion_dtype="bfloat16")
    trainer = EpsilonDPOTrainer(policy, reference, arguments, **_data(data))
    return trainer, lambda batch: trainer.compute_loss(trainer.model, batch)


def dpo_full_logits(
    policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int
) -> tuple[Any, Loss]:
    """DPO as trl 0.13 computed it, from which the released code departs: two log-softmaxes over whole logits."""
    trainer, _ = trl_dpo(policy, reference, data, length)

    def loss(batch):
        logits, ref_logits = _full_logits(trainer, batch)
        return -F.logsigmoid(BETA * (_log_ratio(logits, batch) - _log_ratio(ref_logits, batch))).mean()

    return trainer, loss


def epsilon_dpo_full_logits(
    policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int
) -> tuple[Any, Loss]:
    """ε-DPO as the released code computes it: four log-softmaxes over whole logits, three of them with a gradient."""
    trainer, _ = trl_dpo(policy, reference, data, length)

    def loss(batch):
        logits, ref_logits = _full_logits(trainer, batch)
        current = _log_ratio(logits, batch)
        lowered = _log_ratio((1 + EPSILON) * logits - EPSILON * ref_logits, batch)
        raised = _log_ratio((1 - EPSILON) * logits + EPSILON * ref_logits, batch)
        relax = (lowered > current) & (current > raised)
        tighten = (lowered < current) & (current < raised)
        beta = BETA / (1 + EPSILON * (relax.int() - tighten.int()))
        return -F.logsigmoid(beta * (current - _log_ratio(ref_logits, batch))).mean()

    return trainer, loss


def _full_logits(trainer: DPOTrainer, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of policy and reference for every next token, (2·pairs, sequence - 1, vocabulary) each."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with torch.no_grad():
        ref_logits = trainer.ref_model(**inputs).logits[:, :-1]
    return trainer.model(**inputs).logits[:, :-1], ref_logits


def _log_ratio(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log π(chosen) - log π(rejected) of each pair, (pairs,)."""
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    logps = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    chosen, rejected = (logps * mask).sum(dim=1).chunk(2)
    return chosen - rejected


def liger_dpo(policy: PreTrainedModel, reference: PreTrainedModel, data: Dataset, length: int) -> tuple[Any, Loss]:
    """DPO by Liger's fused linear loss, called by hand: TRL 1.16 has no way to it any more."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    trainer, _ = trl_dpo(policy, reference, data, length)
    fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=trainer.accelerator.device.type == "cuda")

    def loss(batch):
        labels = batch["input_ids"][:, 1:].masked_fill(batch["completion_mask"][:, 1:] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        with torch.no_grad():
            ref_hidden = trainer.ref_model.model(**inputs).last_hidden_state[:, :-1]
        hidden = trainer.model.model(**inputs).last_hidden_state[:, :-1]
        value, _ = fused(
            trainer.model.lm_head.weight,
            hidden,
            labels,
            ref_input=ref_hidden,
            ref_weight=trainer.ref_model.lm_head.weight,
        )
        return value

    return trainer, loss


CONTENDERS = {
    "DPO, TRL": trl_dpo,
    "DPO, Liger's fused loss": liger_dpo,
    "DPO, full logits": dpo_full_logits,
    "ε-DPO, full logits": epsilon_dpo_full_logits,
    "ε-DPO, epsdpo": epsilon_dpo,
}
# Beside these on a GPU, where recipes of the paper will run.
OURS_ROUNDED = {"ε-DPO, epsdpo, bfloat16 criterion": epsilon_dpo_rounded}
PEER, OURS = "DPO, TRL", "ε-DPO, epsdpo"


def _arguments(kind: type, length: int, **keys: Any) -> Any:
    on_cpu = not torch.cuda.is_available()
    return kind(
        output_dir=tempfile.mkdtemp(prefix="epsdpo-benchmark-"),
        beta=BETA,
        max_length=length,
        per_device_train_batch_size=1,
        bf16=False,  # the weights' own dtype decides
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        **keys,
    )


def _data(data: Dataset) -> dict[str, Any]:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return {"train_dataset": data, "processing_class": tokenizer}
