"""What a config names and cannot work with is refused by `check`, before training and before SFT, with what to do."""

import json
import logging
import re
import shutil

import pytest
import yaml
from kit.official import OFFICIAL, save_official_model
from transformers import AutoConfig

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.batch.check.configs import ERROR, WARNING, check_configs
from epsdpo.experiment import ConfigError
from epsdpo.train.preferences import main as train_main
from epsdpo.train.sft import main as sft_main

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def model(tmp_path):
    return save_official_model(tmp_path / "model")


@pytest.fixture
def write(tmp_path):
    """Write a config of a run on the official pairs, with changes to its sections."""

    def write_config(**changes):
        values = {
            "method": "epsilon_dpo",
            "data": {"source": str(OFFICIAL / "pairs.jsonl")},
            "train": {"global_batch_size": 8, "bf16": False, "use_cpu": True, "max_length": 128, "max_steps": 1},
        }
        for section, more in changes.items():
            values[section] = {**values.get(section, {}), **more} if isinstance(more, dict) else more
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write_config


def errors(path):
    [checked] = check_configs([path])
    return [finding.text for finding in checked.findings if finding.level == ERROR]


def make_adapter(model):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}', encoding="utf-8")


def few_embeddings(model):
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = 100
    config.save_pretrained(model)


def missing_shard(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


BROKEN = {
    "gone": (shutil.rmtree, "no such file or folder, seen from .*a hub id has the form owner/name"),
    "adapter": (make_adapter, "an adapter of 'owner/base', and no model. Merge it first .*or name its base model"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "it holds no weights"),
    "a shard is missing": (missing_shard, "lack the file model-00001-of-00002.safetensors, which .* names"),
    "a pointer": (
        lambda model: (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is a Git LFS pointer and no weights",
    ),
    "half a config": (lambda model: (model / "config.json").write_text('{"mod'), "its config.json cannot be used"),
    "a list": (lambda model: (model / "config.json").write_text("[]"), "its config.json is list, and no object"),
    "unknown": (lambda model: (model / "config.json").write_text('{"model_type": "x"}'), "config.json cannot be used"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "it holds no tokenizer"),
    "half a tokenizer": (lambda model: (model / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
    "embeddings": (few_embeddings, r"writes token \d+ .*the model's embedding has 100 rows. Use the tokenizer that"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_model_that_cannot_be_trained_is_refused_everywhere(
    model, write, tmp_path, capsys, monkeypatch, spoil, message
):
    for name in (None, "epsdpo"):  # those of other tests, whose streams are closed
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    spoil(model)
    path = write(model={"name_or_path": str(model), "sft": None})
    found = [text for text in errors(path) if text.startswith("model.name_or_path")]
    assert len(found) == 1 and re.search(message, found[0]), found
    assert train_main(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.search("^model.name_or_path", said, re.MULTILINE) and "Traceback" not in said
    assert not (tmp_path / "run" / "train" / "model").exists()


def test_a_folder_that_is_not_here_is_no_hub_id_and_a_hub_id_no_folder(write, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./model", "../model", "~/no/model", "/no/model", "a/b/c", "models/mine"):
        assert [text for text in errors(write(model={"name_or_path": name})) if "no such file or folder" in text], name
    assert errors(write(model={"name_or_path": "owner/name"})) == []


def test_other_models_and_files_that_are_not_here(write, model):
    judge = {"kind": "reward_model", "model": "./judge", "template": None}
    evaluate = {"prompts": {"source": "prompts.json"}, "judge": judge}
    found = errors(write(model={"name_or_path": str(model)}, evaluate=evaluate))
    assert [text.partition(" is ")[0] for text in found] == ["evaluate.judge.model", "evaluate.prompts.source"]
    found = errors(write(model={"name_or_path": str(model), "chat_template": "./none.jinja"}))
    assert found[0].startswith("model.chat_template is './none.jinja': no such file")


def test_a_missing_chat_template_names_its_key(write, model, tmp_path):
    row = {
        side: [{"role": "user", "content": "a"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    [found] = errors(write(model={"name_or_path": str(model)}, data={"source": str(tmp_path / "rows.jsonl")}))
    assert "has no chat template" in found and "Name one in model.chat_template (a .jinja file" in found
    (tmp_path / "t.jinja").write_text(TEMPLATE, encoding="utf-8")
    section = {"name_or_path": str(model), "chat_template": str(tmp_path / "t.jinja")}
    assert errors(write(model=section, data={"source": str(tmp_path / "rows.jsonl")})) == []


def test_evaluation_without_held_out_pairs_is_refused_where_a_config_is_read(write, model):
    for train, key in (
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps'"),
        ({"do_eval": True}, "do_eval is 'True'"),
    ):
        [found] = errors(write(model={"name_or_path": str(model)}, train=train))
        assert f"train.{key}, but there are no held-out pairs. Set data.eval_split (or data.eval_share" in found
    share = {"source": str(OFFICIAL / "pairs.jsonl"), "eval_share": 0.25}
    assert errors(write(model={"name_or_path": str(model)}, train={"eval_strategy": "steps"}, data=share)) == []


def test_half_precision_on_a_machine_without_a_gpu(write, model, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^bf16=True: this machine has no GPU .* set bf16=False .* or use_cpu=True"):
        EpsilonDPOConfig(str(tmp_path))  # as TRL's default has it
    with pytest.raises(
        ValueError, match="^fp16=True: the run is on a CPU, which has no float16. On a CPU set bf16=False"
    ):
        EpsilonDPOConfig(str(tmp_path), fp16=True)
    for key in ("bf16", "fp16"):
        path = write(model={"name_or_path": str(model)}, train={"use_cpu": False, "bf16": False, key: True})
        [checked] = check_configs([path])
        [found] = [finding for finding in checked.findings if finding.text.startswith(f"train.{key}: there is no GPU")]
        assert found.level == WARNING  # it may be meant for another machine
        assert train_main(["--config", str(path), "--output", str(tmp_path / key)]) == 2
        assert f"train.{key}=True" in capsys.readouterr().err
    [found] = errors(write(model={"name_or_path": str(model)}, train={"fp16": True}))
    assert found.startswith("train.fp16: train.use_cpu is true")


def test_sft_refuses_the_same(write, model, tmp_path, capsys):
    path = write(model={"name_or_path": str(model), "sft": {}})
    assert (
        train_main(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
    )  # it prepares, and has no SFT yet
    capsys.readouterr()
    for spoil, message in ((few_embeddings, "embedding has 100 rows"), (missing_shard, "model-00001-of-00002")):
        spoil(model)
        options = [
            "--config",
            str(path),
            "--data",
            str(tmp_path / "run" / "data"),
            "--train-dir",
            str(tmp_path / "sft"),
        ]
        assert sft_main(options) == 2
        assert message in capsys.readouterr().err


def test_the_trainer_itself_refuses_tokens_without_an_embedding(model, tmp_path, official_tokenizer, official_pairs):
    tokens = official_pairs.map(lambda row: {"chosen_ids": [*row["chosen_ids"], 10_000]})
    arguments = EpsilonDPOConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="writes token 10000 .*rows. Use the tokenizer that belongs to the model"):
        EpsilonDPOTrainer(str(model), args=arguments, train_dataset=tokens, processing_class=official_tokenizer)
