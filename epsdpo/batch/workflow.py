"""Snakemake, started so that it ends with the process that started it.

    python -m epsdpo.batch.workflow SNAKEMAKE_ARGUMENTS < pipe

What is run stands in the folder that it works in, in the terms of `workflow.smk`. Stages on this machine end with it.
Those on a cluster would not: it is interrupted, upon which it cancels what it has submitted.
"""

import os
import signal
import sys
import time

from snakemake.cli import main

from epsdpo.runs.watch import end_with_stdin

_SECONDS_TO_CANCEL = 90.0  # the plugin for Slurm gives scancel 60


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_SECONDS_TO_CANCEL)


if __name__ == "__main__":
    if "--profile" in sys.argv:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells switch off for what they start with &
        end_with_stdin(first=_interrupt)
    else:
        end_with_stdin()
    main(sys.argv[1:])
