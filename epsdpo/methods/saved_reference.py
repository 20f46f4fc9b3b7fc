"""A reference that is to the policy what it should be: at the start, and where it moves, through checkpoints.

TRL mixes the policy into a moving reference (TR-DPO, arXiv 2404.09656) every `ref_model_sync_steps`, but keeps only the
policy in its checkpoints: a run that is resumed would go back to the first reference. Here it is written beside the
policy and read back.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from epsdpo.methods.heads import require_same_arithmetic
from epsdpo.methods.sharding import computes_as_loaded

FILE = "reference.safetensors"


def hold_to_policy(policy: nn.Module, reference: nn.Module | None, accelerator: Accelerator) -> None:
    """See to it that a policy that has not moved yet is equal to its reference, bit by bit, if its weights are.

    Args:
        policy: as it is before accelerate prepares it for training.
        reference: as TRL has prepared it; None where there is none, or where it is the policy with other adapters.

    Raises:
        ValueError: if the two are computed in different arithmetic, with the remedy.
    """
    if reference is not None:
        policy = policy.get_base_model() if is_peft_model(policy) else policy
        require_same_arithmetic(policy, accelerator.unwrap_model(reference), as_loaded=computes_as_loaded(accelerator))
    elif is_peft_model(policy) and "ref" in policy.peft_config:
        # TRL's copy of the policy's adapter is in float32 whatever the adapter is in, and leaves out what an embedding
        # has of it.
        weights = dict(policy.named_parameters())
        for name, weight in weights.items():
            copy = weights.get(".".join("ref" if part == "default" else part for part in name.split(".")), weight)
            if copy is not weight:
                copy.data = weight.detach().clone()


def require_keepable(accelerator: Accelerator, saves: bool) -> None:
    """Refuse to train with a moving reference where checkpoints could not hold it.

    Raises:
        ValueError: under DeepSpeed ZeRO-3, with the remedy.
    """
    zero3 = (
        accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    if zero3 and saves:
        raise ValueError(
            "sync_ref_model=True moves the reference, and under DeepSpeed ZeRO-3 it cannot be kept in checkpoints, so "
            "that a resumed run would be another one. Use configs/accelerate/fsdp2.yaml or --zero_stage 2, or set "
            "save_strategy: 'no'"
        )


def reshard(reference: nn.Module) -> None:
    """Make the reference's weights shards again where FSDP2 has left them whole, as the policy's are after a step.

    It does so outside the layers, for a backward pass that a reference never has.
    """
    for module in reference.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_reference(reference: nn.Module, accelerator: Accelerator, folder: Path) -> None:
    """Write the reference's weights into a checkpoint's folder; every process must call it."""
    model = accelerator.unwrap_model(reference)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options) if accelerator.is_fsdp2 else model.state_dict()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        # Tied weights once more each: a file of tensors that share memory would be refused.
        save_file({name: value.detach().cpu().clone() for name, value in weights.items()}, folder / FILE)


def load_reference(reference: nn.Module, accelerator: Accelerator, folder: Path) -> None:
    """Give the reference the weights that `save_reference` wrote; every process must call it.

    Raises:
        ValueError: if the checkpoint holds no reference, with the remedy.
    """
    if not (folder / FILE).exists():
        raise ValueError(
            f"{folder} holds no {FILE}, though sync_ref_model=True: the run that wrote it did not keep its moving "
            "reference, and cannot be continued. Start without resume_from_checkpoint"
        )
    model, weights = accelerator.unwrap_model(reference), load_file(folder / FILE)
    if accelerator.is_fsdp2:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        return
    with torch.no_grad():
        model.load_state_dict(weights)
