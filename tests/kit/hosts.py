"""Two hosts on one machine: network namespaces with a cable between them, each with processes of its own.

They share the machine's files, but for a folder that the second is told to see for itself. What the second host writes
belongs to a group of its own, by which it is told from what the first one wrote.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from kit.launching import REPOSITORY, launcher

INTERFACE = "eth0"
GROUP_OF_SECOND = 4242


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_no_hosts() -> str | None:
    """Why no network namespaces can be made here, or None if they can."""
    probe = f"epsdpo-{os.getpid()}-probe"
    try:
        ip("netns", "add", probe)
        ip("netns", "delete", probe)
    except FileNotFoundError:
        return "no command `ip` (Debian's iproute2)"
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` failed, which needs root: {error.stderr.strip()}"
    return None


class Host:
    def __init__(self, rank: int):
        self.rank = rank
        self.name = f"epsdpo-{os.getpid()}-{rank}"
        self.address = f"10.97.0.{rank + 1}"
        self.started: list[subprocess.Popen] = []

    def ip(self, *arguments: str) -> str:
        return ip("-n", self.name, *arguments)

    def start(self, *command: str | Path, sees_its_own: Path | None = None, **environment: str) -> subprocess.Popen:
        """Start a command there.

        Args:
            sees_its_own: a folder in place of which it has an empty one, which nobody else sees.
        """
        view = f"mount -t tmpfs none '{sees_its_own}' && " if sees_its_own else ""
        group = ["setpriv", "--regid", str(GROUP_OF_SECOND), "--clear-groups"] if self.rank else []
        within = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        script = f'hostname host-{self.rank} && {view}exec "$@"'
        process = subprocess.Popen(
            [*within, "sh", "-c", script, "sh", *group, *map(str, command)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL for all that runs there; its network goes on answering, as that of a machine which reboots."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    os.kill(int(pid), signal.SIGKILL)
            for process in self.started:
                process.wait()


class TwoHosts:
    """Two hosts that reach each other over one cable, and nothing else."""

    def __init__(self):
        self.hosts = (Host(0), Host(1))

    def __enter__(self) -> "TwoHosts":
        first, second = self.hosts
        for host in self.hosts:
            ip("netns", "add", host.name)
        ip("link", "add", INTERFACE, "netns", first.name, "type", "veth", "peer", INTERFACE, "netns", second.name)
        for host in self.hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.ip("link", "set", "lo", "up")
        self.cable("up")
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            host.kill()
            ip("netns", "delete", host.name)

    def cable(self, state: str) -> None:
        """Plug it in, `up`, or pull it, `down`."""
        for host in self.hosts:
            host.ip("link", "set", INTERFACE, state)

    def launch(
        self, config: str | Path, *command: str | Path, unshared: Path | None = None, **environment: str
    ) -> list[subprocess.Popen]:
        """The command of the docs on both.

        Args:
            config: of accelerate.
            unshared: a folder that the second host does not share.
        """
        first = self.hosts[0].address
        return [
            host.start(
                *launcher(config, "--main_process_ip", first, "--machine_rank", str(host.rank)),
                *command,
                sees_its_own=unshared if host.rank else None,
                **environment,
            )
            for host in self.hosts
        ]
