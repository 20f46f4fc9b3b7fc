"""How many bytes one process allocates, from a `Setting` alone.

Weights are counted exactly, on torch's meta device; activations tensor by tensor for a Llama-like layer. Left out are
the interpreter and its libraries (about 1 GiB), what an allocator loses in gaps, offloading, and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

from epsdpo.methods.kernels import (
    TOKENS_PER_TILE,
    TOKENS_PER_TILE_ON_CPU,
    VOCABULARY_PER_TILE,
    VOCABULARY_PER_TILE_ON_CPU,
)
from epsdpo.train.memory.setting import FLOAT32, Setting, Sharding

# DeepSpeed's defaults, in elements: `reduce_bucket_size` and `stage3_max_live_parameters`.
_ZERO_BUCKET, _ZERO3_LIVE = 500_000_000, 1_000_000_000

# Optimiser -> (tensors of the size of the weights, bytes per element; None: as the weights). Any other is counted as
# AdamW, which few exceed. Adafactor keeps rows and columns only.
_OPTIMISER_STATE = {
    "sgd": (0, None),
    "adafactor": (0, None),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "lion_32bit": (1, FLOAT32),
    "lion_8bit": (1, 1),
    "adamw_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
    "paged_adamw_32bit": (2, FLOAT32),
}
_ADAMW_STATE = (2, None)

# Tiles of tokens × vocabulary in float32 that the kernels have at once. Forward: both models' logits and the shift
# between them, in whose places everything else is computed. Backward: the logits, in whose place their gradient is.
_FORWARD_TILES, _BACKWARD_TILES = 3, 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in one process. Some are held all the time; the rest at one moment of an optimiser step.

    Attributes:
        policy, reference, optimiser: weights and optimiser state as this process keeps them.
        buffers: in which gradients travel between processes.
        gradients: of all trainable weights; `gradients_held` says whether they outlive a forward pass, which they do
            when several passes accumulate.
        gathered_reference, gathered_policy: weights of others, fetched for the reference's and the policy's pass.
        activations: kept from the policy's forward pass for its backward pass.
        head: tiles and gradients of the pass over both heads.
        layer_backward: what the backward pass needs while it is in one layer, recomputed activations included.
        embedding: the gradient that a tied embedding gets as an embedding, until it is added to that of the head.
        update: temporaries of the optimiser step.
    """

    policy: int
    reference: int
    optimiser: int
    buffers: int
    gradients: int
    gradients_held: bool
    gathered_reference: int
    gathered_policy: int
    activations: int
    head: int
    layer_backward: int
    embedding: int
    update: int

    @property
    def moments(self) -> dict[str, int]:
        """What is allocated at each of the moments that can be the highest."""
        held = self.policy + self.reference + self.optimiser + self.buffers
        held_gradients = self.gradients if self.gradients_held else 0
        return {
            "reference's pass": held + held_gradients + self.gathered_reference,
            "pass over the heads": held + held_gradients + self.gathered_policy + self.activations + self.head,
            "policy's backward pass": (
                held + held_gradients + self.gathered_policy + self.activations + self.layer_backward
            ),
            "end of the backward pass": held + self.gradients + self.embedding,
            "optimiser step": held + self.gradients + self.update,
        }

    @property
    def peak(self) -> int:
        """The most that is allocated at once, in bytes."""
        return max(self.moments.values())


def estimate_memory(setting: Setting) -> MemoryEstimate:
    """What one process of a run with this setting allocates, in bytes, from its second optimiser step on."""
    model, sharding = setting.model, setting.sharding
    frozen = model.parameters - model.trainable
    # DeepSpeed trains a copy in half precision and keeps float32 in the optimiser; accelerate has FSDP keep trainable
    # weights in float32; PEFT keeps adapters in float32.
    frozen_bytes = trainable_bytes = setting.weight_bytes
    if setting.mixed_precision and sharding.deepspeed:
        frozen_bytes = trainable_bytes = 2
    elif model.adapted or (setting.mixed_precision and sharding.kind == "FSDP"):
        trainable_bytes = FLOAT32
    masters = setting.mixed_precision and sharding.deepspeed
    state_tensors, state_bytes = _OPTIMISER_STATE.get(setting.optim, _ADAMW_STATE)
    state = state_tensors * (state_bytes or (FLOAT32 if masters else trainable_bytes)) + FLOAT32 * masters
    weights = frozen * frozen_bytes + model.trainable * trainable_bytes
    reference = 0 if model.adapted or not setting.has_reference else model.parameters * frozen_bytes
    gradients = model.trainable * trainable_bytes
    return MemoryEstimate(
        policy=int(weights * sharding.share("weights")),
        reference=int(reference * sharding.share("weights")),
        optimiser=int(model.trainable * state * sharding.share("optimiser")),
        buffers=_buffers(sharding, gradients, trainable_bytes),
        gradients=int(gradients * sharding.share("gradients")),
        gradients_held=setting.accumulation > 1,
        gathered_reference=_gathered_reference(setting, reference),
        gathered_policy=_gathered_policy(setting),
        activations=_activations(setting),
        head=_head_pass(setting),
        layer_backward=_layer_backward(setting),
        embedding=model.vocabulary * model.hidden * trainable_bytes if model.trains_head and model.tied else 0,
        update=_update(setting, gradients),
    )


def _buffers(sharding: Sharding, gradients: int, gradient_bytes: int) -> int:
    """Where gradients wait for the other processes."""
    if sharding.kind == "DDP":
        return gradients  # torch's buckets are a second copy
    return _ZERO_BUCKET * gradient_bytes if sharding.deepspeed else 0


def _gathered_reference(setting: Setting, reference: int) -> int:
    """Weights of other processes that the reference's pass needs whole."""
    if setting.sharding.kind == "FSDP":
        return min(reference, _gathered_by_fsdp(setting))
    return min(reference, _ZERO3_LIVE * setting.compute_bytes) if setting.sharding.kind == "ZeRO-3" else 0


def _gathered_policy(setting: Setting) -> int:
    """Weights of other processes that the policy's pass needs whole, and both heads, which it needs for longer."""
    model, sharding, compute = setting.model, setting.sharding, setting.compute_bytes
    if sharding.kind == "FSDP":
        return _gathered_by_fsdp(setting) + model.vocabulary * model.hidden * setting.weight_bytes
    if sharding.kind == "ZeRO-3":
        return min(model.parameters, _ZERO3_LIVE) * compute + 2 * model.vocabulary * model.hidden * compute
    if setting.mixed_precision and setting.weight_bytes == FLOAT32 and not sharding.deepspeed:
        return (model.parameters - model.outside_layers) * compute  # autocast keeps the copies it makes
    return 0


def _gathered_by_fsdp(setting: Setting) -> int:
    """What lies outside the layers, and the layer at work with the one fetched ahead of it, or all of them."""
    model = setting.model
    layers = 2 * model.layer if setting.sharding.reshards else model.parameters - model.outside_layers
    return (model.outside_layers + layers) * setting.compute_bytes


def _activations(setting: Setting) -> int:
    """Tensors that the policy's forward pass keeps: whole layers, or with checkpointing their inputs only."""
    tokens = setting.sequences * setting.tokens
    layer_input = tokens * setting.model.hidden * setting.stream_bytes
    layer = layer_input if setting.checkpointing else tokens * _layer_bytes_per_token(setting)
    last_norm = tokens * setting.model.hidden * (FLOAT32 + 2 * setting.stream_bytes)
    return setting.model.layers * layer + last_norm


def _layer_backward(setting: Setting) -> int:
    """One layer's recomputed activations, the gradients inside it, and the head's gradient, which came first."""
    model, tokens = setting.model, setting.sequences * setting.tokens
    gradients = tokens * 2 * (model.intermediate * setting.compute_bytes + model.hidden * setting.stream_bytes)
    recomputed = tokens * _layer_bytes_per_token(setting) if setting.checkpointing else 0
    head = model.vocabulary * model.hidden * setting.weight_bytes if model.trains_head else 0
    return gradients + recomputed + head


def _layer_bytes_per_token(setting: Setting) -> int:
    """What one layer keeps per token: two norms, attention, and an MLP with a gate, as in Llama."""
    model, compute = setting.model, setting.compute_bytes
    # A norm keeps its input in float32, the normalised input, and its output as the next product's input.
    norms = 2 * model.hidden * (FLOAT32 + setting.stream_bytes + compute)
    width = model.heads * model.head_size
    if setting.attention.startswith("flash"):
        attention = 2 * width + 2 * model.key_value_heads * model.head_size
    else:
        # Batches are padded, and with a mask transformers repeats keys and values for every head.
        attention = 4 * width
    attention *= compute
    if setting.attention == "eager":
        attention += model.heads * setting.tokens * (FLOAT32 if compute == FLOAT32 else FLOAT32 + compute)
    elif setting.attention == "sdpa":
        attention += setting.tokens * compute  # the mask, made anew for each layer
    # Gate, its activation, the other branch and their product.
    return norms + attention + 4 * model.intermediate * compute


def _head_pass(setting: Setting) -> int:
    """The larger of the forward and the backward pass of the kernels over both heads."""
    if not setting.tiled_head:
        return _whole_logits(setting)
    model, tokens = setting.model, setting.sequences * setting.completion_tokens
    on_cpu = setting.device == "cpu"
    columns = min(model.vocabulary, VOCABULARY_PER_TILE_ON_CPU if on_cpu else VOCABULARY_PER_TILE)
    tile = min(tokens, TOKENS_PER_TILE_ON_CPU if on_cpu else TOKENS_PER_TILE) * columns * FLOAT32
    hidden = 2 * tokens * model.hidden * setting.compute_bytes  # of policy and reference
    weight_tile = columns * model.hidden * FLOAT32
    cast = weight_tile if min(setting.compute_bytes, setting.weight_bytes) < FLOAT32 else 0
    forward = _FORWARD_TILES * tile + cast
    backward = _BACKWARD_TILES * tile + cast + tokens * model.hidden * FLOAT32
    if model.trains_head:
        # Summed in float32 for one tile at a time.
        backward += weight_tile + model.vocabulary * model.hidden * setting.weight_bytes
    return hidden + max(forward, backward)


def _whole_logits(setting: Setting) -> int:
    """Logits of all tokens and their gradient, and in float32 those of the chosen half with its log-softmax."""
    logits = setting.sequences * setting.tokens * setting.model.vocabulary
    return 2 * logits * setting.compute_bytes + logits * FLOAT32


def _update(setting: Setting, gradients: int) -> int:
    if setting.sharding.deepspeed and setting.mixed_precision:
        return int(setting.model.trainable * FLOAT32 * setting.sharding.share("optimiser"))  # gradients in float32
    # torch's AdamW takes the roots of all second moments at once on a GPU, unless fused.
    at_once = setting.optim == "adamw_torch" and setting.device != "cpu"
    return int(gradients * setting.sharding.share("optimiser")) if at_once else 0
