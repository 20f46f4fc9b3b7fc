"""Runs that are continued from what was damaged: passed over by name, or refused, and never another run without a word.

Runs are real, on the tiny reference models. One was left in its eighth step, with checkpoints after the third and the
sixth; every test hurts a copy of its folder.
"""

import json
import shutil

import pandas as pd
import pytest
import torch
from kit.official import OFFICIAL, save_official_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.batch.specs import settings_of
from epsdpo.data.prepared import prepare
from epsdpo.experiment import ConfigError, check_experiment, save_experiment
from epsdpo.methods.beta_dpo import BetaDPOTrainer
from epsdpo.methods.beta_dpo_config import BetaDPOConfig
from epsdpo.methods.checkpoint_files import FILES_LIST, read_list, require_listed, seal
from epsdpo.methods.record import DamagedRecord, incompleteness, read_pairs, read_steps
from epsdpo.models.start import load_tokenizer
from epsdpo.train.preferences import main, train

STEPS = 9
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json")


class Killed(TrainerCallback):
    """Ends training at once in its eighth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def make(official_tokenizer, official_pairs):
    """Build a trainer that writes to a folder; keyword arguments go to its config."""

    def make(folder, trainer=EpsilonDPOTrainer, config=EpsilonDPOConfig, callbacks=None, **settings):
        defaults = {
            "beta": 0.1,
            "epsilon": 0.05,
            "max_length": 128,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "linear",
            "bf16": False,
            "activation_checkpointing": False,
            "logging_steps": 5,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy", dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(OFFICIAL / "ref", dtype=torch.float32),
            args=config(str(folder), **{**defaults, **settings}),
            train_dataset=official_pairs,
            processing_class=official_tokenizer,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """An undisturbed run, with its trained weights in `model/`."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def killed(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KeyboardInterrupt):
        make(folder, callbacks=[Killed()]).train()
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    return folder


@pytest.fixture
def run(killed, tmp_path):
    """A copy of the killed run, for a test to hurt."""
    return shutil.copytree(killed, tmp_path / "run")


def assert_same_record(run, whole):
    columns = [column for column in read_steps(whole).columns if column != "seconds"]
    pd.testing.assert_frame_equal(read_steps(run)[columns], read_steps(whole)[columns], check_exact=True)
    pd.testing.assert_frame_equal(read_pairs(run), read_pairs(whole), check_exact=True)


def assert_continues_as_undisturbed(trainer, run, whole):
    trainer.train(resume_from_checkpoint=True)
    assert_same_record(run, whole)
    for name, weight in load_file(whole / "model" / "model.safetensors").items():
        assert trainer.model.state_dict()[name].equal(weight), name


def flip(path, place=0.7):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
}


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- files of theirs


DAMAGED = [*((name, damage) for name in FILES for damage in ("removed", "flipped"))]
DAMAGED += [*((name, damage) for name in (FILES[0], FILES[-1]) for damage in ("emptied", "halved"))]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_checkpoint_is_passed_over_by_name_or_refused(make, run, whole, caplog, name, damage):
    DAMAGES[damage](run / "checkpoint-6" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6.*{name}.*resume_from_checkpoint=True"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    trainer = make(run)
    assert_continues_as_undisturbed(trainer, run, whole)
    (said,) = [message for message in caplog.messages if message.startswith("passing over")]
    assert "checkpoint-6" in said and name in said


UNREADABLE = {
    "state-mapping": (lambda folder: (folder / "trainer_state.json").write_text("{}"), "trainer_state.json"),
    "state-list": (lambda folder: (folder / "trainer_state.json").write_text("[]"), "trainer_state.json"),
    "state-not-utf8": (lambda folder: (folder / "trainer_state.json").write_bytes(b'{"\xff": 1}'), "trainer_state"),
    "state-of-another-step": (
        lambda folder: rewrite(folder / "trainer_state.json", lambda state: state.update(global_step=3)),
        "is of step 3",
    ),
    "list-removed": (lambda folder: (folder / FILES_LIST).unlink(), FILES_LIST),
    "list-halved": (lambda folder: DAMAGES["halved"](folder / FILES_LIST), FILES_LIST),
    "list-of-nothing": (lambda folder: (folder / FILES_LIST).write_text("{}"), FILES_LIST),
    "a-file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "no folder"),
    "empty-folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "trainer_state.json"),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_what_is_no_checkpoint_is_passed_over_or_refused(make, run, whole, caplog, damage):
    hurt, said = UNREADABLE[damage]
    hurt(run / "checkpoint-6")
    for name in ("checkpoint-best", "checkpoint-abc"):
        (run / name).mkdir()
    with pytest.raises(ValueError, match=f"checkpoint-6.*{said}"):
        make(run).train(resume_from_checkpoint=run / "checkpoint-6")
    assert_continues_as_undisturbed(make(run), run, whole)
    for name in ("checkpoint-6", "checkpoint-best", "checkpoint-abc"):
        assert any(message.startswith("passing over") and name in message for message in caplog.messages), name


def test_what_was_passed_over_makes_way_for_the_checkpoint_of_its_step(make, run, whole):
    """Nothing of it becomes part of the new one, and with a limit of one the new one stays."""
    (run / "checkpoint-6" / "leftover").touch()
    flip(run / "checkpoint-6" / "model.safetensors")
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-8")
    with pytest.raises(KeyboardInterrupt):
        make(run, callbacks=[Killed()], save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (run / "checkpoint-6" / "leftover").exists()
    assert_continues_as_undisturbed(make(run, save_total_limit=1), run, whole)


def test_where_no_checkpoint_is_whole_the_run_begins_from_the_start(make, run, whole, caplog):
    for step in (3, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert_continues_as_undisturbed(make(run), run, whole)
    assert any("no checkpoint to go on from" in message for message in caplog.messages)


def test_the_checkpoint_before_is_there_until_the_list_of_the_next_is(make, tmp_path, monkeypatch):
    """A kill between the last file of transformers and the list costs the steps since the checkpoint before."""

    def kill(*_):
        raise KeyboardInterrupt

    trainer = make(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patched:
        saved = EpsilonDPOTrainer.add_to_checkpoint

        def kill_at_the_second(self, checkpoint):
            saved(self, checkpoint)
            if self.state.global_step == 6:
                patched.setattr("epsdpo.methods.resuming.seal", kill)

        patched.setattr(EpsilonDPOTrainer, "add_to_checkpoint", kill_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    beginning = make(tmp_path, save_total_limit=1)._find_beginning(True)
    assert beginning.checkpoint == tmp_path / "checkpoint-3" and not beginning.record_anew


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("beta=-0.1", {"beta": -0.1}),
        ("beta=nan", {"beta": float("nan")}),
        ("beta='0.1'", {"beta": "0.1"}),
        ("pairs_seen=None", {"pairs_seen": None}),
        (r"lacks .*settings\.epsilon", {"settings": {"beta": 0.1}}),
        (r"lacks settings\.beta", {"settings": None}),
        ("margins=", {"margins": {"mean": 0.0, "std": float("inf")}}),
        ("lacks margins", {"margins": ...}),
    ],
)
def test_a_state_that_no_training_comes_to_is_refused_though_its_list_fits(make, tmp_path, run, caplog, said, change):
    settings = {}
    if "margins" in change:
        settings = {"trainer": BetaDPOTrainer, "config": BetaDPOConfig}
        run = tmp_path / "beta_dpo"
        make(run, max_steps=3, **settings).train()
    newest = max(run.glob("checkpoint-*"))

    def put(state):
        entry = state["stateful_callbacks"]["EpsilonDPO"]["attributes"]
        entry.update(change)
        state["stateful_callbacks"]["EpsilonDPO"]["attributes"] = {k: v for k, v in entry.items() if v is not ...}

    rows = json.loads((newest / FILES_LIST).read_text())["rows"]
    rewrite(newest / "trainer_state.json", put)
    (newest / FILES_LIST).unlink()
    seal(newest, rows)
    with pytest.raises(ValueError, match=f"{newest.name}.*{said}"):
        make(run, **settings).train(resume_from_checkpoint=str(newest))
    assert make(run, **settings)._find_beginning(True).checkpoint != newest
    assert any("passing over" in message and newest.name in message for message in caplog.messages)


def test_weights_alone_are_no_checkpoint_to_go_on_from(make, tmp_path, caplog):
    make(tmp_path, max_steps=3, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-3.*optimizer\.pt and no scheduler\.pt and no rng_state\.pth"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert make(tmp_path)._find_beginning(True).checkpoint is None
    assert any("passing over" in message and "save_only_model" in message for message in caplog.messages)


@pytest.fixture(scope="module")
def of_trl(make, tmp_path_factory):
    """A checkpoint of plain TRL, whose trainer keeps neither β nor a list."""

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    folder = tmp_path_factory.mktemp("trl")
    make(folder, trainer=TokenisedDPOTrainer, max_steps=3).train()
    return folder


def test_a_checkpoint_of_another_trainer_is_continued_on_request_alone(make, of_trl, tmp_path, caplog):
    run = shutil.copytree(of_trl, tmp_path / "run")
    with pytest.raises(ValueError, match="step 3 holds no β.*fresh_beta=True"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert make(run)._find_beginning(True).checkpoint is None
    trainer = make(run, fresh_beta=True, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert read_steps(run)["step"].tolist() == [4, 5] and read_steps(run)["beta_before"][0] == 0.1
    assert "begins at step 4" in incompleteness(run)


@pytest.mark.parametrize("name", [*FILES[:4], "trainer_state.json"])
@pytest.mark.parametrize("damage", ["removed", "emptied", "halved"])
def test_and_not_if_it_is_damaged(make, of_trl, tmp_path, name, damage):
    run = shutil.copytree(of_trl, tmp_path / "run")
    DAMAGES[damage](run / "checkpoint-3" / name)
    with pytest.raises(ValueError, match=f"checkpoint-3.*{name}"):
        make(run, fresh_beta=True)._find_beginning(run / "checkpoint-3")


# ---------------------------------------------------------------------------------------------------------- the record


RECORD_DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "shortened": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 5 // 8]),
    "flipped": lambda path: flip(path, 0.55),
    "zeros": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size * 5 // 8].ljust(9000, b"\0") + b"\n"
    ),
}


def twice(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[3], *lines[4:]]))


def garbage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"step": 5, \xff\n', *lines[5:]]))


STEP_DAMAGES = {**RECORD_DAMAGES, "twice": twice, "garbage": garbage}
AFTER_STEP_3 = [
    *(("steps.jsonl", name) for name in STEP_DAMAGES if name not in ("removed", "emptied")),
    ("pairs.arrow", "shortened"),
    ("pairs.arrow", "flipped"),
]


@pytest.mark.parametrize(("name", "damage"), AFTER_STEP_3)
def test_a_run_goes_back_to_the_checkpoint_whose_rows_are_whole(make, run, whole, caplog, name, damage):
    """Of seven steps the damage is in those after the third."""
    STEP_DAMAGES[damage](run / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6.*{name}.*fresh_record=True"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert_continues_as_undisturbed(make(run), run, whole)
    (said,) = [message for message in caplog.messages if message.startswith("passing over")]
    assert "checkpoint-6" in said and name in said and "rows of the record" in said
    assert incompleteness(run) is None


FROM_THE_BEGINNING = [
    ("steps.jsonl", "removed"),
    ("steps.jsonl", "emptied"),
    ("pairs.arrow", "removed"),
    ("pairs.arrow", "emptied"),
    ("pairs.parquet", "emptied"),
]


@pytest.mark.parametrize(("name", "damage"), FROM_THE_BEGINNING)
def test_a_record_that_no_checkpoint_knows_is_refused_or_begun_anew(make, run, whole, name, damage):
    RECORD_DAMAGES[damage](run / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6.*{name}.*checkpoint-3.*fresh_record=True"):
        make(run).train(resume_from_checkpoint=True)
    trainer = make(run, fresh_record=True)
    trainer.train(resume_from_checkpoint=True)
    steps, expected = read_steps(run), read_steps(whole)
    assert steps["step"].tolist() == [7, 8, 9] and steps["loss"].tolist() == expected["loss"].tolist()[6:]
    assert read_pairs(run)["step"].unique().tolist() == [7, 8, 9]
    assert "INCOMPLETE: the record begins at step 7" in incompleteness(run)
    (moved,) = (run / "superseded").iterdir()
    assert {path.name for path in moved.iterdir()} >= {"steps.jsonl", "progress.json"} - {name}
    # The mark stays when the run is continued again.
    make(run, max_steps=11).train(resume_from_checkpoint=True)
    assert read_steps(run)["step"].tolist() == [7, 8, 9, 10, 11] and "step 7" in incompleteness(run)


def test_pairs_of_a_finished_part_are_compared_by_content(make, run, whole, tmp_path):
    """Those that an earlier continuation has moved into the Parquet file."""
    with pytest.raises(KeyboardInterrupt):
        make(run, callbacks=[Killed()]).train(resume_from_checkpoint=True)
    untouched = shutil.copytree(run, tmp_path / "untouched")
    flip(run / "pairs.parquet", 0.2)
    with pytest.raises(ValueError, match=r"pairs\.parquet.*fresh_record=True"):
        make(run).train(resume_from_checkpoint=True)
    assert_continues_as_undisturbed(make(untouched), untouched, whole)


def test_a_line_that_a_kill_has_torn_is_no_damage(make, run, whole, caplog):
    with (run / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    assert_continues_as_undisturbed(make(run), run, whole)
    assert not [message for message in caplog.messages if message.startswith("passing over")]


# ------------------------------------------------------------------------------------------------ one run in one folder


def test_a_folder_that_holds_a_run_is_refused_unless_asked(make, run, whole, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="run holds a run.*resume_from_checkpoint=True.*another output_dir"):
        make(run, save_steps=5).train()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    make(run, start_over=True, save_steps=5).train()
    assert_same_record(run, whole)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-9"}
    (moved,) = (run / "superseded").iterdir()
    assert {path.name for path in moved.iterdir()} >= {"steps.jsonl", "pairs.arrow", "checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize("left", ["steps.jsonl", "pairs.arrow", "checkpoint-3"])
def test_any_part_of_a_run_is_one(make, run, tmp_path, left):
    folder = tmp_path / "other"
    folder.mkdir()
    (run / left).rename(folder / left)
    with pytest.raises(ValueError, match="other holds a run"):
        make(folder).train()


def test_a_run_killed_before_its_first_step_is_none(make, tmp_path):
    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[Killed()]).train()
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="holds a run"):
        trainer.train()  # what it has trained there itself is a run as well


def test_a_checkpoint_of_another_folder_begins_a_record_and_mixes_none(make, run, whole, tmp_path):
    make(tmp_path / "branch").train(resume_from_checkpoint=str(run / "checkpoint-6"))
    steps = read_steps(tmp_path / "branch")
    assert steps["step"].tolist() == [7, 8, 9] and steps["loss"].tolist() == read_steps(whole)["loss"].tolist()[6:]
    assert "begins at step 7" in incompleteness(tmp_path / "branch")
    with pytest.raises(ValueError, match="branch holds a run"):
        make(tmp_path / "branch").train(resume_from_checkpoint=str(run / "checkpoint-3"))
    # An old run's later checkpoint beside a new record is not taken for the new run's.
    shutil.copytree(whole / "checkpoint-9", run / "checkpoint-9")
    assert make(run)._find_beginning(True).checkpoint == run / "checkpoint-6"


# ------------------------------------------------------------------------------------------------------------- the kit


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    model = save_official_model(tmp_path_factory.mktemp("models") / "model")

    def make(method="epsilon_dpo", **settings):
        section = {
            "beta": 0.1,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "max_length": 128,
            "max_steps": STEPS,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 5,
            "report_to": "none",
            "use_cpu": True,
            **settings,
        }
        values = {
            "name": "tiny",
            "method": method,
            "data": {"source": str(OFFICIAL / "pairs.jsonl")},
            "model": {"name_or_path": str(model)},
            "train": section,
        }
        return check_experiment(values, "test")

    return make


@pytest.fixture(scope="module")
def prepared(experiment, tmp_path_factory):
    start = experiment()
    tokenizer = load_tokenizer(start)
    return prepare(start.data, tokenizer, tmp_path_factory.mktemp("data") / "data", max_length=128)


@pytest.mark.parametrize("method", ["beta_dpo", "ipo", "tr_dpo", "simpo", "kto"])
def test_every_method_goes_back_to_what_is_whole(experiment, prepared, tmp_path, caplog, method):
    sync = {"ref_model_sync_steps": 2} if method == "tr_dpo" else {}
    run = experiment(method, **sync)
    train(run, prepared, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, prepared, tmp_path / "cut", callbacks=[Killed()])
    flip(tmp_path / "cut" / "checkpoint-6" / "optimizer.pt")
    train(run, prepared, tmp_path / "cut")
    assert_same_record(tmp_path / "cut", tmp_path / "whole")
    assert any("passing over" in message and "optimizer.pt" in message for message in caplog.messages)
    twice(tmp_path / "cut" / "steps.jsonl")
    with pytest.raises(DamagedRecord, match=r"steps\.jsonl: row 5 is of step 4 instead of 5"):
        read_steps(tmp_path / "cut")


def test_the_kit_says_what_it_refuses_and_how_to_go_on(experiment, prepared, tmp_path, capsys):
    """The key that starts the record anew makes no other config."""
    run_dir = tmp_path / "tiny"
    arguments = ["--config", str(run_dir / "experiment.yaml"), "--data", str(prepared.directory)]
    run_dir.mkdir()
    save_experiment(experiment(), run_dir / "experiment.yaml")
    with pytest.raises(KeyboardInterrupt):
        train(experiment(), prepared, run_dir / "train", callbacks=[Killed()])
    (run_dir / "train" / "steps.jsonl").unlink()
    assert main([*arguments, "--train-dir", str(run_dir / "train")]) == 2
    assert "--set train.fresh_record=true" in capsys.readouterr().err
    train(experiment(fresh_record=True), prepared, run_dir / "train")
    assert read_steps(run_dir / "train")["step"].tolist() == [7, 8, 9]
    for stage in ("prepare", "train", "evaluate"):
        assert settings_of(stage, experiment(fresh_record=True)) == settings_of(stage, experiment())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_only_model": True}, r"train\.save_only_model is True.*Set it to false"),
        ({"ignore_data_skip": True}, r"train\.ignore_data_skip is True.*Set it to false"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler: false.*Remove it"),
        ({"optim": "adalomo"}, r"train\.optim is 'adalomo'"),
        ({"start_over": True}, r"train\.start_over belongs elsewhere"),
    ],
)
@pytest.mark.parametrize("method", ["epsilon_dpo", "kto", "simpo"])
def test_what_a_run_could_not_resume_with_is_refused_where_it_resumes_by_itself(experiment, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        experiment(method, **settings)
    experiment(method, save_only_model=False, ignore_data_skip=False)


def test_a_checkpoint_written_over_what_a_killed_process_left_of_it_is_whole(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("model.safetensors", f"{FILES_LIST}.partial", FILES_LIST):
        (checkpoint / name).write_text("of the first process", encoding="utf-8")
    seal(checkpoint, None)
    listed = read_list(checkpoint)["files"]
    assert set(listed) == {"model.safetensors"}
    require_listed(checkpoint, listed)


def test_a_checkpoint_of_before_a_setting_came_is_gone_on_from(make, run):
    newest = max(run.glob("checkpoint-*"))
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    entry = state["stateful_callbacks"]["EpsilonDPO"]["attributes"]
    assert entry["settings"].pop("round_rotary_frequencies") is False
    make(run).require_same_run(state)
    with pytest.raises(ValueError, match="round_rotary_frequencies: False → True"):
        make(run, round_rotary_frequencies=True).require_same_run(state)
