"""What was measured of each experiment, kept in `<experiment>/benchmarks/results.json`, and a table of it.

It loads neither torch nor the harness, since the index shows the table too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment

from epsdpo.evaluation.benchmarks.tasks import TABLE_8
from epsdpo.files import writable, written_whole
from epsdpo.runs.layout import BENCHMARK_RESULTS, BENCHMARKS, experiments_in
from epsdpo.runs.manifest import read_manifest

POLICY, REFERENCE = "policy", "reference"

_TEMPLATE = """\
<table>
<tr><th>model</th>{% for column in columns %}<th class="number">{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row.title }}</td>
{% for cell in row.cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p>Percent of the questions, ± one standard error of lm-evaluation-harness {{ versions }}, without a chat template.
{% if limited %}<b>“First N”: only the first N questions of a task, or of each of its parts; not a result of the
benchmark.</b>{% endif %}</p>
"""


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The measurements of an experiment's policy and reference, as far as there are any."""
    path = folder / BENCHMARKS / BENCHMARK_RESULTS
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {POLICY: [], REFERENCE: [], **content}


def write_results(folder: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the measurements of an experiment, in one piece."""
    path = folder / BENCHMARKS / BENCHMARK_RESULTS
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as partial:
        text = json.dumps(writable(results), indent=1, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def training_of(folder: Path) -> str | None:
    """The key of the training that made the policy of an experiment; its results are void once there is another."""
    manifest = read_manifest(folder / "train")
    return None if manifest is None else manifest["key"]


def percent(measurement: dict[str, Any]) -> str:
    """The headline score, e.g. "63.7 ± 1.4", and "first 20" if not every question was asked."""
    score = measurement["score"]
    error = measurement["standard_errors"].get(score)
    text = f"{100 * measurement['scores'][score]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
    return text + (f" (first {measurement['limit']})" if measurement["limit"] is not None else "")


def benchmark_table(run_dir: str | Path) -> str | None:
    """HTML: what was measured in a run folder, a row per model, references first; None if nothing was."""
    rows = _rows(Path(run_dir))
    if not rows:
        return None
    measured = [measurement for _, shown in rows for measurement in shown.values()]
    labels = {measurement["task"]: measurement["label"] for measurement in measured}
    of_table_8 = [task.name for task in TABLE_8]
    tasks = [name for name in of_table_8 if name in labels] + sorted(labels.keys() - set(of_table_8))
    averaged = any(_average(shown) != "–" for _, shown in rows)
    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return page.render(
        columns=[labels[name] for name in tasks] + ["average"] * averaged,
        rows=[
            {
                "title": title,
                "cells": [percent(shown[name]) if name in shown else "–" for name in tasks]
                + [_average(shown)] * averaged,
            }
            for title, shown in rows
        ],
        versions=", ".join(sorted({measurement["harness"] for measurement in measured})),
        limited=any(measurement["limit"] is not None for measurement in measured),
    )


def _rows(run_dir: Path) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Title and measurements by task of each measured model; a reference that several share has one row."""
    references, policies = {}, []
    experiments = sorted(experiments_in(run_dir).values(), key=lambda each: (each.method != "dpo", each.name))
    for experiment in experiments:
        folder = run_dir / experiment.name
        results = read_results(folder)
        if results[REFERENCE]:
            identity = json.dumps(results[REFERENCE][0]["model"], sort_keys=True)
            references[identity] = (f"reference: {experiment.model.name_or_path}", _to_show(results[REFERENCE]))
        current = [each for each in results[POLICY] if each["training"] == training_of(folder)]
        if current:
            policies.append((experiment.title, _to_show(current)))
    return [*references.values(), *policies]


def _to_show(measurements: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One measurement per task: a whole one before a limited one, and then the latest."""
    worst_first = sorted(measurements, key=lambda each: (each["limit"] is None, each["finished"]))
    return {measurement["task"]: measurement for measurement in worst_first}


def _average(shown: dict[str, dict[str, Any]]) -> str:
    """Table 8's mean over its six tasks; "–" unless each of them was asked in full."""
    if any(task.name not in shown or shown[task.name]["limit"] is not None for task in TABLE_8):
        return "–"
    return f"{sum(100 * shown[task.name]['scores'][shown[task.name]['score']] for task in TABLE_8) / len(TABLE_8):.1f}"
