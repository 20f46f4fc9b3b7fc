"""Two hosts train together by the commands of docs/distributed.md; then one is lost, or the cable, or shares no folder.

The hosts are network namespaces, and their processes are real ones, over gloo.
"""

import re
import time

import pytest
import yaml
from kit import distributed_worker as worker
from kit.hosts import GROUP_OF_SECOND, INTERFACE, TwoHosts, why_no_hosts
from kit.launching import ON_CPU, assert_same_run, experiment, launcher, on_cpu, run, trained_weights
from kit.waiting import wait_until

from epsdpo.methods.checkpoint_files import FILES_LIST
from epsdpo.methods.record import read_pairs, read_steps

PAIRS = len(worker.TRAIN_PAIRS)
TWO_MACHINES = "configs/accelerate/multi_node_cpu.yaml"
PATIENCE = 25  # seconds, of `train.ddp_timeout`; hosts that start must not be further apart
TO_START, TO_END = 280, 60  # seconds, on a busy machine
NETWORK = {"GLOO_SOCKET_IFNAME": INTERFACE}
LOST = "cannot reach another one of its training"


@pytest.fixture(scope="module")
def hosts():
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = experiment(tmp_path_factory.mktemp("experiment"))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["train"] |= {"num_train_epochs": 12, "save_steps": 5, "ddp_timeout": PATIENCE}  # 60 steps
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def on_one_machine(hosts, config, tmp_path_factory):
    """The run of two processes on one machine."""
    output = tmp_path_factory.mktemp("one-machine")
    run(*launcher("configs/accelerate/cpu.yaml"), "-m", "epsdpo.train", "--config", config, "--output", output)
    return output / "train"


def train_on(hosts, config, output, **options):
    return hosts.launch(TWO_MACHINES, "-m", "epsdpo.train", "--config", config, "--output", output, **options)


def logs_of(processes, seconds):
    """What each printed, and its exit code, once all have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    logs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
    return logs, [process.returncode for process in processes]


def assert_same_bits(one, other):
    steps, other_steps = (read_steps(run).drop(columns="seconds") for run in (one, other))
    assert other_steps.equals(steps)
    assert read_pairs(other).equals(read_pairs(one))
    weights, other_weights = trained_weights(one), trained_weights(other)
    assert all(other_weights[name].equal(value) for name, value in weights.items())


def checkpoints_of(output):
    return {path.parent.name for path in output.glob(f"train/checkpoint-*/{FILES_LIST}")}


def wait_for_another_checkpoint(processes, output):
    before = checkpoints_of(output)

    def ended():
        return any(process.poll() is not None for process in processes)

    wait_until(lambda: checkpoints_of(output) - before or ended(), TO_START)
    assert not ended(), logs_of(processes, TO_END)


def test_two_hosts_train_as_two_processes_of_one_machine(hosts, config, on_one_machine, tmp_path):
    logs, codes = logs_of(train_on(hosts, config, tmp_path / "run", **NETWORK), TO_START + 60)
    assert codes == [0, 0], logs
    assert_same_bits(on_one_machine, tmp_path / "run" / "train")
    assert_same_run(on_one_machine, tmp_path / "run" / "train", PAIRS, atol=0.0)
    assert read_steps(on_one_machine)["beta_after"].nunique() > 50
    # The second host writes its random state into each checkpoint, says nothing, and that is all.
    by_second = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_gid == GROUP_OF_SECOND]
    checkpoints = checkpoints_of(tmp_path / "run")
    assert {path.name for path in by_second} == {"rng_state_1.pth"}
    assert {path.parent.name for path in by_second} == checkpoints and len(checkpoints) == len(by_second) > 1
    assert "step 60/60" in logs[0] and "Trained model" in logs[0]
    assert "step " not in logs[1] and "Trained model" not in logs[1]


def test_shards_on_two_hosts(hosts, config, on_one_machine, tmp_path):
    launch = on_cpu("multi_node_fsdp2.yaml", tmp_path)
    command = [ON_CPU, "epsdpo.train", "--config", config, "--output", tmp_path / "run"]
    logs, codes = logs_of(hosts.launch(launch, *command, **NETWORK), TO_START + 60)
    assert codes == [0, 0], logs
    assert_same_run(on_one_machine, tmp_path / "run" / "train", PAIRS)


def test_a_host_or_the_cable_that_goes_ends_the_other_and_the_same_commands_go_on(
    hosts, config, on_one_machine, tmp_path
):
    output = tmp_path / "run"
    for lost in (1, 0):
        processes = train_on(hosts, config, output, **NETWORK)
        wait_for_another_checkpoint(processes, output)
        hosts.hosts[lost].kill()
        (log,), (code,) = logs_of([processes[1 - lost]], TO_END)
        assert code == 1 and f"run: process {1 - lost}, on host-{1 - lost}, {LOST}" in log, log
        assert re.search(r"exitcode *: 6", log) and "Traceback" not in log[: log.index(LOST)]

    processes = train_on(hosts, config, output, **NETWORK)
    wait_for_another_checkpoint(processes, output)
    hosts.cable("down")
    begun = time.monotonic()
    logs, codes = logs_of(processes, PATIENCE + TO_END)
    assert time.monotonic() - begun > PATIENCE - 5 and codes == [1, 1]
    for rank, log in enumerate(logs):
        assert f"process {rank}, on host-{rank}, {LOST}" in log and f"ddp_timeout, {PATIENCE} s" in log, log
    hosts.cable("up")

    logs, codes = logs_of(train_on(hosts, config, output, **NETWORK), TO_START + 60)
    assert codes == [0, 0] and re.search(r"continuing run from .*checkpoint-\d+", logs[0]), logs
    assert_same_bits(on_one_machine, output / "train")


def test_a_folder_that_is_not_shared_is_refused_before_anything_is_written(hosts, config, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    logs, codes = logs_of(train_on(hosts, config, output, unshared=output, **NETWORK), TO_START)
    assert codes == [1, 1]
    for log in logs:
        assert f"{output / 'data'} on host-0 is another folder on host-1, and a run needs one" in log, log
        assert re.search(r"exitcode *: 2", log)
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_hosts_that_do_not_find_each_other_name_what_to_set(hosts, config, tmp_path):
    """One of them finds that nobody listens where it calls, and the other one waits for five times `ddp_timeout`."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["train"]["ddp_timeout"] = 5
    own = tmp_path / "run.yaml"
    own.write_text(yaml.safe_dump(values), encoding="utf-8")
    logs, codes = logs_of(train_on(hosts, own, tmp_path / "run"), TO_START)
    assert codes == [1, 1], logs
    for rank, log in enumerate(logs):
        assert f"process {rank}, on host-{rank}, {LOST}" in log and "GLOO_SOCKET_IFNAME" in log.split(LOST)[1], log
