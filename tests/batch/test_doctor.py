"""`python -m epsdpo doctor`, as users start it: on this machine, and where something is missing, broken or silent."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from epsdpo.batch import doctor as doctor_module
from epsdpo.batch.check.training import _memory
from epsdpo.batch.doctor import _answer, _Found, _look_at_room, _look_at_torch, _pinned, memory_of_configs
from epsdpo.experiment import load_experiments
from epsdpo.experiment.validate import arguments_for_no_machine
from epsdpo.runs.machine import memory_limit

ROOT = Path(__file__).parents[2]

# Stands in for a torch that sees GPUs, which are not here: name and memory of each, what it is built for, what it says.
TORCH = """
import types, warnings
__version__ = "9.9"
version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
gpus = {gpus!r}
def available():
    if {said!r}:
        warnings.warn({said!r})
    return bool(gpus)
cuda = types.SimpleNamespace(
    is_available=available,
    device_count=lambda: len(gpus),
    get_device_properties=lambda at: types.SimpleNamespace(name=gpus[at][0], total_memory=int(gpus[at][1] * 2**30)),
)
backends = types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: False))
"""


@pytest.fixture
def ask(tmp_path):
    """Run the command with a torch of the test's, or this Python's, and say how it ended and what it printed."""

    def ask(torch="", python=sys.executable, driver="", **environment):
        if torch:
            (tmp_path / "torch.py").write_text(torch, encoding="utf-8")
        tools = tmp_path / "tools"
        tools.mkdir()
        if driver:
            (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n", encoding="utf-8")
            (tools / "nvidia-smi").chmod(0o755)
        given = {"HF_HUB_OFFLINE": "1", "PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), **environment}
        given["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
        call = [python, "-m", "epsdpo", "doctor"]
        done = subprocess.run(call, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=240)
        assert done.stderr == ""
        return done.returncode, done.stdout

    return ask


def line(text: str, name: str) -> str:
    """What stands beside a name, on one line."""
    found = re.search(rf"^  {re.escape(name)} +(.*(?:\n {{17}}.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split())


def missing(text: str) -> str:
    return " ".join(text.partition("What is missing:")[2].split())


def test_this_machine_can_run_the_demo_and_is_shown_on_one_screen(ask):
    code, text = ask()
    assert code == 0
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert line(text, "Python").startswith(f"{sys.version.split()[0]}, {sys.executable}")
    assert line(text, "hub") == "not asked: HF_HUB_OFFLINE is set"
    assert line(text, "demo").startswith("yes: `make demo`")
    assert line(text, "font") == "DejaVu Sans"


def test_a_python_without_packages_is_answered(ask, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    code, text = ask(python=tmp_path / "bare" / "bin" / "python")
    assert code == 1
    assert line(text, "torch") == "does not load: No module named 'torch'"
    assert line(text, "packages").startswith("0 of ")
    assert line(text, "demo") == "no: see what is missing"
    # With which command to go on depends on whether the repository has its environment.
    assert " lacks accelerate, " in missing(text) and ".venv" in missing(text)


def test_a_torch_that_does_not_load_says_why(ask):
    code, text = ask("raise ImportError('libcudart.so.12: cannot open shared object file')", LD_LIBRARY_PATH="/none")
    assert code == 1
    assert line(text, "torch") == "does not load: libcudart.so.12: cannot open shared object file"
    assert "`env -u LD_LIBRARY_PATH`" in missing(text) and "--force-reinstall torch==" in missing(text)


def test_a_torch_that_dies_says_by_which_signal(ask):
    code, text = ask("import os; os.kill(os.getpid(), 4)")
    assert (code, line(text, "torch")) == (1, "does not load: ended by signal 4")


def test_a_torch_that_answers_late_is_waited_for_so_long_and_not_called_broken(tmp_path):
    found, late = (
        _Found(),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=-1, stderr=-1),
    )
    _look_at_torch(found, _answer(late, 1))
    assert late.returncode == -9
    assert ("torch", "no answer within 1 seconds") in found.here
    assert found.missing and not found.fatal


@pytest.mark.parametrize(
    ("torch", "environment", "why"),
    [
        ({"cuda": None}, {}, "this one is built for CPUs"),
        ({"cuda": "13.0"}, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''"),
        ({"cuda": "13.0", "said": "The driver is too old"}, {}, "it says: The driver is too old."),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_no_failure_and_explained(ask, torch, environment, why):
    code, text = ask(TORCH.format(**{"gpus": [], "said": "", **torch}), driver="NVIDIA L4", **environment)
    assert code == 0
    assert line(text, "GPUs") == "the driver has NVIDIA L4; torch sees none"
    assert why in missing(text)


def test_gpus_are_held_against_the_estimates_of_the_configs(ask):
    code, text = ask(TORCH.format(gpus=[["H", 79.1]] + [["A", 23.6]] * 3, cuda="13.0", said=""))
    assert (code, line(text, "GPUs")) == (0, "1 × H, 79.1 GiB; 3 × A, 23.6 GiB")
    small = len(memory_of_configs(ROOT / "configs" / "small"))
    assert line(text, "configs/small").startswith(f"yes: by estimate all {small} files fit")
    four = [size for processes, size in memory_of_configs(ROOT / "configs" / "paper").values() if processes == 4]
    others = len(memory_of_configs(ROOT / "configs" / "paper")) - len(four)
    assert four and others
    assert line(text, "configs/paper").startswith(
        f"{len(four)} of {len(four) + others} files fit; by estimate all of them need GPUs of"
    )


def test_some_of_the_small_configs_fit_into_a_small_gpu_also_where_output_is_ascii(ask):
    needs = [size for _, size in memory_of_configs(ROOT / "configs" / "small").values()]
    _, text = ask(TORCH.format(gpus=[["S", 8.0]], cuda="13.0", said=""), PYTHONIOENCODING="ascii")
    assert line(text, "GPUs") == r"1 \xd7 S, 8.0 GiB"
    fits = sum(size <= 8 for size in needs)
    assert 0 < fits < len(needs)
    assert line(text, "configs/small") == (
        f"{fits} of {len(needs)} files fit; by estimate all of them need GPUs of this memory: 1 of {max(needs)} GiB"
    )


def test_a_hub_that_is_silent_is_waited_for_a_few_seconds_only(ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, text = ask(TORCH.format(gpus=[], cuda=None, said=""), HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
        assert time.monotonic() - began < 60  # on a busy machine
    assert code == 0 and line(text, "hub").startswith("does not answer: ")
    assert "`export HF_HUB_OFFLINE=1`" in missing(text)


def test_a_hub_that_answers_is_named(ask):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        _, text = ask(TORCH.format(gpus=[], cuda=None, said=""), HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
        server.shutdown()
    assert line(text, "hub") == f"{address} answers"


def test_too_little_disk_or_memory_says_how_much_is_needed(monkeypatch):
    monkeypatch.setattr(doctor_module, "_DEMO_DISK", 2**30)
    monkeypatch.setattr(doctor_module, "_DEMO_MEMORY", 2**30)
    found = _Found()
    _look_at_room(found)
    assert [need.partition(":")[0] for need in found.fatal] == ["memory", "disk"]
    assert all(f"{2**30} GiB" in need for need in found.fatal)


def test_memory_is_no_more_than_the_machine_has():
    assert 0 < memory_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_lock_is_read_with_its_markers_and_hashes():
    lock = (
        "# a comment\n"
        "Some_package==1.0 \\\n    --hash=sha256:00\n"
        "here==2.1 ; python_version >= '3.11' \\\n    --hash=sha256:00\n"
        "elsewhere==3 ; sys_platform == 'nowhere'\n"
    )
    assert _pinned(lock) == {"some-package": "1.0", "here": "2.1"}


LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
TINY_QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPES = {  # as the hub has them
    "SmolLM2-135M": LlamaConfig(**SMALL, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": Qwen2Config(**TINY_QWEN, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "Llama-3-8B": LlamaConfig(**LLAMA, num_key_value_heads=8, vocab_size=128256),
    "Mistral-7B": MistralConfig(**LLAMA, num_key_value_heads=8, vocab_size=32000),
    "Qwen2.5-7B": Qwen2Config(**QWEN, num_key_value_heads=4, vocab_size=152064),
    "gemma-2-2b": Gemma2Config(vocab_size=256000),
}
STATED = {}
for where in ("small", "paper"):
    for name, needs in memory_of_configs(ROOT / "configs" / where).items():
        STATED.setdefault((where, name.split("/")[0], needs), f"{where}/{name}.yaml")


@pytest.mark.parametrize("file", STATED.values())
def test_what_the_head_of_a_config_states_is_the_estimate(file):
    """One config of each folder and amount: the estimate as `check` prints it where a model's config.json is here."""
    experiment = load_experiments(ROOT / "configs" / file)[0]
    processes, size = memory_of_configs(ROOT / "configs" / file.split("/")[0])[file.partition("/")[2][: -len(".yaml")]]
    (shape,) = [config for name, config in SHAPES.items() if name in experiment.model.name_or_path]
    found = _memory(experiment, shape, arguments_for_no_machine(experiment), processes)
    assert f"{size} GiB" in found.text
