"""How a causal language model splits into backbone and head.

The conventions of transformers and TRL are gathered here: logit scaling, soft-capping, sharded weights, autocast.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from epsdpo.methods.kernels import Head


def expose_hidden_states(model: PreTrainedModel) -> None:
    """Let `model(..., on_hidden_states=f)` return `f(hidden_states, model)` in place of logits.

    `f` gets the backbone's last hidden states (batch, sequence, hidden) and the causal language model itself. It runs
    inside the model's own forward, so that whatever wraps the model (DDP, FSDP, DeepSpeed, PEFT, autocast) has its
    parameters ready and sees its gradients. Without the argument the forward is what it was.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, on_hidden_states: Callable | None = None, **kwargs: Any) -> Any:
        if on_hidden_states is None:
            return original_forward(*args, **kwargs)
        hidden_states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        # A linear layer would cast its input here; the kernel computes outside autocast, so it is done by hand.
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return on_hidden_states(hidden_states, self)

    model.forward = types.MethodType(forward, model)


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, whole even where FSDP2 or ZeRO-3 keeps it in shards."""
    embedding = model.get_output_embeddings()
    bias = getattr(embedding, "bias", None)
    config = model.config.get_text_config()
    return Head(
        weight=_unsharded(embedding.weight),
        bias=None if bias is None else _unsharded(bias),
        softcap=_first(config, "final_logit_softcapping", "logits_soft_cap"),
        **_scaling(config),
        gathered=functools.partial(maybe_gather_lm_head_ctx, embedding.weight, bias),
    )


def round_rotary_frequencies(model: PreTrainedModel) -> None:
    """Round a model's rotary frequencies to bfloat16, in place, as DeepSpeed 0.16 did with every buffer of a model.

    They are no part of the weights that are saved.

    Raises:
        ValueError: if the model has none.
    """
    buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2].endswith("inv_freq")]
    if not buffers:
        raise ValueError(
            f"round_rotary_frequencies is true, and {type(model).__name__} has no rotary frequencies (buffers called "
            "inv_freq). Leave it false"
        )
    for buffer in buffers:
        buffer.copy_(buffer.bfloat16())


def require_separable_head(model: PreTrainedModel) -> None:
    """Refuse a model whose backbone and head cannot be run one after the other.

    Raises:
        ValueError: naming the model class and what it lacks.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; ε-DPO here needs a decoder-only causal language model")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"{name} has no separate backbone and output head; use an AutoModelForCausalLM class")


def require_same_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel | None = None) -> None:
    """Refuse models whose logits cannot be subtracted from each other, as Eqs. 3 and 4 ask for.

    Raises:
        ValueError: naming both sizes.
    """
    if reference is None:
        return
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the policy has {sizes[0]} output tokens and the reference {sizes[1]}. Give both the same vocabulary, "
            "padding included: model.resize_token_embeddings(...)"
        )


def require_same_arithmetic(policy: PreTrainedModel, reference: PreTrainedModel, as_loaded: bool = True) -> None:
    """Refuse to compare models that would differ though their weights are equal, by noise of rounding.

    Args:
        as_loaded: whether they are computed in the dtype they were loaded in.

    Raises:
        ValueError: naming what each has, and the remedy.
    """
    if as_loaded and policy.dtype != reference.dtype:
        raise ValueError(
            f"the policy's weights are in {_name(policy.dtype)} and the reference's in {_name(reference.dtype)}: what "
            "rounding makes of the same weights would count as a difference between the models. Load both in the same "
            "dtype"
        )
    kernels = [model.config._attn_implementation for model in (policy, reference)]
    if type(policy) is type(reference) and kernels[0] != kernels[1]:
        raise ValueError(
            f"the policy's attention is {kernels[0]!r} and the reference's {kernels[1]!r}, which round differently. "
            "Load both with the same attn_implementation"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unsharded(parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # Each process has the gradient of its own pairs; FSDP2 averages such gradients over processes, and so must this.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _scaling(config: Any) -> dict[str, float]:
    """What stands between the head's product and the logits, under each of the names of transformers' models."""
    scale = _first(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is not None:
        return {"scale": float(scale)}
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return {}
    if config.model_type == "hyperclovax":
        return {"scale": float(scaling)}
    return {"divisor": float(scaling), "divides_hidden": config.model_type == "minicpm3"}


def _first(config: Any, *names: str) -> float | None:
    """The first of these settings that a config has and that is not None."""
    return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)
