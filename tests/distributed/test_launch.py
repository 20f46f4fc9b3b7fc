"""Training in processes of its own: its log reaches the notebook, it fails readably, and it ends with its notebook.

The processes are real: two over gloo, or one below the launcher, on the tiny reference models.
"""

import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from kit.official import save_official_model
from kit.waiting import running, wait_until

from epsdpo.data.prepared import prepare
from epsdpo.experiment import ConfigError, check_experiment, load_experiment
from epsdpo.methods.record import STEPS_FILE, read_pairs, read_steps
from epsdpo.models.start import load_tokenizer
from epsdpo.train.launch import LOG_FILE, LaunchError, launch_training, launcher_command
from epsdpo.train.live import LiveChart

REPOSITORY = Path(__file__).parents[2]
TWO_ON_CPU = str(REPOSITORY / "configs" / "accelerate" / "cpu.yaml")
ENDLESS = 100_000  # steps, of which none is waited for


@pytest.fixture
def run(tmp_path, official, monkeypatch):
    """A function that writes a config and its prepared data, and returns the parameters of 02_train."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(**train: object) -> dict[str, object]:
        model = save_official_model(tmp_path / "model")
        settings = {
            "beta": 0.1,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "max_length": 128,
            "num_train_epochs": 1,  # 12 steps
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 5,
            "logging_steps": 6,
            "use_cpu": True,
        }
        values = {
            "method": "epsilon_dpo",
            "data": {"source": str(official / "pairs.jsonl")},
            "model": {"name_or_path": str(model)},
            "train": {**settings, **train},
        }
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        experiment = load_experiment(config)
        tokenizer = load_tokenizer(experiment)
        prepare(experiment.data, tokenizer, tmp_path / "data", max_length=experiment.train["max_length"])
        return {"config": str(config), "data_dir": str(tmp_path / "data")}

    return make


def run_notebook(parameters, train_dir):
    """02_train through papermill in a process of its own, as a scheduler's job."""
    program = f"from epsdpo.batch.stage import run_stage; run_stage('train', {parameters!r}, {str(train_dir)!r})"
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def recorded_steps(train_dir) -> int:
    return (train_dir / STEPS_FILE).read_text().count("\n") if (train_dir / STEPS_FILE).exists() else 0


def wait_until_ended(processes: list[psutil.Process]) -> None:
    try:
        wait_until(lambda: not running(processes), seconds=60)
    finally:
        for process in running(processes):
            process.kill()


def end_in_training(runner, end, train_dir, after_step) -> list[list[str]]:
    """Send the signal `end` to papermill in the middle of training, and wait until nothing below it runs any more.

    Returns the command lines of what ran: the kernel and the processes that it had started.
    """
    try:
        wait_until(lambda: recorded_steps(train_dir) > after_step or runner.poll() is not None)
        processes = psutil.Process(runner.pid).children(recursive=True)
        commands = [process.cmdline() for process in processes]
    finally:
        runner.send_signal(end)
    runner.communicate(timeout=60)
    assert runner.returncode != 0
    wait_until_ended(processes)
    return commands


def test_launched_training_ends_with_its_notebook_and_goes_on_with_the_next(run, tmp_path):
    """No line is ever logged: a process must not end only because nobody reads what it prints."""
    train_dir = tmp_path / "train"
    parameters = {**run(max_steps=ENDLESS, logging_steps=ENDLESS), "launch_config": TWO_ON_CPU}
    for end in (signal.SIGKILL, signal.SIGTERM):
        before = recorded_steps(train_dir)
        ended = end_in_training(run_notebook(parameters, train_dir), end, train_dir, before + 6)
        assert sum("epsdpo.train" in command for command in ended) == 3  # the launcher and its two workers
    first, second = (train_dir / LOG_FILE).read_text(encoding="utf-8").split("===")[1:]
    assert "continuing run from" not in first and "continuing run from" in second
    steps = read_steps(train_dir)["step"].tolist()
    assert steps == list(range(1, len(steps) + 1))


def test_launched_training_shows_its_log_and_its_chart(run, tmp_path):
    train_dir = tmp_path / "train"
    runner = run_notebook({**run(), "launch_config": TWO_ON_CPU, "live": True}, train_dir)
    printed, _ = runner.communicate(timeout=200)
    assert runner.returncode == 0, printed

    pairs = read_pairs(train_dir)
    assert len(read_steps(train_dir)) == 12 and pairs["pair_id"].nunique() == len(pairs) == 96
    book = nbformat.read(train_dir / "notebook.ipynb", as_version=4)
    (cell,) = [cell for cell in book.cells if "launch_training(" in cell.source]
    log = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    for line in ("step 6/12 · epoch 0.50", "step 12/12 · epoch 1.00"):
        assert line in log and line in printed
    assert (train_dir / LOG_FILE).read_text(encoding="utf-8").endswith(log)
    (chart,) = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    assert "Step 12 of 12, done" in chart.metadata["image/png"]["alt"]


def test_training_in_the_kernel_ends_with_its_notebook(run, tmp_path):
    train_dir = tmp_path / "train"
    end_in_training(run_notebook(run(max_steps=ENDLESS), train_dir), signal.SIGKILL, train_dir, 2)


def test_an_interrupt_ends_training_and_is_passed_on(run, tmp_path):
    """Below a launcher that does not care for the process it started, as accelerate's is for one process."""
    parameters = run(max_steps=ENDLESS, logging_steps=ENDLESS)
    single = tmp_path / "single.yaml"
    launch = yaml.safe_load(Path(TWO_ON_CPU).read_text(encoding="utf-8"))
    single.write_text(yaml.safe_dump({**launch, "distributed_type": "NO", "num_processes": 1}), encoding="utf-8")
    experiment = load_experiment(parameters["config"])
    train_dir = tmp_path / "train"
    ended = []

    class Interrupted(LiveChart):
        def refresh(self):
            if recorded_steps(train_dir) > 2:
                ended.extend(psutil.Process().children(recursive=True))
                signal.raise_signal(signal.SIGINT)

    launcher = launcher_command(str(single), 0, experiment)
    with pytest.raises(KeyboardInterrupt):
        launch_training(launcher, **parameters, train_dir=train_dir, chart=Interrupted(train_dir))
    assert len(ended) >= 2
    wait_until_ended(ended)


def test_a_failure_ends_in_the_last_lines_of_the_log(run, tmp_path, capfd):
    parameters = run(per_device_train_batch_size=8)
    experiment = load_experiment(parameters["config"])
    with pytest.raises(LaunchError) as failure:
        launch_training(launcher_command(TWO_ON_CPU, 0, experiment), **parameters, train_dir=tmp_path / "train")
    lines = str(failure.value).splitlines()
    assert lines[0] == "training ended with exit code 1:"
    # Which of the two workers is heard last, and what torchrun says between them, differs from time to time.
    assert "cannot be split over 2 processes with per_device_train_batch_size=8" in str(failure.value)
    assert "exitcode: 2" in str(failure.value)  # refused; it also tells a worker killed for its memory
    log = Path(lines[-1].removeprefix("whole log: ")).read_text(encoding="utf-8")
    assert log.splitlines()[1].endswith("--end-with-stdin") and log.endswith(capfd.readouterr().out)


def experiment_of(**train):
    return check_experiment({"name": "tiny", "method": "epsilon_dpo", "train": {"beta": 0.1, **train}}, where="test")


@pytest.mark.parametrize(
    ("launch", "num_processes", "train", "message"),
    [
        ({}, 0, {}, r"launch\.yaml: use_cpu is true, but experiment 'tiny' does not say train\.use_cpu: true"),
        ({"use_cpu": False}, 0, {"use_cpu": True}, "use_cpu is false, but experiment 'tiny' says.*use .*cpu.yaml"),
        ({"mixed_precision": "bf16"}, 0, {"use_cpu": True}, "mixed_precision is 'bf16'.*train.bf16"),
        ({"num_machines": 2}, 0, {"use_cpu": True}, "num_machines is 2.*on its own machine only"),
        ({"distributed_type": "NO"}, 0, {"use_cpu": True}, "NO, which starts one process, not 2"),
        ({"distributed_type": "MULTI_CPU"}, 0, {"use_cpu": True}, "is MULTI_CPU; use NO, MULTI_GPU, FSDP, DEEPSPEED"),
        ({"num_processes": -1}, 0, {"use_cpu": True}, "num_processes is missing"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, 0, {"use_cpu": True}, r"launch\.yaml: accelerate cannot read"),
        ({"learning_rate": 1}, 0, {"use_cpu": True}, "cannot read it as a launch config.*learning_rate"),
        ("beta: [0.1", 0, {"use_cpu": True}, "cannot read it as a launch config"),
        ("just text", 0, {"use_cpu": True}, "cannot read it as a launch config"),
        (None, 0, {"use_cpu": True}, r"launch\.yaml: no such file"),
        ({}, -2, {"use_cpu": True}, "num_processes is -2"),
    ],
)
def test_launch_configs_that_do_not_fit_are_refused(tmp_path, launch, num_processes, train, message):
    path = tmp_path / "launch.yaml"
    if isinstance(launch, dict):
        launch = yaml.safe_dump({**yaml.safe_load(Path(TWO_ON_CPU).read_text(encoding="utf-8")), **launch})
    if launch is not None:
        path.write_text(launch, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        launcher_command(str(path), num_processes, experiment_of(**train))


def test_the_number_of_processes_needs_a_launch_config():
    assert launcher_command("", 0, experiment_of()) == []
    with pytest.raises(ConfigError, match="num_processes is 4, but there is no launch config.*multi_gpu.yaml"):
        launcher_command("", 4, experiment_of())


@pytest.mark.parametrize("name", ["cpu", "fsdp2", "multi_gpu", "single_gpu", "zero3"])
def test_committed_launch_configs_of_one_machine_are_taken(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    experiment = experiment_of(use_cpu=True) if name == "cpu" else experiment_of()
    number = 1 if name == "single_gpu" else 4
    command = launcher_command(f"configs/accelerate/{name}.yaml", number, experiment)
    assert command[-2:] == ["--num_processes", str(number)] and Path(command[-3]).is_file()
