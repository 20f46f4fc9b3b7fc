"""Worlds added where claims are open: which experiments are wanted, and a batch run look after look."""

import json

import pandas as pd
import pytest

from epsdpo.batch.rounds import CLAIMS, VERDICTS_TABLE, run_looks, wanted_experiments, worlds_wanted
from epsdpo.batch.runner import Failure, Outcome
from epsdpo.experiment import ConfigError, load_experiments
from epsdpo.experiment.worlds import by_recipe, in_world
from epsdpo.paper.claims.settings import Claims
from epsdpo.paper.claims.verdicts import CANNOT_BE_TOLD, HOLDS
from epsdpo.runs.layout import SUPERSEDED
from epsdpo.runs.manifest import MANIFEST

CLAIM = {"place": "Table 1", "says": "", "measure": "win_rate", "above": 0.0}
PLAN = Claims.model_validate(
    {
        "worlds": 6,
        "first_world": 11,
        "looks": [{"worlds": 2, "error": 0.01}, {"worlds": 4, "error": 0.02}, {"worlds": 6, "error": 0.02}],
        "claims": [
            {**CLAIM, "name": "one", "of": ["a"], "minus": ["b-beta0.1"]},
            {**CLAIM, "name": "other", "of": ["b-beta0.1"]},
        ],
        "figures": {"main": {"all": ["c"]}},
    }
)


def verdicts(**stood):
    rows = [{"name": name, "verdict": verdict, "looked_at": at, "worlds": at} for name, (verdict, at) in stood.items()]
    return pd.DataFrame(rows)


def leave_verdicts(page, table, finished="2026-01-01T00:00:00+00:00"):
    page.mkdir(parents=True, exist_ok=True)
    table.to_csv(page / VERDICTS_TABLE, index=False)
    if finished:
        (page / MANIFEST).write_text(json.dumps({"key": "of the page", "finished": finished}), encoding="utf-8")


@pytest.fixture
def experiments(tmp_path):
    text = "method: dpo\ntitle: {0}\ntrain: {{}}\nsweep:\n  {1}data.world.seed: [1, 2]\n"
    for name, more in (("a", ""), ("b", "train.beta: [0.1, 0.3]\n  "), ("c", "")):
        (tmp_path / f"{name}.yaml").write_text(text.format(name.upper(), more), encoding="utf-8")
    return load_experiments(tmp_path)


@pytest.mark.parametrize(
    ("table", "a", "b"),
    [
        (None, 2, 2),
        (verdicts(one=(HOLDS, 2), other=(HOLDS, 2)), 2, 2),
        (verdicts(one=(CANNOT_BE_TOLD, 2), other=(HOLDS, 2)), 4, 4),
        (verdicts(one=(HOLDS, 2), other=(CANNOT_BE_TOLD, 2)), 2, 4),
        (verdicts(one=(HOLDS, 2), other=(HOLDS, 6)), 2, 6),
        (verdicts(one=(HOLDS, 4), other=(CANNOT_BE_TOLD, 6)), 4, 6),
        (verdicts(one=(CANNOT_BE_TOLD, 0), other=(CANNOT_BE_TOLD, 0)), 2, 2),
        (verdicts(one=(CANNOT_BE_TOLD, 2)), 4, 4),  # a table of before a claim was added
    ],
)
def test_a_recipe_is_wanted_as_long_as_a_claim_on_it_is_open(table, a, b):
    assert worlds_wanted(PLAN, table) == {"a": a, "b-beta0.1": b}


def test_an_experiment_in_another_world_is_what_the_sweep_would_have_stated(experiments):
    by_name = {experiment.name: experiment for experiment in experiments}
    assert in_world(by_name["b-beta0.1-seed1"], 2) == by_name["b-beta0.1-seed2"]
    assert in_world(by_name["a-seed2"], 1) == by_name["a-seed1"]
    assert list(by_recipe(experiments)) == ["a", "b-beta0.1", "b-beta0.3", "c"]


def test_what_no_claim_needs_is_not_run(experiments, tmp_path):
    wanted = wanted_experiments(PLAN, experiments, tmp_path)
    assert [one.name for one in wanted] == ["a-seed11", "a-seed12", "b-beta0.1-seed11", "b-beta0.1-seed12"]
    assert {one.data.world.seed for one in wanted} == {11, 12}


@pytest.mark.parametrize("finished", ["2026-01-01T00:00:00+00:00", None])
def test_a_page_that_was_not_finished_or_is_of_no_looks_says_nothing(experiments, tmp_path, finished):
    table = verdicts(one=(CANNOT_BE_TOLD, 2), other=(HOLDS, 2))
    leave_verdicts(tmp_path / CLAIMS, table.drop(columns="looked_at") if finished else table, finished)
    assert len(wanted_experiments(PLAN, experiments, tmp_path)) == 4
    leave_verdicts(tmp_path / CLAIMS, table)
    assert len(wanted_experiments(PLAN, experiments, tmp_path)) == 8


def test_the_last_look_counts_though_the_next_one_has_moved_its_page(experiments, tmp_path):
    early, late = ("2026-01-01T09:00:00+00:00", "2026-01-01T10:00:00+00:00")
    aside = tmp_path / SUPERSEDED
    leave_verdicts(aside / f"{CLAIMS}-aaaaaaaa-2", OPEN, late)
    leave_verdicts(aside / f"{CLAIMS}-bbbbbbbb", verdicts(one=(HOLDS, 2), other=(HOLDS, 2)), early)
    leave_verdicts(tmp_path / CLAIMS, verdicts(one=(HOLDS, 2), other=(HOLDS, 2)), finished=None)
    assert len(wanted_experiments(PLAN, experiments, tmp_path)) == 8


def test_a_recipe_that_is_not_there_is_refused(experiments, tmp_path):
    with pytest.raises(ConfigError, match=r"a: no such recipe.*recipes here are b-beta0.1, b-beta0.3, c"):
        wanted_experiments(PLAN, [one for one in experiments if not one.name.startswith("a")], tmp_path)


class Batches:
    """Runs nothing: moves the page of claims aside and leaves the next; batch number `trouble` fails before that."""

    def __init__(self, run_dir, *tables, trouble=None):
        self.page, self.tables, self.trouble, self.ran = run_dir / CLAIMS, list(tables), trouble, []

    def __call__(self, experiments):
        self.ran.append(len(experiments))
        if self.page.exists():
            aside = self.page.parent / SUPERSEDED / f"{CLAIMS}-{len(self.ran)}"
            aside.parent.mkdir(exist_ok=True)
            self.page.rename(aside)
        failed = {}
        if len(self.ran) == self.trouble:
            failed = {"a-seed11/train": Failure(self.page, "it broke")}
        elif self.tables:
            leave_verdicts(self.page, self.tables.pop(0), f"2026-01-01T{len(self.ran):02}:00:00+00:00")
        return Outcome([], {}, failed, {}, "")


OPEN, DECIDED = (
    verdicts(one=(CANNOT_BE_TOLD, 2), other=(HOLDS, 2)),
    verdicts(one=(HOLDS, 4), other=(HOLDS, 2)),
)


def test_a_batch_goes_on_from_look_to_look_until_all_is_decided(experiments, tmp_path):
    said = []
    batches = Batches(tmp_path, OPEN, DECIDED)
    run_looks(PLAN, experiments, tmp_path, batches, tell=said.append)
    assert batches.ran == [4, 8] and len(said) == 2 and said[1].startswith("8 experiments")


def test_it_ends_when_worlds_are_spent(experiments, tmp_path):
    open_at = [verdicts(one=(CANNOT_BE_TOLD, at), other=(CANNOT_BE_TOLD, at)) for at in (2, 4, 6)]
    batches = Batches(tmp_path, *open_at)
    run_looks(PLAN, experiments, tmp_path, batches, tell=lambda _: None)
    assert batches.ran == [4, 8, 12]


def test_it_stops_where_something_failed_and_goes_on_from_there(experiments, tmp_path):
    broken = Batches(tmp_path, OPEN, trouble=2)
    assert run_looks(PLAN, experiments, tmp_path, broken, tell=lambda _: None).failed
    assert broken.ran == [4, 8]
    again = Batches(tmp_path, DECIDED)
    assert not run_looks(PLAN, experiments, tmp_path, again, tell=lambda _: None).failed
    assert again.ran == [8]
