"""What a batch consists of, and which of its stages are due: on plans and manifests alone, nothing is run."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from epsdpo.batch.plan import check_names, plan_stages, standings
from epsdpo.batch.runner import _make_way
from epsdpo.batch.specs import STAGES, StageId, code_digests, settings_of
from epsdpo.experiment import ConfigError, check_experiment
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.paper.claims.settings import Claims
from epsdpo.report.collect import Run, provenance
from epsdpo.runs import reach
from epsdpo.runs.layout import NOTEBOOKS, STEP_COST, data_folder, finished_analyses, kept_in, pairs_folder, sft_folder
from epsdpo.runs.manifest import changed_outputs, commit_of, keep, write_manifest, write_stage_file

RUN = Path("runs/batch")


def experiment(name, method="epsilon_dpo", pairs=64, **values):
    config = {
        "name": name,
        "method": method,
        "train": {"beta": 0.1},
        "data": {"max_train_pairs": pairs},
        "evaluate": {},
    }
    return check_experiment({**config, **values}, where="test")


def four_experiments():
    """Three on one data set, of which the baseline comes last by name, and one on another."""
    return [
        experiment("a_eps"),
        experiment("b_eps", evaluate=None),
        experiment("c_dpo", method="dpo"),
        experiment("d_other", pairs=32),
    ]


def finish(stage, standing):
    """The manifest that a run of the stage would leave."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_manifest(
        stage.folder,
        stage=stage.stage,
        parameters=stage.parameters,
        facts={},
        parts=standing.parts,
        inputs=[],
        started=datetime.now(UTC),
        repository=REPOSITORY,
    )


def finish_all(planned):
    found = standings(planned)
    for stage_id, stage in planned.items():
        if stage.stage != "report":  # its key covers what lies in the folder
            finish(stage, found[stage_id])
    finish(planned[StageId("report", "report")], standings(planned)[StageId("report", "report")])


SFT = {"sft": {"learning_rate": 1.0e-5}}
ON_POLICY = {
    "source": "on_policy",
    "max_train_pairs": 64,
    "on_policy": {"ranker": {"model": "world"}, "max_new_tokens": 24},
}


def from_the_beginning(name, sft=SFT, **values):
    """An experiment that samples its pairs and fine-tunes first."""
    return experiment(name, data=ON_POLICY, model=sft, **values)


def names(stages):
    return [str(stage_id) for stage_id in stages]


def due(planned):
    return [str(stage_id) for stage_id, standing in standings(planned).items() if standing.due]


def test_stages_come_after_what_they_need():
    planned = plan_stages(four_experiments(), RUN)
    shared, other = data_folder(experiment("x")), data_folder(experiment("x", pairs=32))
    assert names(planned) == [
        f"{shared}/prepare",
        "c_dpo/train",
        "c_dpo/trajectory",
        "c_dpo/evaluate",
        "a_eps/train",
        "a_eps/trajectory",
        "a_eps/evaluate",
        "b_eps/train",
        "b_eps/trajectory",
        f"{other}/prepare",
        "d_other/train",
        "d_other/trajectory",
        "d_other/evaluate",
        "report/report",
    ]
    order = list(planned)
    for stage in planned.values():
        assert all(order.index(need) < order.index(stage.id) for need in stage.needs.values())
    compared = {
        stage.id.folder: stage.parameters.get("compare_with")
        for stage in planned.values()
        if stage.stage == "trajectory"
    }
    assert compared == {
        "c_dpo": None,
        "a_eps": "runs/batch/c_dpo/train",
        "b_eps": "runs/batch/c_dpo/train",
        "d_other": None,  # the baseline saw other pairs
    }


def test_a_launch_reaches_training_and_nothing_else():
    launch = {"launch_config": "cpu.yaml", "num_processes": 3}
    for stage in plan_stages([*four_experiments(), from_the_beginning("e_all")], RUN, launch).values():
        given = {name: stage.parameters[name] for name in launch if name in stage.parameters}
        assert given == (launch if stage.stage in ("train", "sft") else {})


def test_sampling_comes_before_prepare_and_sft_between_prepare_and_train():
    only = from_the_beginning("all")
    planned = plan_stages([only], RUN)
    pairs, data, sft = pairs_folder(only), data_folder(only), sft_folder(only)
    assert names(planned) == [
        f"{pairs}/sample",
        f"{data}/prepare",
        f"{sft}/sft",
        "all/train",
        "all/trajectory",
        "all/evaluate",
        "report/report",
    ]
    assert planned[StageId(data, "prepare")].needs == {"pairs": StageId(pairs, "sample")}
    assert planned[StageId(data, "prepare")].parameters["pairs_dir"] == f"runs/batch/{pairs}"
    assert planned[StageId(sft, "sft")].needs == {"data": StageId(data, "prepare")}
    for stage in ("train", "evaluate"):
        assert planned[StageId("all", stage)].needs["sft"] == StageId(sft, "sft")
        assert planned[StageId("all", stage)].parameters["sft_dir"] == f"runs/batch/{sft}"
    assert not plan_stages([only], RUN, failed={StageId(pairs, "sample")})
    assert names(plan_stages([only], RUN, failed={StageId(sft, "sft")})) == [f"{pairs}/sample", f"{data}/prepare"]


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"seed": 7, "title": "another", "train": {"beta": 0.5}}, ["sample", "prepare", "sft"]),
        ({"sft": {"sft": {"learning_rate": 2.0e-5}}}, ["sample", "prepare"]),
        ({"sft": {"sft": None}}, ["sample", "prepare"]),
        ({"train": {"beta": 0.1, "max_length": 128}}, ["sample"]),
        ({"train": {"beta": 0.1, "use_cpu": True}}, ["sample", "prepare"]),
        ({"sft": {**SFT, "dtype": "bfloat16"}}, []),
    ],
)
def test_what_comes_before_training_is_done_once_for_all_that_ask_for_the_same(change, shared):
    planned = plan_stages([from_the_beginning("a"), from_the_beginning("b", **change)], RUN)
    folders = {
        stage: [planned[stage_id].folder for stage_id in planned if stage_id.stage == stage]
        for stage in ("sample", "prepare", "sft")
    }
    wanted = {"sample": 2, "prepare": 2, "sft": 1 if change.get("sft") == {"sft": None} else 2}
    assert [stage for stage, own in folders.items() if len(own) < wanted[stage]] == shared
    assert all(len(own) == wanted[stage] for stage, own in folders.items() if stage not in shared)


def test_a_run_is_compared_with_a_baseline_of_the_same_start():
    baseline, other = from_the_beginning("dpo", method="dpo"), experiment("plain", data=ON_POLICY)
    planned = plan_stages([baseline, from_the_beginning("eps"), other], RUN)
    assert planned[StageId("eps", "trajectory")].parameters["compare_with"] == "runs/batch/dpo/train"
    assert "compare_with" not in planned[StageId("plain", "trajectory")].parameters  # it starts from another model


def test_another_sft_is_due_with_all_that_starts_from_it(tmp_path):
    finish_all(plan_stages([from_the_beginning("a")], tmp_path))
    changed = from_the_beginning("a", sft={"sft": {"learning_rate": 2.0e-5}})
    planned = plan_stages([changed], tmp_path)
    assert due(planned) == [f"{sft_folder(changed)}/sft", "a/train", "a/trajectory", "a/evaluate", "report/report"]
    assert "model.sft.learning_rate was 1e-05, is 2e-05" in standings(planned)[StageId("a", "train")].reason


def test_what_a_failure_takes_with_it():
    planned = plan_stages(four_experiments(), RUN, failed={StageId("c_dpo", "train")})
    assert not {"c_dpo/train", "c_dpo/trajectory", "c_dpo/evaluate"} & set(names(planned))
    assert "compare_with" not in planned[StageId("a_eps", "trajectory")].parameters
    assert StageId("report", "report") in planned
    prepare = StageId(data_folder(experiment("x")), "prepare")
    assert not plan_stages(four_experiments()[:3], RUN, failed={prepare})


def test_a_finished_batch_has_nothing_due(tmp_path):
    planned = plan_stages(four_experiments(), tmp_path)
    assert due(planned) == names(planned)
    finish_all(planned)
    assert due(planned) == []


@pytest.mark.parametrize(
    ("change", "reason", "stages"),
    [
        ({"train": {"beta": 0.2}}, "train.beta was 0.1, is 0.2", ["train", "trajectory", "evaluate"]),
        ({"seed": 7}, "seed was 42, is 7", ["train", "trajectory", "evaluate"]),
        ({"title": "another"}, "title was 'a_eps', is 'another'", ["trajectory", "evaluate"]),
        ({"evaluate": {"temperature": 0.5}}, "evaluate.temperature was 1.0, is 0.5", ["evaluate"]),
    ],
)
def test_a_change_makes_due_what_it_decides_and_what_follows(tmp_path, change, reason, stages):
    experiments = four_experiments()
    finish_all(plan_stages(experiments, tmp_path))
    planned = plan_stages([experiment("a_eps", **change), *experiments[1:]], tmp_path)
    assert due(planned) == [*(f"a_eps/{stage}" for stage in stages), "report/report"]
    standing = standings(planned)[StageId("a_eps", stages[0])]
    assert reason in standing.reason and standing.outdated


def test_interrupted_failed_and_deleted_stages_are_due_again(tmp_path):
    planned = plan_stages([experiment("eps")], tmp_path)
    finish_all(planned)
    train, parts = planned[StageId("eps", "train")], standings(planned)[StageId("eps", "train")].parts
    (train.folder / "manifest.json").unlink()
    for status, reason in (("running", "was interrupted"), ("failed", "failed before")):
        write_stage_file(train.folder, stage="train", parts=parts, started=datetime.now(UTC), status=status, error="")
        found = standings(planned)
        assert (found[StageId("eps", "train")].reason, found[StageId("eps", "train")].outdated) == (reason, False)
        assert found[StageId("eps", "evaluate")].reason == "eps/train is run again"
    shutil.rmtree(train.folder)
    assert standings(planned)[StageId("eps", "train")].reason == "not run yet"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the library and notebooks that a test may edit."""
    shutil.copytree(REPOSITORY / "epsdpo", tmp_path / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(reach, "PACKAGE", tmp_path / "epsdpo")
    return tmp_path


def code_of(stage, sources, method="epsilon_dpo"):
    return code_digests(stage, sources / "notebooks" / STAGES[stage].notebook, method)


DRAWN_BY_TRAJECTORY = {"trajectory", "report", "real_text", "compare"}
ANALYSES = {"trajectory", "evaluate", "report", "claims", "precision", "real_text", "compare"}


@pytest.mark.parametrize(
    ("file", "old", "new", "affected"),
    [
        ("epsdpo/methods/kernels.py", "import torch\n", "# A comment.\nimport torch  # and another\n\n\n", set()),
        ("epsdpo/methods/kernels.py", "The mathematics of", "In other words, the mathematics of", set()),
        (
            "epsdpo/methods/kernels.py",
            "TOKENS_PER_TILE_ON_CPU = 512",
            "TOKENS_PER_TILE_ON_CPU = 513",
            {"train", "evaluate", "claims", "precision", "real_text"},
        ),
        ("epsdpo/methods/metrics.py", "def pair_table(", "def unused():\n    return 1\n\n\ndef pair_table(", set()),
        ("epsdpo/methods/beta_dpo.py", "import ", "import math\nimport ", set()),  # of another method
        ("epsdpo/methods/catalogue.py", '    "dpo": ', '    "toy": Method(),\n    "dpo": ', set()),
        ("epsdpo/train/sft.py", "_IGNORED = -100", "_IGNORED = -101", {"sft"}),
        ("epsdpo/data/on_policy/rank.py", "return GoldRanker()", "return (GoldRanker)()[:]", {"sample"}),
        ("epsdpo/trajectory/summary.py", "def summarise(", "UNUSED = 1\n\n\ndef summarise(", set()),
        ("epsdpo/plots/trajectory.py", "linewidth=", "zorder=3, linewidth=", DRAWN_BY_TRAJECTORY),
        ("epsdpo/plots/interactive.js", "const", "\nconst", {"trajectory"}),
        ("epsdpo/batch/stage.py", "TIMED_OUT = 124", "TIMED_OUT = 125", set()),
        ("notebooks/02_train.ipynb", "steps = read_steps(output)", "steps = read_steps(output)[:]", set()),
        ("notebooks/02_train.ipynb", "train(experiment, prepared,", "train(experiment, prepared[:],", {"train"}),
        ("notebooks/02_train.ipynb", "load_prepared(resolve_path(", "load_prepared(list(", {"train"}),
        ("notebooks/03_beta_trajectory.ipynb", "if len(pairs):", "if len( pairs ):", set()),
        ("notebooks/05_report.ipynb", "shown.overview(results)", "shown.overview(results[:])", {"report"}),
    ],
)
def test_code_counts_where_it_is_reached_and_means_something_else(sources, file, old, new, affected):
    before = {stage: code_of(stage, sources) for stage in STAGES}
    change(sources / file, old, new)
    assert {stage for stage in STAGES if code_of(stage, sources) != before[stage]} == affected


def change(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def add_a_method(sources):
    (sources / "epsdpo" / "methods" / "toy.py").write_text("from epsdpo.methods.trainer import EpsilonDPOTrainer\n")
    change(
        sources / "epsdpo" / "methods" / "catalogue.py",
        '    "dpo": ',
        '    "toy": Method(trainer="epsdpo.methods.toy:Toy"),\n    "dpo": ',
    )


AFTER_TRAINING = {"trajectory", "evaluate", "report"}


@pytest.mark.parametrize(
    ("edit", "stages"),
    [
        (add_a_method, set()),
        (["methods/metrics.py", "def pair_table(", "def unused():\n    return 1\n\n\ndef pair_table("], set()),
        (["methods/metrics.py", "def pair_table(", "@pd.show\ndef pair_table("], {"train"} | AFTER_TRAINING),
        (
            ["methods/kernels.py", "TOKENS_PER_TILE_ON_CPU = 512", "TOKENS_PER_TILE_ON_CPU = 513"],
            {"train"} | AFTER_TRAINING,
        ),
        (["methods/beta_dpo.py", "import ", "import math\nimport "], set()),
        (["trajectory/summary.py", "def in_words(", "@pd.show\ndef in_words("], {"trajectory", "report"}),
        (["plots/trajectory.py", "linewidth=1.8", "linewidth=1.9"], {"trajectory", "report"}),
        (["evaluation/tables.py", "def headline(", "@pd.show\ndef headline("], {"evaluate", "report"}),
        (["train/launch.py", "def launch_training(", "@pd.show\ndef launch_training("], set()),
    ],
)
def test_what_an_edit_of_the_library_makes_due(sources, tmp_path, edit, stages):
    planned = plan_stages([experiment("a_dpo", method="dpo"), experiment("b_eps")], tmp_path)
    finish_all(planned)
    edit(sources) if callable(edit) else change(sources / "epsdpo" / edit[0], *edit[1:])
    assert {stage_id.stage for stage_id, standing in standings(planned).items() if standing.due} == stages


def test_what_differs_in_code_alone_is_kept_with_all_that_was_made_of_it(sources, tmp_path):
    planned = plan_stages([experiment("a_dpo", method="dpo"), experiment("b_eps")], tmp_path)
    finish_all(planned)
    change(
        sources / "epsdpo" / "methods" / "kernels.py", "TOKENS_PER_TILE_ON_CPU = 512", "TOKENS_PER_TILE_ON_CPU = 513"
    )
    changed = {f"{name}/{stage}" for name in ("a_dpo", "b_eps") for stage in ("train", "evaluate")}
    assert set(due(planned)) == changed | {"a_dpo/trajectory", "b_eps/trajectory", "report/report"}

    found = standings(planned, keep_results=True)
    assert {str(stage_id) for stage_id, standing in found.items() if standing.keeps} == changed
    assert [str(stage_id) for stage_id, standing in found.items() if standing.due] == ["report/report"]
    for stage_id, standing in found.items():
        if standing.keeps:
            keep(planned[stage_id].folder, standing.parts["code"], REPOSITORY)
    assert due(planned) == ["report/report"] and kept_in(tmp_path).keys() == changed
    finish(planned[StageId("report", "report")], standings(planned)[StageId("report", "report")])
    assert due(planned) == []

    # What is said of it, a row for each run.
    runs = [Run(tmp_path / name, experiment(name), None, {}, None) for name in ("a_dpo", "b_eps")]
    manifest = json.loads((tmp_path / "a_dpo" / "train" / "manifest.json").read_text(encoding="utf-8"))
    assert provenance(runs)["commit"].tolist() == [commit_of(manifest)] * 2
    assert ", kept by " in commit_of(manifest)
    assert provenance(runs)["kept results"].tolist() == [f"evaluate: {commit_of(manifest)}"] * 2

    # Code that changes once more is other code than they were kept for; what is run anew is no longer kept.
    change(
        sources / "epsdpo" / "methods" / "kernels.py", "TOKENS_PER_TILE_ON_CPU = 513", "TOKENS_PER_TILE_ON_CPU = 514"
    )
    assert changed < set(due(planned))
    evaluate = planned[StageId("b_eps", "evaluate")]
    (evaluate.folder / "summary.json").write_text('{"n_failed": 2}')
    found = standings(planned, keep_results=True)
    assert found[evaluate.id].due and found[evaluate.id].outdated  # it asks again, and by code as it is now
    assert "b_eps/evaluate (kept)" not in found[StageId("report", "report")].parts["inputs"]


def test_an_evaluation_with_comparisons_left_out_is_due_again(tmp_path):
    planned = plan_stages([experiment("eps")], tmp_path)
    finish_all(planned)
    summary = planned[StageId("eps", "evaluate")].folder / "summary.json"
    summary.write_text('{"n_failed": 0}')
    assert due(planned) == []
    summary.write_text('{"n_failed": 2}')
    standing = standings(planned)[StageId("eps", "evaluate")]
    assert (standing.reason, standing.outdated) == ("2 comparisons were not judged", False)
    assert due(planned) == ["eps/evaluate", "report/report"]


def test_what_was_answered_lies_where_no_stage_makes_way(tmp_path):
    planned = plan_stages([*four_experiments(), from_the_beginning("e_all")], tmp_path)
    asking = [stage for stage in planned.values() if stage.stage in ("sample", "evaluate")]
    folders = [Path(stage.parameters["keep_answers_in"]) for stage in asking]
    assert len(set(folders)) == len(folders) == 5  # two stages at once do not share one
    for stage in planned.values():
        assert not any(folder.is_relative_to(stage.folder) for folder in folders)


CHAT = {"kind": "chat", "model": "judge", "base_url": "http://localhost:1/v1"}


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        ({"batch_size": 3}, False),
        ({"judge": {**CHAT, "concurrency": 2, "timeout_seconds": 9.0, "max_retries": 0}}, False),
        ({"judge": {**CHAT, "base_url": "http://elsewhere:1/v1", "api_key_env": "KEY"}}, False),
        ({"judge": {**CHAT, "backoff_seconds": 2.0, "max_wait_seconds": 9.0}}, False),
        ({"judge": {**CHAT, "input_price": 1.0, "output_price": 2.0}}, False),
        ({"judge": {**CHAT, "temperature": 0.5}}, True),
        ({"judge": {**CHAT, "order": "both"}}, True),
        ({"judge": None}, True),
        ({"against": "given", "prompts": {"source": "a.json"}}, True),
    ],
)
def test_how_a_judge_is_reached_decides_nothing(change, decides):
    before = settings_of("evaluate", experiment("x", evaluate={"judge": CHAT}))
    after = settings_of("evaluate", experiment("x", evaluate={"judge": CHAT, **change}))
    assert (before != after) == decides


def test_a_template_counts_by_what_it_says(tmp_path):
    def settings(name, text):
        (tmp_path / name).write_text(text)
        return settings_of("evaluate", experiment("x", evaluate={"judge": {**CHAT, "template": str(tmp_path / name)}}))

    first = settings("a.txt", "one")
    assert settings("b.txt", "one") == first != settings("a.txt", "two")


def test_an_experiment_cannot_take_a_folder_of_the_run():
    for name in ("report", "answers"):
        with pytest.raises(ConfigError, match=f"'{name}' is a folder of the run itself"):
            check_names([experiment(name)])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 7}, True),
        ({"title": "another"}, True),
        ({"train": {"beta": 0.5}}, True),
        ({"train": {"beta": 0.1, "max_length": 128}}, False),
        ({"data": {"max_train_pairs": 63}}, False),
        ({"model": {"dtype": "bfloat16"}}, True),
        ({"model": {"revision": "0" * 40}}, False),
    ],
)
def test_experiments_share_prepared_data_only_if_it_would_come_out_the_same(change, same):
    assert (data_folder(experiment("x")) == data_folder(experiment("x", **change))) == same


def test_a_batch_that_tests_claims_ends_in_them(tmp_path):
    claims = Claims.model_validate(
        {
            "worlds": 2,
            "claims": [
                {"name": "better", "place": "Table 1", "says": "a over b", "measure": "win_rate", "of": ["eps"]}
                | {"minus": ["dpo"], "above": 0.0}
            ],
        }
    )
    experiments = [
        experiment(f"{name}-seed{world}", method=method, trajectory=False)
        for name, method in (("dpo", "dpo"), ("eps", "epsilon_dpo"))
        for world in (1, 2)
    ]
    planned = plan_stages(experiments, tmp_path, claims=claims)
    assert {stage.stage for stage in planned.values()} == {"prepare", "train", "evaluate", "claims", "precision"}
    tested = set(planned[StageId("claims", "claims")].needs)
    assert tested == {f"{name}-seed{world}/evaluate" for name in ("dpo", "eps") for world in (1, 2)}

    found = standings(planned)
    for stage_id, stage in planned.items():
        if stage.stage not in ("claims", "precision"):
            finish(stage, found[stage_id])
    for last in (StageId("claims", "claims"), StageId("precision", "precision")):
        finish(planned[last], standings(planned)[last])
    assert due(planned) == []
    # The time of a step is measured apart, and tested with the rest.
    (tmp_path / STEP_COST).parent.mkdir()
    (tmp_path / STEP_COST).write_text("{}")
    assert due(planned) == ["claims/claims", "precision/precision"]
    # A run that failed is not waited for.
    rest = plan_stages(experiments, tmp_path, failed=[StageId("eps-seed2", "train")], claims=claims)
    assert set(rest[StageId("claims", "claims")].needs) == tested - {"eps-seed2/evaluate"}


def test_a_study_on_real_text_joins_trainings_and_what_a_report_shows(tmp_path):
    experiments = [experiment(name, method="dpo", trajectory=False) for name in ("a", "b")]
    asked = plan_stages(experiments, tmp_path, real_text=True)
    last = StageId("real_text", "real_text")
    assert set(asked[last].needs) == {f"{name}/{stage}" for name in ("a", "b") for stage in ("train", "evaluate")}
    assert set(asked) - set(plan_stages(experiments, tmp_path)) == {last}  # beside the report, and only where asked
    for stage_id, stage in asked.items():
        finish(stage, standings(asked)[stage_id])
    assert due(asked) == []
    # Another training makes it due, and a title, which it shows.
    changed = [experiments[0], experiments[1].model_copy(update={"seed": 7})]
    assert last in {
        stage for stage, found in standings(plan_stages(changed, tmp_path, real_text=True)).items() if found.due
    }
    titled = [experiments[0], experiments[1].model_copy(update={"title": "another"})]
    assert last in {
        stage for stage, found in standings(plan_stages(titled, tmp_path, real_text=True)).items() if found.due
    }
    # A run that failed is not waited for.
    rest = plan_stages(experiments, tmp_path, failed=[StageId("b", "train")], real_text=True)
    assert set(rest[last].needs) == {"a/train", "a/evaluate"}
    with pytest.raises(ConfigError, match="'real_text' is a folder of the run itself"):
        check_names([experiment("real_text")])
    with pytest.raises(ConfigError, match="'decisions' is a folder of the run itself"):
        check_names([experiment("decisions")])


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "an object": lambda file: file.write_bytes(b"{}"),
    "a list": lambda file: file.write_bytes(b"[]"),
    "deep": lambda file: file.write_bytes(b"[" * 3000),
    "not UTF-8": lambda file: file.write_bytes(b'{"key": "\xff"}'),
    "no parts": lambda file: file.write_bytes(b'{"key": "k", "key_parts": {"code": []}}'),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("gone")),
}


@pytest.mark.parametrize("name", ["manifest.json", "stage.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_stage_of_which_nobody_can_say_what_it_holds_is_moved_aside_and_run(tmp_path, name, damage):
    planned = plan_stages([experiment("eps")], tmp_path)
    finish_all(planned)
    train, parts = planned[StageId("eps", "train")], standings(planned)[StageId("eps", "train")].parts
    if name == "stage.json":
        (train.folder / "manifest.json").unlink()
        write_stage_file(train.folder, stage="train", parts=parts, started=datetime.now(UTC))
    damage(train.folder / name)
    standing = standings(planned)[StageId("eps", "train")]
    assert standing.due and standing.outdated and not standing.made
    assert standing.reason == f"{name} cannot be read, and counts as not run"
    assert finished_analyses(tmp_path).keys() == {"eps/trajectory", "eps/evaluate"}
    _make_way(train, standing)
    assert not train.folder.exists() and len(list((tmp_path / "eps" / "superseded").iterdir())) == 1
    assert standings(planned)[StageId("eps", "train")].reason == "not run yet"


def test_other_keys_in_a_manifest_are_left_alone(tmp_path):
    planned = plan_stages([experiment("eps")], tmp_path)
    finish_all(planned)
    file = planned[StageId("eps", "train")].folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_a_later_version": 1}))
    assert due(planned) == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_summary_that_cannot_be_read_stops_no_plan(tmp_path, damage):
    planned = plan_stages([experiment("eps")], tmp_path)
    summary = planned[StageId("eps", "evaluate")].folder / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text('{"n_failed": 0}')
    finish_all(planned)
    damage(summary)
    assert due(planned) == []  # its manifest tells that it is not whole
    assert changed_outputs(planned[StageId("eps", "evaluate")].folder) != []
