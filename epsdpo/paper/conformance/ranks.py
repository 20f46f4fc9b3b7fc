"""The clause that takes two processes: started here, and what each of them runs.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m epsdpo.paper.conformance.ranks FOLDER TRAINER …
"""

import os
import subprocess
import sys
from pathlib import Path

from epsdpo.paper.conformance.apart import first_apart
from epsdpo.paper.conformance.clauses import Broken, Examination, NotAsked
from epsdpo.paper.conformance.observed import read_run, save_run
from epsdpo.paper.conformance.subject import load_subject
from epsdpo.paper.conformance.vectors import read_vectors

RANKS, PATIENCE = 2, 300  # seconds


def two_ranks(examination: Examination, name: str, config: Path | None) -> str:
    """The clause, of the implementation MODULE:TRAINER that is examined. Its two processes end with it."""
    folder = examination.folder / "ranks"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "epsdpo.paper.conformance.ranks", str(folder), name, *filter(None, [config and str(config)])]
    # One thread each, as the sums of one process are those of two in another order already.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        raise NotAsked(f"two processes did not end within {PATIENCE} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error: " in line]
        raise NotAsked(f"two processes failed: {said[0].split(']:')[-1].strip() if said else done.returncode}")
    for rank in range(RANKS):
        if apart := first_apart(examination.whole, read_run(folder / f"{rank}.json")):
            raise Broken(f"rank {rank}, {apart.text}, as in one process with the same pairs")
    return "3 + 3 pairs on two processes are 6 on one, and both have one β"


def main(folder: Path, name: str, config: Path | None) -> None:
    """One of the processes."""
    examination = Examination(load_subject(name, config), read_vectors(), folder)
    save_run(examination.train("run", examination.learning(3)), folder / f"{os.environ['RANK']}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
