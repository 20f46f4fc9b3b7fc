"""The clause that takes two processes: how they are started, and what each of them runs.

python -m epsdpo.paper.conformance.ranks FOLDER MODULE:TRAINER [CONFIG], with RANK, WORLD_SIZE, … as torchrun sets them
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from epsdpo.paper.conformance.apart import first_apart
from epsdpo.paper.conformance.clauses import Broken, Examination, NotAsked
from epsdpo.paper.conformance.observed import read_run, save_run, train
from epsdpo.paper.conformance.subject import load_subject
from epsdpo.paper.conformance.trainings import FULL, learning
from epsdpo.paper.conformance.vectors import read_vectors
from epsdpo.runs.watch import end_with_stdin

RANKS, PATIENCE = 2, 300  # seconds


def two_ranks(examination: Examination, name: str, config: Path | None) -> str:
    """The clause, of the implementation MODULE:TRAINER that is examined; no process outlives it."""
    folder = examination.folder / "ranks"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "epsdpo.paper.conformance.ranks",
        str(folder),
        name,
        *([str(config)] * bool(config)),
    ]
    processes = []
    try:
        for rank in range(RANKS):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            environment = os.environ | meeting | {key: str(value) for key, value in place.items()}
            with (folder / f"{rank}.log").open("w", encoding="utf-8") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
                )
        deadline = time.monotonic() + PATIENCE
        codes = [process.wait(max(0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise NotAsked(f"two processes did not end within {PATIENCE} s") from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for rank, code in enumerate(codes):
        if code:
            last = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise NotAsked(f"rank {rank} of two failed: {''.join(last) or code}")
    for rank in range(RANKS):
        if apart := first_apart(examination.whole, read_run(folder / f"{rank}.json")):
            raise Broken(f"rank {rank}, {apart.text}, as in one process with the same pairs")
    return "3 + 3 pairs on two processes are 6 on one, and both have one β"


def main(folder: Path, name: str, config: Path | None) -> None:
    """One of the processes."""
    end_with_stdin()
    subject, vectors = load_subject(name, config), read_vectors()
    run = train(subject, vectors, learning(vectors, batch=FULL // RANKS), folder / "run")
    save_run(run, folder / f"{os.environ['RANK']}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
