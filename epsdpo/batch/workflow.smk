# The batch that was written down beside it, as rules: for the runner, and not meant to be edited or called by hand.
# A stage is its manifest: nothing else is declared, so nothing else is ever taken for a result, or deleted.
# All paths are relative to the folder that Snakemake works in, so that no name of a user's is taken for a pattern.

import json
from pathlib import Path

STAGES = json.loads(Path("batch.json").read_text(encoding="utf-8"))


rule all:
    input:
        [stage["manifest"] for stage in STAGES],


for stage in STAGES:

    rule:
        name: stage["name"]
        input:
            stage["needs"],
        output:
            stage["manifest"],
        priority: stage["priority"]
        threads: stage["threads"]
        resources:
            gpu=stage["gpus"],
            runtime=stage["minutes"],
        shell:
            ". stages/{rule}.sh"
