"""SFT on chosen responses: what is learnt, from which tokens, and interrupted runs. Models are tiny and real."""

import math
import shutil

import pytest
import torch
from kit import tiny_stages
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from epsdpo.data.prepared import load_prepared, prepare
from epsdpo.experiment import ConfigError
from epsdpo.methods.record import incompleteness, read_steps, read_total_steps
from epsdpo.models.start import after_sft, load_tokenizer, start_of
from epsdpo.train.preferences import train
from epsdpo.train.sft import demonstrations, finetune


def with_sft(values, **changes):
    model = {**values["model"], "sft": {**values["model"]["sft"], **changes}}
    return tiny_stages.experiment_of({**values, "model": model})


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A config of SFT on twelve conversations of the tiny pairs."""
    folder = tmp_path_factory.mktemp("models")
    settings = tiny_stages.settings(folder)
    pairs = tiny_stages.write_conversations(folder / "pairs.jsonl")
    return {**settings, "data": {"source": str(pairs)}}


@pytest.fixture(scope="module")
def prepared(values, tmp_path_factory):
    experiment = tiny_stages.experiment_of(values)
    tokenizer = load_tokenizer(experiment)
    return prepare(experiment.data, tokenizer, tmp_path_factory.mktemp("data"), max_length=64)


@pytest.fixture(scope="module")
def finished(values, prepared, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("sft")
    finetune(tiny_stages.experiment_of(values), prepared, folder)
    return folder


def test_what_is_learnt_are_the_chosen_ids_of_prepare(prepared):
    rows = demonstrations(prepared, max_length=64)
    assert len(rows) == len(prepared.train) == 12
    for row, pair in zip(rows, prepared.train, strict=True):
        assert row["input_ids"] == pair["prompt_ids"] + pair["chosen_ids"]
        assert [label for label in row["labels"] if label != -100] == pair["chosen_ids"]
        assert row["labels"][: len(pair["prompt_ids"])] == [-100] * len(pair["prompt_ids"])
    shortest = min(len(row["input_ids"]) for row in rows)
    assert {len(row["input_ids"]) for row in demonstrations(prepared, max_length=shortest - 1)} == {shortest - 1}


def test_the_first_loss_is_the_base_models_cross_entropy_on_the_responses(values, prepared, tmp_path):
    """All rows in one step, so that its loss is that of the weights as they were: by hand, per response token."""
    experiment = with_sft(values, global_batch_size=12, per_device_train_batch_size=3)
    finetune(experiment, prepared, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"], dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for pair in prepared.train:
        ids = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        targets = ids[0, 1:]
        response = slice(len(pair["prompt_ids"]) - 1, None)
        nats -= logps[response].gather(1, targets[response, None]).sum().item()
        tokens += len(pair["chosen_ids"])
    (step,) = read_steps(tmp_path).to_dict("records")
    assert step["loss"] == pytest.approx(nats / tokens, abs=1e-4)


def test_the_model_learns_and_keeps_its_template_and_its_ends(values, prepared, finished):
    steps = read_steps(finished)
    assert steps["step"].tolist() == [1, 2, 3] and read_total_steps(finished) == 3
    assert steps["loss"].iloc[-1] < steps["loss"].iloc[0] < 1.1 * math.log(356)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.chat_template == tiny_stages.TEMPLATE
    ends = GenerationConfig.from_pretrained(finished / "model").eos_token_id
    assert ends == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tiny_stages.TURN)])


class Killed(TrainerCallback):
    """Ends training at once in a step after the first checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut(values, prepared, tmp_path_factory):
    """The folder of a run that was interrupted after its second step, with a checkpoint of that."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_stages.experiment_of(values), prepared, folder, callbacks=[Killed()])
    return folder


def test_an_interrupted_run_ends_as_one_that_was_not(cut, values, prepared, finished, tmp_path):
    experiment = tiny_stages.experiment_of(values)
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    assert not (tmp_path / "model").exists() and read_steps(tmp_path)["step"].tolist() == [1, 2]
    finetune(experiment, prepared, tmp_path)
    assert read_steps(tmp_path)["step"].tolist() == [1, 2, 3]
    assert read_steps(tmp_path)["loss"].tolist() == read_steps(finished)["loss"].tolist()
    resumed, undisturbed = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, finished))
    for name, weight in undisturbed.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "halved"])
def test_a_damaged_checkpoint_begins_no_other_run(cut, values, prepared, finished, tmp_path, caplog, name, damage):
    """The one checkpoint that is kept: SFT begins from the start."""
    run = shutil.copytree(cut, tmp_path / "run")
    path = run / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage == "removed":
        path.unlink()
    finetune(tiny_stages.experiment_of(values), prepared, run)
    assert any("passing over" in message and name in message for message in caplog.messages)
    assert read_steps(run)["loss"].tolist() == read_steps(finished)["loss"].tolist()
    resumed, undisturbed = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished))
    assert all(torch.equal(resumed[name], weight) for name, weight in undisturbed.items())


@pytest.mark.parametrize("damage", ["removed", "garbage", "twice"])
def test_a_damaged_record_is_refused_or_begun_anew(cut, values, prepared, tmp_path, damage):
    run = shutil.copytree(cut, tmp_path / "run")
    first, second = (run / "steps.jsonl").read_bytes().splitlines(keepends=True)
    left = {"removed": b"", "garbage": b"\0\0\n" + second, "twice": first + first + second}[damage]
    (run / "steps.jsonl").write_bytes(left)
    with pytest.raises(ConfigError, match=r"tiny: .*checkpoint-2: .*steps\.jsonl.*--set train\.fresh_record=true"):
        finetune(tiny_stages.experiment_of(values), prepared, run)
    anew = tiny_stages.experiment_of({**values, "train": {**values["train"], "fresh_record": True}})
    finetune(anew, prepared, run)
    assert read_steps(run)["step"].tolist() == [3] and "begins at step 3" in incompleteness(run)


def test_policy_and_reference_start_from_the_sft_model(values, prepared, finished, tmp_path):
    """At step 1 the log-ratios of both are equal, and they are those of the SFT model and not of the base."""
    from epsdpo.methods.record import read_pairs

    experiment = tiny_stages.experiment_of(values)
    assert start_of(after_sft(experiment, finished)) == (str(finished / "model"), None)
    train(experiment, prepared, tmp_path, sft_dir=finished)
    first = read_pairs(tmp_path).query("step == 1")
    ids = dict(zip(prepared.train["pair_id"], prepared.train, strict=True))
    model = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32).eval()
    for row in first.itertuples():
        pair = ids[row.pair_id]
        tokens = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
        with torch.no_grad():
            logps = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
        expected = logps[len(pair["prompt_ids"]) - 1 :].sum().item()
        assert row.chosen_logps == pytest.approx(expected, abs=1e-3)
        assert row.ref_chosen_logps == pytest.approx(expected, abs=1e-3)


def test_a_start_that_does_not_fit_is_refused(values, prepared, finished, tmp_path):
    experiment = tiny_stages.experiment_of(values)
    without = tiny_stages.experiment_of({**values, "model": {**values["model"], "sft": None}})
    with pytest.raises(ConfigError, match="starts from an SFT model .* none is named"):
        train(experiment, prepared, tmp_path / "a")
    with pytest.raises(ConfigError, match="has no section model.sft"):
        train(without, prepared, tmp_path / "b", sft_dir=finished)
    with pytest.raises(ConfigError, match="no SFT model; run the stage"):
        after_sft(experiment, tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"sft\.learning_rate was 0\.001, is 0\.002"):
        finetune(with_sft(values, learning_rate=2.0e-3), prepared, finished)
    with pytest.raises(ConfigError, match="global_batch_size is 3, which 1 process"):
        finetune(with_sft(values, global_batch_size=3), prepared, tmp_path / "c")
    assert load_prepared(prepared.directory).report  # as it was


def test_a_template_is_a_file_or_another_models(values, prepared, finished):
    model = {**values["model"], "chat_template": str(finished / "model")}
    experiment = tiny_stages.experiment_of({**values, "model": model})
    assert load_tokenizer(experiment).chat_template == tiny_stages.TEMPLATE
    model["chat_template"] = values["model"]["name_or_path"]
    experiment = tiny_stages.experiment_of({**values, "model": model})
    with pytest.raises(ConfigError, match=r"model\.chat_template: the tokenizer of .* has none"):
        load_tokenizer(experiment)
