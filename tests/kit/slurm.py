"""A Slurm cluster of one node on this machine: its daemons, its configuration and all that they write in one folder.

It keeps no accounting and no cgroups, and says that it has more processors, memory and GPUs than there are.
"""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from kit.waiting import wait_until

_DAEMONS = ("munged", "slurmctld", "slurmd")
_GPUS = 8

# Requeued jobs wait until old credentials have expired: 120 seconds if nothing else is said.
_CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
ReturnToService=2
KillWait=20
MinJobAge=3600
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=600000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=lab Nodes=node1 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    absent = [name for name in (*_DAEMONS, "srun") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found; on Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons start jobs as root alone"


class Cluster:
    """One that runs. `environment` is for those who are to submit to it."""

    def __init__(self, folder: Path):
        # The plugin does not tell the steps of a job where the configuration lies.
        (folder / "bin").mkdir()
        for name in ("srun", "squeue", "scontrol"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n', "utf-8")
            program.chmod(0o755)
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Number and state of the last job of each rule, by the rule's name."""
        lines = self.ask("squeue", "--noheader", "--states=all", "--sort=i", "--format=%i %T %k").splitlines()
        found = (line.split(" ", 2) for line in lines)
        return {comment.removeprefix("rule_"): (number, state) for number, state, comment in found}

    def active(self) -> list[tuple[str, str]]:
        """Number and state of the jobs that have not ended."""
        return [tuple(line.split()) for line in self.ask("squeue", "--noheader", "--format=%i %T").splitlines()]

    @contextmanager
    def drained(self):
        """The node takes no jobs meanwhile."""
        self.ask("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
        try:
            yield
        finally:
            self.ask("scontrol", "update", "NodeName=node1", "State=RESUME")


@contextmanager
def cluster_in(folder: Path):
    folder.chmod(0o755)  # munged insists that others can get to its socket
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"controller_port": _free_port(), "node_port": _free_port()}
    user = "root"
    text = _CONFIG.format(folder=folder, host=host, user=user, gpus=_GPUS, **ports)
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    for number in range(_GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=node1 Name=gpu File={folder}/gpu[0-{_GPUS - 1}]\n", encoding="utf-8")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    cluster = Cluster(folder)
    munged = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as ends:
        for name, command in (
            ("munged", munged),
            ("slurmctld", ["slurmctld"]),
            ("slurmd", ["slurmd", "-N", "node1"]),
        ):
            cluster.ask(*command)
            ends.callback(_end, folder / f"{name}.pid")
        wait_until(lambda: "idle" in cluster.ask("sinfo", "--noheader", "--format=%T"))
        try:
            yield cluster
        finally:
            cluster.ask("scancel", "--full", "--signal=KILL", "--user=root")
            cluster.ask("scancel", "--user=root")
            wait_until(lambda: not cluster.active())


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _end(pid_file: Path) -> None:
    with suppress(FileNotFoundError, psutil.NoSuchProcess):
        daemon = psutil.Process(int(pid_file.read_text(encoding="utf-8")))
        daemon.send_signal(signal.SIGTERM)
        psutil.wait_procs([daemon], timeout=20)
