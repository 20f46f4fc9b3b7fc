"""Snakemake, started so that it ends with the process that started it.

    python -m epsdpo.batch.workflow SNAKEMAKE_ARGUMENTS < pipe

It knows nothing of what is run; `epsdpo.batch.runner` writes that down in `workflow.smk`'s terms.
"""

import sys

from snakemake.cli import main

from epsdpo.runs.watch import end_with_stdin

if __name__ == "__main__":
    end_with_stdin()
    main(sys.argv[1:])
