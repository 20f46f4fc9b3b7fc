"""Benchmarks of a run folder, on results that a real run of lm-evaluation-harness left (tests/data/README.md).

The harness itself is run by make test-benchmarks; here it is not installed, which is one of the things to cope with.
"""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from epsdpo.__main__ import REFUSED, main
from epsdpo.batch.index import write_index
from epsdpo.evaluation.benchmarks.measure import measure_run
from epsdpo.evaluation.benchmarks.results import benchmark_table, percent, read_results, write_results
from epsdpo.evaluation.benchmarks.tasks import TABLE_8, Task, headline_score, tasks_named
from epsdpo.experiment import EXPERIMENT_FILE, check_experiment, save_experiment
from epsdpo.models.hub import model_identity
from epsdpo.runs.fingerprint import key_of
from epsdpo.runs.layout import finished_analyses

STORED = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "benchmarks.json.gz").read_bytes()))
DECISIVE = ("model", "dtype", "limit", "harness", "own_tasks", "task", "shots")


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with one trained experiment and the stored results, as if they were of its two models."""
    run_dir, reference = tmp_path / "run", tmp_path / "reference"
    for folder, content in ((reference, "reference"), (run_dir / "one" / "train" / "model", "policy")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model": content}), encoding="utf-8")
    (run_dir / ".epsdpo").mkdir()
    (run_dir / ".epsdpo" / "plan.json").write_text('{"stages": {}}', encoding="utf-8")
    values = {
        "name": "one",
        "title": "One <b>",
        "method": "dpo",
        "train": {"beta": 0.1},
        "model": {"name_or_path": str(reference), "dtype": "float32"},
    }
    save_experiment(check_experiment(values, where="test"), run_dir / "one" / EXPERIMENT_FILE)
    finish_training(run_dir, "first")
    sources = {"reference": reference, "policy": run_dir / "one" / "train" / "model"}
    write_results(
        run_dir / "one",
        {role: [of(measurement, source, role) for measurement in STORED[role]] for role, source in sources.items()},
    )
    return run_dir


def of(measurement, source, role):
    """A stored measurement, as if it had been made of the model in `source`."""
    measurement = {**measurement, "model": model_identity(str(source), None)}
    measurement["key"] = key_of({name: measurement[name] for name in DECISIVE})
    return {**measurement, "training": "first" if role == "policy" else None}


def finish_training(run_dir, key):
    manifest = {"stage": "train", "key": key, "key_parts": {}, "git": None, "seconds": 1.0}
    (run_dir / "one" / "train" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def with_version(monkeypatch):
    """Which harness is asked for; what is measured by another is not known of it."""
    return lambda version: monkeypatch.setattr("epsdpo.evaluation.benchmarks.measure.harness_version", lambda: version)


def measure(run_dir, *names, **settings):
    lines = []
    failures = measure_run(run_dir, tasks_named(list(names)), show=lines.append, **settings)
    return failures, "\n".join(lines)


def test_what_is_measured_is_not_measured_again(run_dir, with_version):
    with_version("0.4.13")
    before = read_results(run_dir / "one")
    failures, out = measure(run_dir)
    assert not failures
    assert out.count("measured before") == 12
    assert "measuring" not in out
    assert read_results(run_dir / "one") == before


@pytest.mark.parametrize(
    ("version", "settings"),
    [("0.5.0", {}), ("0.4.13", {"limit": 3}), ("0.4.13", {"include_path": "own"})],
    ids=["another version", "another limit", "tasks of one's own"],
)
def test_what_was_measured_otherwise_is_not_taken_for_it(run_dir, with_version, version, settings):
    """The process that is to measure ends at once here: that is told, for each model, and nothing is lost."""
    with_version(version)
    if "include_path" in settings:
        own = run_dir.parent / "own"
        own.mkdir()
        (own / "winogrande.yaml").write_text("task: winogrande", encoding="utf-8")
        settings = {"include_path": str(own)}
    before = read_results(run_dir / "one")
    failures, out = measure(run_dir, "winogrande", **settings)
    assert "measured before" not in out
    assert [failure.partition(": its process")[0] for failure in failures] == [
        "one/reference: winogrande",
        "one/policy: winogrande",
    ]
    assert read_results(run_dir / "one") == before
    assert "Error" in (run_dir / "one" / "benchmarks" / "harness.log").read_text(encoding="utf-8")


def test_a_policy_that_was_trained_anew_has_no_results(run_dir, with_version):
    with_version("0.4.13")
    (run_dir / "one" / "train" / "model" / "config.json").write_text("{}", encoding="utf-8")
    finish_training(run_dir, "second")
    assert "One" not in benchmark_table(run_dir)
    failures, out = measure(run_dir, "winogrande")
    assert len(failures) == 1 and failures[0].startswith("one/policy: winogrande")
    assert out.count("measured before") == 1  # the reference is what it was
    assert read_results(run_dir / "one")["policy"] == []


def test_the_same_weights_trained_anew_keep_their_results(run_dir, with_version):
    with_version("0.4.13")
    finish_training(run_dir, "second")
    failures, out = measure(run_dir)
    assert not failures and out.count("measured before") == 12
    assert {measurement["training"] for measurement in read_results(run_dir / "one")["policy"]} == {"second"}
    assert "One" in benchmark_table(run_dir)


def test_an_untrained_folder_is_refused(run_dir, with_version):
    with_version("0.4.13")
    (run_dir / "one" / "train" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no trained experiment"):
        measure(run_dir)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_a_missing_harness_is_refused_with_the_remedy(run_dir, capsys):
    assert main(["benchmark", str(run_dir)]) == REFUSED
    error = capsys.readouterr().err
    assert "pip install 'epsdpo[benchmarks]'" in error
    assert not (run_dir / "index.html").exists()


def test_the_table_has_every_model_and_task_with_its_error(run_dir):
    table = benchmark_table(run_dir)
    rows = [row.split("<td") for row in table.split("<tr>")[2:]]
    assert len(rows) == 2
    assert "reference: " in rows[0][1] and "One &lt;b&gt;" in rows[1][1]
    for row, role in zip(rows, ("reference", "policy"), strict=True):
        whole = {m["task"]: m for m in STORED[role] if m["limit"] is None}
        shares = [100 * whole[task.name]["scores"][task.score] for task in TABLE_8]
        errors = [100 * whole[task.name]["standard_errors"][task.score] for task in TABLE_8]
        for cell, share, error in zip(row[2:8], shares, errors, strict=True):
            assert f">{share:.1f} ± {error:.1f}<" in cell
        assert f">{sum(shares) / 6:.1f}<" in row[8]
    assert "lm-evaluation-harness 0.4.13" in table


def test_a_limited_result_is_shown_as_such_and_never_for_a_whole_one(run_dir):
    results = read_results(run_dir / "one")
    assert "first" not in benchmark_table(run_dir)  # though arc_challenge was asked with a limit, too
    kept = [m for m in results["policy"] if m["task"] != "winogrande" or m["limit"] is not None]
    write_results(run_dir / "one", {**results, "policy": kept})
    (limited,) = [m for m in kept if m["task"] == "winogrande"]
    table = benchmark_table(run_dir)
    assert f"(first {limited['limit']})" in percent(limited)
    assert percent(limited) in table and "not a result of the" in table
    assert table.count(">–<") == 1  # the policy has no average any more


def test_the_index_shows_the_table_and_the_report_is_due_again(run_dir):
    assert "Benchmarks" in write_index(run_dir).read_text(encoding="utf-8")
    before = finished_analyses(run_dir)
    results = read_results(run_dir / "one")
    write_results(run_dir / "one", {**results, "policy": results["policy"][1:]})
    assert finished_analyses(run_dir).keys() == before.keys() == {"one/benchmarks"}
    assert finished_analyses(run_dir) != before
    (run_dir / "one" / "benchmarks" / "results.json").unlink()
    assert "Benchmarks" not in write_index(run_dir).read_text(encoding="utf-8")


def test_a_task_without_a_share_is_refused():
    assert (
        headline_score(Task("own", "own"), {"f1,none": 0.5, "acc,none": 0.25, "acc_norm,none": 0.5}) == "acc_norm,none"
    )
    with pytest.raises(ValueError, match="perplexity,none, and not acc_norm or acc or exact_match"):
        headline_score(Task("own", "own"), {"perplexity,none": 8.0})
    with pytest.raises(ValueError, match="acc,none, and not exact_match,strict-match"):
        headline_score(TABLE_8[-1], {"acc,none": 0.5})
