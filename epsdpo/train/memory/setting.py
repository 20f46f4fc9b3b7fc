"""What decides how much memory a run needs: the model's shape, the batch, precision and sharding.

They are stated in a model's config, in the trainer's arguments, in the prepared pairs and in the environment that
`accelerate launch` makes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import PretrainedConfig

from epsdpo.methods.loading import empty_model
from epsdpo.methods.method_config import MethodConfig, accumulation_steps

FLOAT32 = 4  # bytes
DTYPE_BYTES = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}

# What one process of several keeps only its share of.
_SHARED_OUT = {
    "none": (),
    "DDP": (),
    "ZeRO-1": ("optimiser",),
    "ZeRO-2": ("optimiser", "gradients"),
    "ZeRO-3": ("optimiser", "gradients", "weights"),
    "FSDP": ("optimiser", "gradients", "weights"),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model; counts are of parameters, tied ones counted once.

    Attributes:
        parameters: all; with PEFT also the adapters.
        trainable: those with a gradient; `trains_head` says whether the output head is among them.
        layer: of the largest layer; `layers` is their number.
        outside_layers: embeddings, head and last norm.
        adapted: whether PEFT adapters are trained, so that the reference needs no weights of its own.
        hidden, intermediate, heads, head_size, key_value_heads, vocabulary: widths, as in the model's config.
    """

    parameters: int
    trainable: int
    layer: int
    layers: int
    outside_layers: int
    adapted: bool
    trains_head: bool
    hidden: int
    intermediate: int
    heads: int
    head_size: int
    key_value_heads: int
    vocabulary: int

    @property
    def tied(self) -> bool:
        """Whether the output head's weights are the embedding's."""
        return self.outside_layers < 2 * self.vocabulary * self.hidden

    @classmethod
    def of(cls, config: PretrainedConfig, peft_config: PeftConfig | None = None) -> ModelShape:
        """Measure the model that `config` describes, with adapters if `peft_config` is given."""
        model = empty_model(config)
        kinds, head = set(model._no_split_modules or ()), model.get_output_embeddings()
        if peft_config is not None:
            with torch.device("meta"):
                model = get_peft_model(model, peft_config)
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        counts = [_count(layer) for layer in layers] or [_count(model)]
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 1  # a model without attention has none
        intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
        return cls(
            parameters=_count(model),
            trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            layer=max(counts),
            layers=text.num_hidden_layers,
            outside_layers=_count(model) - sum(counts),
            adapted=peft_config is not None,
            trains_head=head is not None and any(parameter.requires_grad for parameter in head.parameters()),
            hidden=text.hidden_size,
            intermediate=intermediate or 4 * text.hidden_size,
            heads=heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            vocabulary=text.vocab_size,
        )


@dataclass(frozen=True)
class Sharding:
    """What processes share out between them: `kind` is a key of `_SHARED_OUT`.

    `reshards` is false where FSDP keeps gathered weights until the backward pass.
    """

    kind: str = "none"
    processes: int = 1
    reshards: bool = True

    def share(self, part: str) -> float:
        """The part of weights, gradients or optimiser state that one process holds: 1 or 1 / processes."""
        return 1 / self.processes if part in _SHARED_OUT[self.kind] else 1.0

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("ZeRO")

    @classmethod
    def of_launch(cls, args: MethodConfig) -> Sharding:
        """How the running processes were started: by `accelerate launch`, or by keys of `args` itself."""
        if args.deepspeed_plugin is not None:
            stage = args.deepspeed_plugin.zero_stage
            return cls(f"ZeRO-{stage}" if stage else "DDP", args.world_size)
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            return cls("FSDP", args.world_size, reshards=_fsdp_key(args, "reshard_after_forward") != "false")
        return cls("DDP" if args.world_size > 1 else "none", args.world_size)


@dataclass(frozen=True)
class Setting:
    """Everything that decides how much memory a process takes.

    Attributes:
        weight_bytes: bytes per weight as the model is loaded.
        mixed_precision: whether `bf16` or `fp16` is on.
        pairs: per process and forward pass; `accumulation` is how many passes make an optimiser step.
        tokens: of the longest sequence (prompt and completion); `completion_tokens` those of the longest completion.
        attention: transformers' `attn_implementation`.
        device: torch's device type.
        has_reference: whether a second copy of the model is needed.
        tiled_head: whether logits are made in tiles; otherwise they are whole for all tokens of a forward pass.
    """

    model: ModelShape
    weight_bytes: int
    mixed_precision: bool
    optim: str
    pairs: int
    accumulation: int
    tokens: int
    completion_tokens: int
    checkpointing: bool
    attention: str
    device: str = "cuda"
    sharding: Sharding = Sharding()
    has_reference: bool = True
    tiled_head: bool = True

    @classmethod
    def of_run(cls, model: ModelShape, args: MethodConfig, data: Dataset) -> Setting:
        """The setting of a run with `args` on tokenised pairs; dtype and attention are those of `model_init_kwargs`."""
        tokens, completion_tokens = longest_pair(data, args.max_length)
        return cls.of_arguments(
            model, args, tokens, completion_tokens, device=args.device.type, sharding=Sharding.of_launch(args)
        )

    @classmethod
    def of_arguments(
        cls,
        model: ModelShape,
        args: MethodConfig,
        tokens: int,
        completion_tokens: int,
        *,
        device: str,
        sharding: Sharding,
    ) -> Setting:
        """The setting on another machine than this one: `device` and `sharding` are what it will have."""
        pairs = args.per_device_train_batch_size // args.rows_per_pair
        return cls(
            model=model,
            weight_bytes=DTYPE_BYTES[args.model_init_kwargs["dtype"]],
            mixed_precision=args.bf16 or args.fp16,
            optim=str(args.optim.value),
            pairs=pairs,
            accumulation=accumulation_steps(args.global_batch_size, pairs, sharding.processes),
            tokens=tokens,
            completion_tokens=completion_tokens,
            checkpointing=args.activation_checkpointing or _fsdp_key(args, "activation_checkpointing") == "true",
            attention=args.model_init_kwargs["attn_implementation"],
            device=device,
            sharding=sharding,
            has_reference=args.has_reference,
            tiled_head=args.tiled_head,
        )

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass: a chosen and a rejected one for each pair."""
        return 2 * self.pairs

    @property
    def compute_bytes(self) -> int:
        """Bytes per number of a matrix product."""
        return 2 if self.mixed_precision else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes per number of the sum of residuals, which mixed precision leaves in the precision of the weights."""
        return self.weight_bytes


def longest_pair(data: Dataset, max_length: int | None) -> tuple[int, int]:
    """Tokens of the longest sequence and of the longest completion in tokenised pairs, cut to `max_length`."""
    sequence = completion = 0
    for rows in data.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow").iter(10_000):
        prompt, chosen, rejected = (pc.list_value_length(column) for column in rows.columns)
        longer = pc.max_element_wise(chosen, rejected)
        completion = max(completion, pc.max(longer).as_py())
        sequence = max(sequence, pc.max(pc.add(prompt, longer)).as_py())
    limit = max_length or sequence
    return min(sequence, limit), min(completion, limit)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fsdp_key(args: MethodConfig, name: str) -> str:
    """A key of FSDP, which the trainer's arguments or accelerate's environment may state; "" if neither does."""
    value = (args.fsdp_config or {}).get(name, os.environ.get(f"FSDP_{name.upper()}", ""))
    return str(value).lower()
