"""What the commands that train have in common: a config, messages of one process alone, and exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from epsdpo.experiment import ConfigError, Experiment, load_experiment
from epsdpo.runs.preempted import PREEMPTED, Preempted
from epsdpo.runs.watch import end_with_stdin
from epsdpo.train.memory import OutOfMemory
from epsdpo.train.processes import is_lost_process, lost_process, process_state

REFUSED, OUT_OF_MEMORY, LOST_PROCESS = 2, 3, 6  # exit codes


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[Experiment, argparse.Namespace], Path],
    made: str,
) -> int:
    """Read arguments, do the work on the experiment of their config, and say where what was `made` lies.

    Returns:
        0: done. 2: the config was refused. 3: memory ran out. (4 is what `--end-with-stdin` ends with.)
        6: another process of the training is gone, or out of reach.
        75: it was told to end by SIGTERM or SIGUSR1, and saved a checkpoint.
    """
    parser.add_argument(
        "--end-with-stdin", action="store_true", help="end at once when standard input closes, as for a notebook"
    )
    options = parser.parse_args(arguments)
    if options.end_with_stdin:
        end_with_stdin()
    try:
        experiment = load_experiment(options.config)
        processes = process_state(experiment)
        logging.basicConfig(level=logging.INFO if processes.is_main_process else logging.WARNING, format="%(message)s")
        model_dir = work(experiment, options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except OutOfMemory as error:
        print(error, file=sys.stderr)
        return OUT_OF_MEMORY
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        print(lost_process(error, experiment), file=sys.stderr)
        return LOST_PROCESS
    if processes.is_main_process:
        print(f"{made}: {model_dir}")
    return 0
