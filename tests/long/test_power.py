"""Power fails: what a disk holds at any moment of a batch or a training is enough for the same command to finish it.

The disk is an ext4 file system in a file. What is written to it stays in memory, as on any disk, until kernel or writer
see to it; a copy of that file is what a machine finds that lost power. Mounting needs root and a loop device.
"""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kit.official import OFFICIAL, save_official_model
from kit.tiny_kit import STEPS, TinyKit

MIB = 2**20
CONTINUED = 3  # how many of the copies a command is given again on


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


class Disk:
    """A file system in memory, mounted at `place`."""

    def __init__(self, place, images):
        self.place, self.images = place, images
        self.image = images / "disk"
        self.copies = []
        place.mkdir(parents=True, exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(64 * MIB)
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", self.image)
        self.mount(self.image)

    def mount(self, image):
        # Names are committed every second, and contents half a minute after they were written: as on any ext4, sooner.
        run("mount", "-o", "loop,commit=1", image, self.place)

    def unmount(self):
        run("umount", self.place)

    def copy(self):
        """Keep what the disk holds at a moment at which nothing is being written to it."""
        first, second = b"", self.image.read_bytes()
        while first != second:
            first, second = second, self.image.read_bytes()
        copy = self.images / f"copy-{len(self.copies)}"
        copy.write_bytes(second)
        self.copies.append(copy)

    @contextlib.contextmanager
    def after_a_cut(self, copy):
        """The disk as it comes back, in place of the one that was there."""
        self.unmount()
        self.mount(copy)
        yield

    def watch(self, process, pattern, rng):
        """Copy the disk whenever another file of a pattern is there, and at random moments, until a process ends."""
        seen, next_copy = set(), time.monotonic()
        while process.poll() is None:
            found = set(self.place.glob(pattern))
            if found - seen or time.monotonic() > next_copy:
                self.copy()
                seen |= found
                next_copy = time.monotonic() + rng.uniform(0.5, 3.0)
            time.sleep(0.02)


@pytest.fixture
def disk(tmp_path):
    disks = []

    def mounted(place):
        images = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) / f"epsdpo-{os.getpid()}"
        images.mkdir(exist_ok=True)
        try:
            disks.append(Disk(place, images))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', '') or error}")
        return disks[-1]

    yield mounted
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk.place)], check=False)
        for file in disk.images.iterdir():
            file.unlink()
        disk.images.rmdir()


def declared(folder):
    """Every manifest below a folder, after its outputs were found to be what it says."""
    manifests = {}
    for path in sorted(folder.rglob("manifest.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, output in content["outputs"].items():
            file = path.parent / name
            assert file.stat().st_size == output["bytes"], file
            if "sha256" in output:
                assert hashlib.sha256(file.read_bytes()).hexdigest() == output["sha256"], file
        manifests[str(path.relative_to(folder))] = content["key"]
    return manifests


def some(copies, rng):
    return rng.sample(copies, min(CONTINUED, len(copies)))


def test_a_batch_goes_on_after_power_failed(tmp_path, disk):
    rng = random.Random(0)
    kit = TinyKit(tmp_path / "kit")
    for number in range(2):
        kit.write_config(f"e{number}", epsilon=0.01 * (number + 1))
    disk = disk(kit.folder / "runs")
    process = kit.start("run", "configs")
    disk.watch(process, "configs/*/*/manifest.json", rng)
    assert process.wait() == 0, process.communicate()
    whole = declared(disk.place)
    assert len(whole) >= 6 and len(disk.copies) >= 8
    finished = []
    for copy in disk.copies:
        with disk.after_a_cut(copy):
            finished.append(len(declared(disk.place)))
    assert finished == sorted(finished)
    for copy in some(disk.copies, rng):
        with disk.after_a_cut(copy):
            code, out, err = kit.run("run", "configs")
            assert code == 0, out + err
            assert declared(disk.place) == whole
            for number in range(2):
                rows = (disk.place / "configs" / f"e{number}" / "train" / "steps.jsonl").read_text(encoding="utf-8")
                assert [json.loads(row)["step"] for row in rows.splitlines()] == list(range(1, STEPS + 1))


def test_a_training_goes_on_after_power_failed(tmp_path, disk):
    """To the same β, losses and weights, bit for bit."""
    rng = random.Random(0)
    disk = disk(tmp_path / "disk")
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(OFFICIAL / "pairs.jsonl")},
        "model": {"name_or_path": str(save_official_model(tmp_path / "model"))},
        "train": {
            "learning_rate": 1e-3,
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "max_length": 128,
            "num_train_epochs": 4,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 5,
            "use_cpu": True,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "epsdpo.train", "--config", str(tmp_path / "run.yaml")]
    command += ["--output", str(disk.place / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def result():
        train = disk.place / "run" / "train"
        steps = [json.loads(row) for row in (train / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{**row, "seconds": 0} for row in steps], (train / "model" / "model.safetensors").read_bytes()

    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    disk.watch(process, "run/train/checkpoint-*/*", rng)
    assert process.wait() == 0, process.communicate()
    whole = result()
    assert len(disk.copies) >= 8
    for copy in some(disk.copies, rng):
        with disk.after_a_cut(copy):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert result() == whole
