"""A GGUF file in place of a model: the same numbers as the weights that it was written from, known by its content."""

import copy
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from kit.official import OFFICIAL
from kit.tiny_gguf import TEMPLATE, TEXTS, tiny_llama, tiny_tokenizer, write_gguf
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from epsdpo.batch.check.configs import ERROR, OK, check_configs
from epsdpo.batch.plan import plan_stages, standings
from epsdpo.batch.runner import _settle, run_batch
from epsdpo.batch.specs import settings_of
from epsdpo.experiment import ConfigError, claim_folder, load_experiment
from epsdpo.experiment.gguf_file import GgufError, content_of
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.record import read_steps
from epsdpo.models import gguf
from epsdpo.models.gguf import as_folder, weights_in_words
from epsdpo.models.start import load_tokenizer, pin_revision, read_chat_template, start_of
from epsdpo.models.weights import load_scoring_model

Q8_0, Q4_1 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
EXECUTED = ("prepare", "train", "evaluate")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of each test's own, and of this process's memory."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EPSDPO_CACHE", str(folder))
    monkeypatch.setattr(gguf, "_known", {})
    return folder


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


def converted(file):
    folder, revision = as_folder(str(file))
    assert revision is None
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(60).reshape(2, 30) * 5 % model.config.vocab_size).logits


@pytest.mark.parametrize("tied", [True, False])
def test_whole_numbers_come_back_to_the_bit(tmp_path, tied):
    original = tiny_llama(tied=tied)
    file = write_gguf(tmp_path / "tiny.gguf", original)
    model, _ = converted(file)
    with safe_open(f"{as_folder(str(file))[0]}/model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings is tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert torch.equal(logits(model), logits(original))
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(("kind", "levels"), [(Q8_0, 254), (Q4_1, 15)])
def test_quantised_weights_are_those_of_the_file_and_within_half_a_level_of_the_original(tmp_path, kind, levels):
    original = tiny_llama()
    model, _ = converted(write_gguf(tmp_path / "tiny.gguf", original, kind))
    expected = copy.deepcopy(original)
    for name, weight in expected.named_parameters():
        if weight.ndim == 2:
            weight.data = torch.from_numpy(dequantize(quantize(weight.detach().numpy(), kind), kind))
            blocks = dict(original.named_parameters())[name].detach().reshape(-1, 32)
            width = 2 * blocks.abs().amax(1) if kind is Q8_0 else blocks.amax(1) - blocks.amin(1)
            error = (dict(model.named_parameters())[name].detach().reshape(-1, 32) - blocks).abs().amax(1)
            # 2⁻¹¹ of the largest is what rounding scale and offset to half precision may add.
            assert (error <= width / levels / 2 + 2**-10 * blocks.abs().amax(1)).all() and error.max() > 0
    assert torch.equal(logits(model), logits(expected)) and not torch.equal(logits(model), logits(original))


def test_tokens_and_chat_template_are_those_of_the_file(file):
    _, tokenizer = converted(file)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    own = tiny_tokenizer()
    for text in [*TEXTS, "a\n\n12 boats  34", "<|im_start|>user\nÜber 😀<|im_end|>"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_digits_would_be_read_otherwise_as_gpt_2_does_and_an_unknown_way_is_warned_of(tmp_path, caplog):
    text = "legs\n\n12"
    own = tiny_tokenizer().encode(text).ids
    _, as_gpt_2 = converted(write_gguf(tmp_path / "a.gguf", tiny_llama(), split="gpt-2"))
    assert as_gpt_2(text)["input_ids"] != own and "take texts apart" not in caplog.text
    converted(write_gguf(tmp_path / "b.gguf", tiny_llama(), split="of-its-own"))
    assert "its tokenizer is said to take texts apart as 'of-its-own', which is not known here" in caplog.text


def cut(share):
    def spoil(file):
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return spoil


BROKEN = {
    "empty": (lambda file: file.write_bytes(b""), "is empty, and a GGUF file begins with"),
    "a pointer": (lambda file: file.write_text("version https://git-lfs"), "is a Git LFS pointer, and a GGUF file"),
    "another kind": (lambda file: file.write_bytes(b"PK\3\4" * 99), r"begins with b'PK\x03\x04', and a GGUF file"),
    "cut in the head": (cut(0.01), "is cut off or damaged"),
    "cut in the weights": (cut(0.9), "is cut off or damaged"),
    "one byte short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is cut off or damaged"),
    "unknown": (lambda file: write_gguf(file, tiny_llama(), architecture="of-mine"), "transformers cannot read it"),
    "lacks a tensor": (
        lambda file: write_gguf(file, tiny_llama(), without="blk.1.ffn_up.weight"),
        "it has no model.layers.1.mlp.up_proj.weight, which would be random",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_leaves_nothing(file, cache, spoil, message):
    spoil(file)
    with pytest.raises(GgufError) as refusal:
        as_folder(str(file))
    said = str(refusal.value)
    assert message in said and repr(str(file)) in said and said.count("\n") == 0
    assert "Fetch or write it again" in said or "Name a GGUF file" in said
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_file_that_is_not_here_or_not_the_one_that_was_meant(file, tmp_path):
    with pytest.raises(GgufError, match=r"gone.gguf': No such file or directory, seen from .*Check the path"):
        as_folder(str(tmp_path / "gone.gguf"))
    content = content_of(str(file))
    assert as_folder(str(file), content) == as_folder(str(file))
    with pytest.raises(GgufError, match=f"is {content}, and revision says 'main'. Name the file of that content"):
        as_folder(str(file), "main")


def test_without_the_package_that_reads_it(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GgufError, match="the package gguf, which reads such files, is not installed.*pip install gguf"):
        as_folder(str(file))


def test_without_room_on_the_disk(file, cache, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(GgufError, match=rf"weights take 0.0 GB as float32, and {cache} has .* set EPSDPO_CACHE"):
            as_folder(str(file))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a full disk does, it ends a write in the middle
    try:
        with pytest.raises(GgufError, match=f"cannot be kept in {cache}: .*Make room there, or set EPSDPO_CACHE"):
            as_folder(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
    as_folder(str(file))


def test_a_file_is_converted_once_wherever_it_lies_and_anew_when_it_changed(file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "epsdpo")
    folder, _ = as_folder(str(file))
    weights = Path(folder, "model.safetensors").stat().st_mtime_ns
    moved = str(shutil.copy(file, tmp_path / "Moved.GGUF"))
    gguf._known.clear()  # as in another process
    assert as_folder(moved) == (folder, None)
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == weights
    assert caplog.text.count("to float32, once for all runs") == 1
    write_gguf(file, tiny_llama(seed=1))
    assert as_folder(str(file))[0] != folder
    shutil.rmtree(folder)
    assert as_folder(moved) == (folder, None) and Path(folder, "model.safetensors").exists()


def test_what_lies_beside_the_file_is_no_part_of_it(file, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("another", encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}', encoding="utf-8")
    model, tokenizer = converted(file)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == TEMPLATE


def test_of_several_processes_one_converts_and_all_get_the_same(file):
    program = (
        "import logging, sys\nlogging.basicConfig(level='INFO')\nfrom epsdpo.models.gguf import as_folder\n"
        f"print(as_folder({str(file)!r})[0])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in running]
    assert outputs[0][0] == outputs[1][0] == as_folder(str(file))[0] + "\n"
    assert sum(error.count("to float32, once for all runs") for _, error in outputs) == 1


def test_how_the_file_held_its_weights_in_words(file, tmp_path):
    assert weights_in_words(str(file)) == "weights as in the file (F32 100 %)"
    quantised = write_gguf(tmp_path / "q.gguf", tiny_llama(), Q4_1)
    assert weights_in_words(str(quantised)) == "4-bit weights (Q4_1 100 %), dequantised"


@pytest.fixture
def write(tmp_path):
    """Write a config of a run on the official pairs, with changes to its sections."""

    def write_config(**changes):
        values = {
            "method": "epsilon_dpo",
            "data": {"source": str(OFFICIAL / "pairs.jsonl")},
            "train": {
                "global_batch_size": 8,
                "per_device_train_batch_size": 4,
                "bf16": False,
                "use_cpu": True,
                "max_length": 128,
                "max_steps": 2,
            },
            **changes,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write_config


def found(path, level):
    [checked] = check_configs([path])
    return [finding.text for finding in checked.findings if finding.level == level]


def test_check_names_the_key_wherever_a_config_names_such_a_file(file, write, tmp_path):
    spoilt = tmp_path / "spoilt.gguf"
    spoilt.write_bytes(file.read_bytes()[:-1])
    judge = {"kind": "causal_lm", "model": str(spoilt), "template": None}
    for name, said in ((str(spoilt), "is cut off or damaged"), ("gone.gguf", "no such file or folder")):
        judge["model"] = name
        path = write(model={"name_or_path": name}, evaluate={"prompts": {"source": str(file)}, "judge": judge})
        errors = [text for text in found(path, ERROR) if said in text]
        assert [text.split()[0].rstrip(":") for text in errors] == ["model.name_or_path", "evaluate.judge.model"]
    path = write(model={"name_or_path": str(file)})
    assert found(path, ERROR) == []
    assert f"model.name_or_path: {file} is {content_of(str(file))}, weights as in the file (F32 100 %)" in found(
        path, OK
    )
    assert any(text.startswith("memory: ") for text in found(path, OK))


def test_content_decides_and_neither_name_nor_time(file, write, tmp_path):
    def keys(name, **more):
        judge = {"kind": "causal_lm", "model": name, "template": None}
        experiment = load_experiment(
            write(model={"name_or_path": name, **more}, evaluate={"prompts": {"source": "p.json"}, "judge": judge})
        )
        return {stage: settings_of(stage, experiment) for stage in ("prepare", "train", "evaluate")}

    first = keys(str(file))
    moved = str(shutil.copy(file, tmp_path / "moved.gguf"))
    os.utime(file, (0, 0))
    assert keys(str(file)) == keys(moved) == first == keys(moved, revision=content_of(moved))
    write_gguf(file, tiny_llama(seed=1))
    changed = keys(str(file))
    assert all(changed[stage] != first[stage] for stage in first)


def test_a_chat_judge_of_such_a_name_is_a_server_s_own(file, write, monkeypatch):
    monkeypatch.chdir(file.parent)
    server = {"kind": "chat", "model": file.name, "base_url": "http://127.0.0.1:1/v1"}
    evaluate = {"prompts": {"source": "p.json"}, "judge": server}
    experiment = load_experiment(write(model={"name_or_path": "owner/name"}, evaluate=evaluate))
    assert settings_of("evaluate", experiment)["evaluate"]["judge"]["model"] == file.name


def test_a_folder_goes_on_with_the_same_content_alone(file, write, tmp_path):
    experiment = load_experiment(write(model={"name_or_path": str(file)}))
    claimed = claim_folder(experiment, tmp_path / "run", pin_revision)
    assert claimed.model.revision == content_of(str(file))
    moved = load_experiment(write(model={"name_or_path": str(shutil.copy(file, tmp_path / "moved.gguf"))}))
    assert claim_folder(moved, tmp_path / "run", pin_revision).model.revision == claimed.model.revision
    write_gguf(file, tiny_llama(seed=1))
    with pytest.raises(ConfigError, match="results of another config .model.revision was 'sha256:.*, is 'sha256:"):
        claim_folder(experiment, tmp_path / "run", pin_revision)
    with pytest.raises(ConfigError, match="model.name_or_path: .* and revision says"):
        start_of(claimed)


def test_a_judge_is_known_by_the_content_of_its_file(file, tmp_path):
    names = []
    for name in (str(file), str(shutil.copy(file, tmp_path / "moved.gguf"))):
        settings = JudgeSection(kind="causal_lm", model=name, template=None)
        model, tokenizer, weights = load_scoring_model(AutoModelForCausalLM, settings, "evaluate.judge")
        assert torch.equal(logits(model), logits(tiny_llama())) and tokenizer.chat_template == TEMPLATE
        names.append(weights)
    assert names[0] == names[1] and names[0].startswith("sha256:")
    settings = settings.model_copy(update={"revision": "sha256:0"})
    with pytest.raises(ConfigError, match="^evaluate.judge.model: .* and revision says 'sha256:0'"):
        load_scoring_model(AutoModelForCausalLM, settings, "evaluate.judge")


def test_another_model_takes_the_chat_template_of_such_a_file(file):
    assert read_chat_template(str(file)) == TEMPLATE


def test_an_experiment_from_check_to_evaluation(file, write, tmp_path):
    """Reference and policy start from the converted weights, manifests say of which file, and content alone is due."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"tell me about the {thing}:"}) for thing in ("soup", "clock")]
    prompts.write_text("\n".join(rows), encoding="utf-8")
    evaluate = {
        "prompts": {"source": str(prompts), "column": "prompt"},
        "judge": None,
        "max_new_tokens": 4,
        "bootstrap_samples": 20,
    }
    others = {"evaluate": evaluate, "trajectory": False}
    path = write(model={"name_or_path": str(file)}, **others)
    assert found(path, ERROR) == []
    run_dir = tmp_path / "run"
    experiment = _settle(load_experiment(path), run_dir)
    stages = plan_stages([experiment], run_dir)
    outcome = run_batch([experiment], run_dir)
    assert not outcome.failed and not outcome.not_run
    folders = {stage.stage: stage.folder for stage in stages.values()}
    facts = {"file": str(file), "content": content_of(str(file)), "weights": "weights as in the file (F32 100 %)"}
    for stage in EXECUTED:
        manifest = json.loads((folders[stage] / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["gguf"] == {"model.name_or_path": facts}
        assert manifest["model"] == {"name_or_path": str(file), "revision": facts["content"]}
    assert read_steps(folders["train"]).iloc[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference alike
    trained = AutoModelForCausalLM.from_pretrained(folders["train"] / "model")
    distance = max((a - b).abs().max() for a, b in zip(trained.parameters(), tiny_llama().parameters(), strict=True))
    assert 0 < distance < 1e-3
    assert load_tokenizer(experiment).chat_template == TEMPLATE

    def due(name):
        experiment = _settle(load_experiment(write(model={"name_or_path": name}, **others)), run_dir)
        planned = plan_stages([experiment], run_dir)
        return [id.stage for id, standing in standings(planned).items() if standing.due and id.stage in EXECUTED]

    moved = str(file.rename(tmp_path / "moved.gguf"))
    assert due(moved) == []
    write_gguf(tmp_path / "moved.gguf", tiny_llama(seed=1))
    assert due(moved) == list(EXECUTED)
