"""What tells the loss of another process from other errors; `tests/with_hosts` loses real ones."""

from datetime import timedelta

import pytest
from accelerate import PartialState
from torch.distributed import TCPStore

from epsdpo.experiment import check_experiment
from epsdpo.train.processes import is_lost_process, lost_process, require_one_folder


def test_a_lost_process_is_told_from_other_errors_and_named():
    with pytest.raises(RuntimeError) as lost:
        TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=1))  # for a second one, which never comes
    assert is_lost_process(lost.value)
    assert is_lost_process(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"))
    train = {"beta": 0.1, "ddp_timeout": 60}
    experiment = check_experiment({"name": "tiny", "method": "epsilon_dpo", "train": train}, where="test")
    said = lost_process(lost.value, experiment)
    assert said.startswith("tiny: process ") and "(Timed out after" in said and "train.ddp_timeout, 60 s" in said


def test_one_process_needs_no_folder_that_others_see(tmp_path):
    require_one_folder(tmp_path / "run", PartialState(cpu=True))
    assert not (tmp_path / "run").exists()
