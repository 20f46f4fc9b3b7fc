"""Ask one model the tasks of lm-evaluation-harness, as a process of its own: `python -m ….benchmarks.harness JOB`.

So a crash, or memory that runs out, costs one model and not the others. JOB is JSON: experiment_file (the resolved
config, which says which tokenizer and precision the model has), source and revision (where its weights are), tasks,
limit (only the first questions of each, or null) and include_path (folder of further tasks, or ""). Each finished task
is a JSON object on a line of standard output; all that the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from epsdpo.evaluation.benchmarks.tasks import Task, headline_score
from epsdpo.experiment import load_saved
from epsdpo.runs.watch import end_with_stdin

_BATCH_ON_CPU = 8


def main() -> int:
    """Ask everything, one task after the other; a task that fails is told as such and the next one is asked."""
    job = json.loads(sys.argv[1])
    end_with_stdin()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from lm_eval.tasks import TaskManager

    model = _load(Path(job["experiment_file"]), job["source"], job["revision"])
    manager = TaskManager(include_path=job["include_path"] or None)  # reads thousands of files
    for task in (Task(**task) for task in job["tasks"]):
        try:
            answer = _ask(model, task, job["limit"], manager)
        except Exception as error:  # whatever a task, its data set or the GPU comes up with
            sys.excepthook(*sys.exc_info())
            answer = {"task": task.name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _load(experiment_file: Path, source: str, revision: str | None) -> Any:
    """The model as the harness takes it, loaded by transformers alone: adapters too, and never code from a hub."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from epsdpo.methods.loading import load_causal_lm
    from epsdpo.models.start import load_tokenizer

    experiment = load_saved(experiment_file)
    model = load_causal_lm(
        source,
        revision,
        dtype=getattr(torch, experiment.model.dtype),
        attn_implementation=experiment.model.attn_implementation,
    )
    on_gpu = torch.cuda.is_available()
    return HFLM(
        pretrained=model.to("cuda" if on_gpu else "cpu").eval(),
        tokenizer=load_tokenizer(experiment),
        trust_remote_code=False,
        batch_size="auto" if on_gpu else _BATCH_ON_CPU,  # on a CPU the harness would try how large a batch it survives
    )


def _ask(model: Any, task: Task, limit: int | None, manager: Any) -> dict[str, Any]:
    """The scores of one task: shares from 0 to 1 with the harness's standard errors, and of how many questions."""
    from lm_eval import simple_evaluate

    started = time.monotonic()
    results = simple_evaluate(
        model=model,
        tasks=[task.name],
        num_fewshot=task.shots,
        limit=limit,
        log_samples=False,
        confirm_run_unsafe_code=False,
        task_manager=manager,
    )
    found = results["results"][task.name]
    # "acc,none" and "acc_stderr,none": a score, and the filter that its answers went through.
    names = [name for name, value in found.items() if "," in name and "_stderr," not in name and _is_number(value)]
    errors = {name: found.get("_stderr,".join(name.split(",", 1))) for name in names}
    return {
        "task": task.name,
        "score": headline_score(task, {name: found[name] for name in names}),
        "scores": {name: float(found[name]) for name in names},
        # "N/A" where there was a single question
        "standard_errors": {name: error if _is_number(error) else None for name, error in errors.items()},
        "questions": sum(counts["effective"] for counts in results["n-samples"].values()),
        "task_version": results["versions"].get(task.name),
        "device": str(model.device),
        "seconds": round(time.monotonic() - started, 1),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


if __name__ == "__main__":
    sys.exit(main())
