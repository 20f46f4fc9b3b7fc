"""Snakemake, started so that it ends with the process that started it.

    python -m epsdpo.batch.workflow SNAKEMAKE_ARGUMENTS < pipe

What is run stands in the folder that it works in, in the terms of `workflow.smk`. Stages on this machine end with it.
Those on a cluster would not: it is interrupted, upon which it cancels what it has submitted.
"""

import os
import signal
import sys
import time

from snakemake.cli import args_to_api, main, parse_args

from epsdpo.runs.watch import end_with_stdin

_SECONDS_TO_CANCEL = 90.0  # the plugin for Slurm gives scancel 60


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_SECONDS_TO_CANCEL)


def _run_here() -> None:
    """As Snakemake's own `main`, but for its limit of submissions per second, which is meant for clusters.

    With it each job that ends adds one more look at all that wait to every second: with hundreds, most of a core.
    """
    parser, arguments = parse_args(sys.argv[1:])
    arguments.max_jobs_per_timespan = None
    sys.exit(not args_to_api(arguments, parser))


if __name__ == "__main__":
    if "--profile" in sys.argv:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells switch off for what they start with &
        end_with_stdin(first=_interrupt)
        main(sys.argv[1:])
    else:
        end_with_stdin()
        _run_here()
