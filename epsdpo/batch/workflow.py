"""Snakemake, started so that it ends with the process that started it.

    python -m epsdpo.batch.workflow SNAKEMAKE_ARGUMENTS < pipe

What is run stands in the folder that it works in, in the terms of `workflow.smk`.
"""

import sys

from snakemake.cli import main

from epsdpo.runs.watch import end_with_stdin

if __name__ == "__main__":
    end_with_stdin()
    main(sys.argv[1:])
