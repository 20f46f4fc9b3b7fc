"""Runs a module or file, e.g. `epsdpo.train`, with FSDP2 or DeepSpeed on the CPU, which accelerate offers on GPUs only.

    accelerate launch --config_file FILE tests/kit/sharded_on_cpu.py epsdpo.train --config CONFIG

The processes talk over gloo, and accelerate takes them for processes with a GPU each; all else is as users have it.
"""

import os
import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def gloo_for_gpus(self, *_, **__):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo_for_gpus
    sys.argv = sys.argv[1:]
    (runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
