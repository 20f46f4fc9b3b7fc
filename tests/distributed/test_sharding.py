"""How training is shared out, read from the launch, on which the estimate of memory rests."""

import os
import subprocess

import yaml
from kit.launching import REPOSITORY, launcher

from epsdpo.train.memory import Sharding

LAUNCHED = """
import os, sys
from epsdpo import EpsilonDPOConfig
from epsdpo.train.memory import Sharding
args = EpsilonDPOConfig(sys.argv[1], use_cpu=True, bf16=False)
if args.process_index == 0:
    print(Sharding.of_launch(args))
    del os.environ["ACCELERATE_USE_FSDP"]  # what is left is the environment of configs/accelerate/multi_gpu.yaml
    print(Sharding.of_launch(args))
"""


def test_sharding_is_read_from_the_launch(tmp_path):
    """Two processes that `accelerate launch` starts by the FSDP2 config, on the CPU and without resharding."""
    values = yaml.safe_load((REPOSITORY / "configs" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))
    values |= {"use_cpu": True, "num_processes": 2}
    values["fsdp_config"]["fsdp_reshard_after_forward"] = False
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "launched.py").write_text(LAUNCHED, encoding="utf-8")
    ended = subprocess.run(
        [*launcher(tmp_path / "fsdp2.yaml"), str(tmp_path / "launched.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    expected = [str(Sharding("FSDP", 2, reshards=False)), str(Sharding("DDP", 2))]
    assert ended.stdout.splitlines() == expected, ended.stderr
