"""What FSDP2 and DeepSpeed change about the models of a run, and what is done so that the run stays the same.

accelerate and TRL share out policy and reference between processes, in ways that would change numbers or files.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

HALF_PRECISION = (torch.bfloat16, torch.float16)


def keep_results_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 hand over results as they are and sum gradients in float32, whatever the mixed precision.

    Raises:
        ValueError: for FSDP1, which keeps a layer's weights in one flat tensor where no head can be found.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: ε-DPO needs FSDP2. Set fsdp_version: 2 in the file given to "
            "`accelerate launch`, as in configs/accelerate/fsdp2.yaml"
        )
    if plugin.mixed_precision_policy is not None:
        # accelerate's own policy would round log-probabilities to bfloat16 on their way out of the model, where the
        # criterion compares their last digits, and micro-batches would add up in bfloat16.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def share_out_reference(reference: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Under FSDP2, shard the reference as accelerate shards the policy; otherwise hand it back as it is.

    TRL would make it one single shard: each process would hold the whole reference during every forward, its head
    would be gone when the policy's turn comes, and with `fsdp_cpu_ram_efficient_loading` all processes but the first
    would compute with weights that were never loaded.
    """
    if not accelerator.is_fsdp2 or isinstance(reference, FSDPModule):
        return reference
    # Frozen, because accelerate keeps float32 masters of weights that are trained.
    return fsdp2_prepare_model(accelerator, reference.requires_grad_(False)).eval()


def begin_sharded_training(model: PreTrainedModel) -> None:
    """Under FSDP2, let torch look at the policy's shards while its adapters are trained, and at its head.

    torch 2.13 looks at them when a model first runs, and once. With PEFT that is as the reference, whose adapters are
    frozen, so that the precision of their gradients would be lost. A head that is no shard together with the last norm
    never runs, as the loss takes its weight alone; gradients of micro-batches are added up where it was whole before.
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
            head.reshard()


def computes_as_loaded(accelerator: Accelerator) -> bool:
    """Whether a model is computed in the dtype it was loaded in; else it is cast to that of the mixed precision."""
    cast = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return not cast or accelerator.mixed_precision == "no"


def warn_of_lost_updates(model: PreTrainedModel, accelerator: Accelerator, learning_rate: float) -> None:
    """Say so where half-precision weights are trained without float32 masters, as one process and DDP train them.

    A weight in bfloat16 moves by 0.4 % of itself or not at all, and a step of AdamW is about the learning rate. In a
    tiny model at 7e-7, 10 steps changed 0.2 % of the weights, and 83 % with masters, which FSDP2 and DeepSpeed keep.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    halves = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype in HALF_PRECISION]
    if halves:
        logger.warning(
            "the model is trained in %s without float32 masters of its weights: at learning_rate=%g most updates are "
            "too small to change a weight. Load it in float32 (model.dtype: float32, with bf16: true), or start it by "
            "`accelerate launch --config_file configs/accelerate/fsdp2.yaml`, which keeps masters; on one GPU add "
            "--num_processes 1",
            str(halves[0].dtype).removeprefix("torch."),
            learning_rate,
        )


def sharding_of(accelerator: Accelerator) -> str:
    """How checkpoints of this run are laid out, in words; only a run of which the same is said can read them."""
    if accelerator.is_fsdp2:
        return f"FSDP2 with {accelerator.state.fsdp_plugin.state_dict_type.name}"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed reads the states of its optimiser back only into as many shards as it wrote.
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"DeepSpeed ZeRO-{stage} on {accelerator.num_processes} processes"
    return "whole weights in each process (one process, or DDP on any number)"


@contextmanager
def saved_whole(accelerator: Accelerator) -> Iterator[None]:
    """Within the block a model under FSDP2 is saved with whole weights, also where checkpoints are made of shards."""
    if not accelerator.is_fsdp2:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    of_checkpoints = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(of_checkpoints)


def as_loaded(
    weights: dict[str, torch.Tensor], model: PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Gathered weights as one process would save them: in the dtypes they were loaded in, and tied ones once.

    Args:
        weights: name -> whole tensor; empty in processes that do not write.
        dtypes: name -> dtype, from before accelerate made float32 masters of them.
    """
    tied = getattr(model, "all_tied_weights_keys", {})  # name -> name of the weight that it shares
    return {
        name: value.to(dtypes.get(name, value.dtype))
        for name, value in weights.items()
        if name not in tied or not torch.equal(value, weights[tied[name]])
    }
