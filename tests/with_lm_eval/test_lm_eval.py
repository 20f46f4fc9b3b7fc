"""lm-evaluation-harness for real: `make test-benchmarks`, as the harness is not in requirements.lock.

Models are random and data sets tiny, on disk and made up; task definitions, prompts and scoring are the harness's own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from kit import local_benchmarks as local

from epsdpo.evaluation.benchmarks.tasks import TABLE_8

FEW = [task.name for task in TABLE_8 if task.name != "mmlu"]  # whose 57 subjects take longer than all others


@pytest.fixture(scope="module")
def place(tmp_path_factory, official_tokenizer):
    """A working directory with the data sets, and in `run` two policies of one reference."""
    place = tmp_path_factory.mktemp("benchmarks")
    subjects = sorted((Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"))
    local.write_data_sets(place, [file.stem.removeprefix("mmlu_") for file in subjects])
    local.write_model(place / "reference", official_tokenizer, seed=0)
    local.write_run(place / "run", place / "reference", official_tokenizer, {"one": 1, "two": 2})
    return place


def benchmark(place, *arguments):
    """Exit code and both outputs of the command."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "epsdpo", "benchmark", "run", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def results(place, name):
    return json.loads((place / "run" / name / "benchmarks" / "results.json").read_text(encoding="utf-8"))


def logs(place):
    return {file: file.stat().st_size for file in place.glob("run/*/benchmarks/harness.log")}


@pytest.fixture(scope="module")
def measured(place):
    assert benchmark(place, "--tasks", *FEW)[::2] == (0, "")
    return place


def test_every_model_is_asked_as_table_8_says(measured):
    for name, role in (("one", "policy"), ("two", "policy"), ("one", "reference"), ("two", "reference")):
        found = {measurement["task"]: measurement for measurement in results(measured, name)[role]}
        for task in TABLE_8[1:]:
            measurement = found.pop(task.name)
            assert (measurement["score"], measurement["shots"]) == (task.score, task.shots)
            assert 0 <= measurement["scores"][task.score] <= 1
            assert measurement["standard_errors"][task.score] >= 0
            assert measurement["questions"] == local.QUESTIONS
        assert not found


def test_models_differ_and_a_shared_reference_is_asked_once(measured):
    def scores(name, role):
        return [measurement["scores"] for measurement in results(measured, name)[role]]

    assert scores("one", "policy") != scores("two", "policy")
    assert [m["finished"] for m in results(measured, "one")["reference"]] == [
        m["finished"] for m in results(measured, "two")["reference"]
    ]


def test_the_harness_shows_its_examples_to_the_model(measured):
    """The number of examples is the harness's to honour: without them its log would not name them."""
    log = (measured / "run" / "one" / "benchmarks" / "harness.log").read_text(encoding="utf-8")
    assert "num_fewshot of arc_challenge from None to 25" in log
    assert "num_fewshot of hellaswag from None to 10" in log


def test_the_same_command_measures_nothing_again(measured):
    before, content = logs(measured), results(measured, "one")
    code, out, _ = benchmark(measured, "--tasks", *FEW)
    assert code == 0
    assert out.count("measured before") == 4 * len(FEW)
    assert logs(measured) == before
    assert results(measured, "one") == content


def test_a_task_that_fails_stops_no_other(measured):
    """Of SciQ there is no data set here, and the hub is switched off."""
    code, _, err = benchmark(measured, "--tasks", "sciq", "winogrande", "--limit", "2")
    assert code == 1
    assert err.count("failed   one/policy: sciq: ") == 1 and err.count("failed   ") == 4
    limited = [m for m in results(measured, "two")["policy"] if m["limit"] == 2]
    assert [(m["task"], m["questions"]) for m in limited] == [("winogrande", 2)]
    assert "first 2" not in (measured / "run" / "index.html").read_text(encoding="utf-8")  # the whole one is known


def test_mmlu_is_measured_over_all_its_subjects(place):
    code, _, err = benchmark(place, "--tasks", "mmlu", "--limit", "1")
    assert (code, err) == (0, "")
    (mmlu,) = [m for m in results(place, "one")["policy"] if m["task"] == "mmlu"]
    assert (mmlu["score"], mmlu["questions"], mmlu["shots"]) == ("acc,none", 57, 5)
    assert "(first 1)" in (place / "run" / "index.html").read_text(encoding="utf-8")
