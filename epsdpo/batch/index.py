"""`index.html` of a run folder: every experiment in a row, with where it stands, what came out and links to its pages.

The page works opened as a file; all text is escaped by the template. It is written again whenever a stage begins or
ends, so that nothing here may load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment

from epsdpo.batch.progress import StageStatus, batch_status
from epsdpo.evaluation.benchmarks.results import benchmark_table
from epsdpo.experiment import Experiment
from epsdpo.files import read_object, written_whole
from epsdpo.methods.launches import IN_WORDS
from epsdpo.methods.record import DamagedRecord, first_and_last_row, incompleteness
from epsdpo.runs.layout import INDEX, PAGE, STEPS, SUMMARY, VERDICTS, experiments_in, link_to, shared_folders
from epsdpo.runs.manifest import LOG, MANIFEST, changed_outputs, commit_of, read_manifest
from epsdpo.train.pace import as_time

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ run_dir }} · all runs</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; }
th, td { padding: .35rem .5rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.finished { color: #0072B2; } .failed { color: #D55E00; font-weight: 600; } .interrupted { color: #A65E00; }
.stage { white-space: nowrap; }
.running { font-weight: 600; } .waiting { color: #777; } .interval, footer { color: #555; font-size: 90%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .7rem; }
/* Narrow windows have no room for ten columns: there each experiment is a block, its cells under one another. */
@media (max-width: 75rem) {
  .runs, .runs tbody, .runs tr, .runs td { display: block; }
  .runs tr.heads { display: none; }
  .runs tr { border-bottom: 1px solid #ddd; padding: .5rem 0; }
  .runs td, .runs td.number { border: 0; padding: .1rem 0 .1rem 11rem; text-align: left; white-space: normal; }
  .runs td::before { content: attr(data-head); float: left; margin-left: -11rem; color: #555; }
}
</style>
</head>
<body>
<h1>{{ run_dir }}</h1>
<p>{{ finished }} of {{ stages }} stages finished
{%- if failed %}, <span class="failed">{{ failed|length }} failed</span>{% endif %}.
{% if report %}<a href="{{ report }}">The report</a> joins the runs below.{% endif %}
{% if real_text %}<a href="{{ real_text }}">The study on real text</a> has what the criterion decides in
their models.{% endif %}</p>
<table class="runs">
<tr class="heads"><th>experiment</th><th>method</th><th class="number">ε</th><th>criterion</th>
<th class="number">β at start</th><th class="number">β at end</th>
<th class="number">win rate (%)</th><th class="number">length-controlled (%)</th>
<th>stages</th><th class="number">time</th><th>commit</th></tr>
{% for row in rows %}
<tr><td data-head="experiment"><b>{{ row.title }}</b>
{% if row.verdict %}<br><a class="interval" href="{{ published }}">{{ row.verdict }}</a>{% endif %}
{% if row.record %}<br><span class="failed">{{ row.record }}</span>{% endif %}
{% for file in row.changed %}<br><span class="failed">{{ file }} is not as its stage left it</span>{% endfor %}</td>
<td data-head="method">{{ row.method }}</td>
<td class="number" data-head="ε">{{ row.epsilon }}</td>
<td data-head="criterion">{{ row.criterion }}</td>
<td class="number" data-head="β at start">{{ row.beta_initial }}</td>
<td class="number" data-head="β at end">{{ row.beta_final }}</td>
<td class="number" data-head="win rate (%)">{{ row.win_rate[0] }} <span class="interval">{{ row.win_rate[1] }}</span>
{% if row.not_judged %}<br><span class="failed">{{ row.not_judged }}</span>{% endif %}</td>
<td class="number" data-head="length-controlled (%)">{{ row.length_controlled[0] }}
<span class="interval">{{ row.length_controlled[1] }}</span></td>
<td data-head="stages">{% for stage in row.stages %}
<span class="stage">
{% if stage.link %}<a href="{{ stage.link }}">{{ stage.name }}</a>{% else %}{{ stage.name }}{% endif +%}
<span class="{{ stage.state }}">{{ stage.state }}</span>{% if stage.kept %} ({{ stage.kept }}){% endif %}
{%- if not loop.last %} ·{% endif %}</span>
{% endfor %}</td>
<td class="number" data-head="time">{{ row.time }}</td><td data-head="commit">{{ row.commit }}</td></tr>
{% endfor %}
</table>
{% if benchmarks %}<h2>Benchmarks</h2>
{{ benchmarks|safe }}{% endif %}
{% for stage in failed %}
<h2 class="failed">{{ stage.name }} failed</h2>
<pre>{{ stage.detail }}</pre>
<p><a href="{{ stage.link }}">Its log</a></p>
{% endfor %}
<footer><p>Intervals are 95 %, over prompts. ε and β are dimensionless; β is the KL penalty.</p></footer>
</body>
</html>
"""


def write_index(run_dir: str | Path) -> Path:
    """Write `index.html` into a run folder, in one piece, and return its path."""
    run_dir = Path(run_dir)
    statuses = batch_status(run_dir)
    rows = [_row(run_dir / name, experiment, run_dir, statuses) for name, experiment in experiments_in(run_dir).items()]
    reports = [page for page in (run_dir / "claims" / PAGE, run_dir / "report" / PAGE) if page.exists()]
    study = run_dir / "real_text" / PAGE
    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    text = page.render(
        run_dir=run_dir.resolve().name,
        rows=sorted(rows, key=lambda row: (row["method"] != "dpo", row["name"])),
        stages=len(statuses),
        finished=sum(status.state == "finished" for status in statuses),
        failed=[
            {"name": status.name, "detail": status.detail, "link": link_to(status.folder / LOG, run_dir)}
            for status in statuses
            if status.state == "failed"
        ],
        report=link_to(reports[0], run_dir) if reports else None,
        published=link_to(run_dir / "report" / PAGE, run_dir) + "#The-published-run",
        real_text=link_to(study, run_dir) if study.exists() else None,
        benchmarks=benchmark_table(run_dir),
    )
    path = run_dir / INDEX
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _row(folder: Path, experiment: Experiment, run_dir: Path, statuses: list[StageStatus]) -> dict[str, Any]:
    train = experiment.training_arguments()
    own = [status for status in statuses if status.folder.parent == folder]
    places = [run_dir / name for name in shared_folders(experiment).values()]
    shared = [status for status in statuses if status.folder in places]
    seconds = [status.seconds for status in own if status.seconds is not None]
    # What is drawn here is held against the manifests, and nothing else, since this is done often.
    read = {"train": STEPS, "evaluate": SUMMARY}
    changed = {stage for stage, file in read.items() if changed_outputs(folder / stage, lambda name, f=file: name == f)}
    betas = None if "train" in changed else _betas(folder / "train")
    evaluated = "evaluate" not in changed and (folder / "evaluate" / MANIFEST).exists()
    evaluation = evaluated and read_object(folder / "evaluate" / SUMMARY) or {}
    judged = experiment.evaluate is None or experiment.evaluate.judge is not None
    return {
        "name": folder.name,
        "title": experiment.title,
        "changed": [f"{stage}/{read[stage]}" for stage in sorted(changed)],
        "method": experiment.method,
        "record": _record(folder / "train"),
        "verdict": (read_object(run_dir / "report" / VERDICTS) or {}).get(experiment.name, ""),
        "epsilon": f"{experiment.criterion()['epsilon']:g}" if experiment.method == "epsilon_dpo" else "–",
        "criterion": IN_WORDS.get(experiment.criterion().get("criterion_dtype"), "–"),
        "beta_initial": f"{betas[0]:.4g}" if betas else f"{train.get('beta', 0.1):.4g}",
        "beta_final": f"{betas[1]:.4g}" if betas else "–",
        "win_rate": _with_interval(evaluation, "win_rate") if judged else ("no judge asked for", ""),
        "not_judged": _not_judged(evaluation),
        "length_controlled": _with_interval(evaluation, "length_controlled_win_rate"),
        "stages": [
            {
                "name": status.stage,
                "state": status.state,
                "kept": status.detail if status.state == "finished" else "",
                "link": link_to(status.folder / PAGE, run_dir) if (status.folder / PAGE).exists() else None,
            }
            for status in [*shared, *own]
        ],
        "time": as_time(sum(seconds)) if seconds else "–",
        "commit": commit_of(read_manifest(folder / "train") or {}) or "–",
    }


def _record(train_dir: Path) -> str:
    """What is wrong with the record of a training, in words; "" where nothing is."""
    try:
        return incompleteness(train_dir) or ""
    except DamagedRecord as damage:
        return str(damage)


def _betas(train_dir: Path) -> tuple[float, float] | None:
    """β before the first and after the last recorded step; None where these two rows cannot be read."""
    try:
        first, last = first_and_last_row(train_dir)
        return first["beta_before"], last["beta_after"]
    except (KeyError, TypeError, OSError, DamagedRecord):
        return None


def _with_interval(evaluation: dict[str, Any], name: str) -> tuple[str, str]:
    if name not in evaluation:
        return "–", ""
    return f"{evaluation[name]:.1f}", f"[{evaluation[f'{name}_low']:.1f}, {evaluation[f'{name}_high']:.1f}]"


def _not_judged(evaluation: dict[str, Any]) -> str:
    """How many comparisons are in no number, for an evaluation whose judge left some out."""
    failed = evaluation.get("n_failed", 0)
    return f"{failed} of {evaluation['n_total']} not judged" if failed else ""
