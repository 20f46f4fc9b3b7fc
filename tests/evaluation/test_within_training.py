"""Figure 3's measurement: checkpoints of one tiny training, evaluated as its trained model is."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epsdpo.data.prepared import prepare
from epsdpo.evaluation.evaluate import evaluate
from epsdpo.evaluation.within_training import checkpoints_to_measure, measure_checkpoints
from epsdpo.experiment import ConfigError, DataSection, check_experiment
from epsdpo.plots.evaluation import within_training
from epsdpo.runs.layout import not_judged
from epsdpo.train.checkpoints import whole_checkpoints
from epsdpo.train.preferences import train
from epsdpo.world.language import TASKS, build_tokenizer, render, sample_instructions

PROMPTS, STEPS = 12, (2, 4)
TRAIN = {
    "epsilon": 0.05,
    "learning_rate": 5e-3,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "max_steps": 4,
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "use_cpu": True,
}


def values(**sections):
    evaluation = {"checkpoints": True, "max_new_tokens": 8, "bootstrap_samples": 50}
    return {"name": "tiny", "method": "epsilon_dpo", "train": TRAIN, "evaluate": evaluation, **sections}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with prepared data and a training of four steps that kept a checkpoint after the second and the fourth."""
    folder = tmp_path_factory.mktemp("within_training")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes, **tokens))
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")

    texts = [render(instruction) for instruction in sample_instructions(16 + PROMPTS, 0, "prompts")]
    rows = [
        {"prompt": said("user", text), "chosen": said("assistant", "blue red"), "rejected": said("assistant", "fig")}
        for text in texts[:16]
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = prepare(DataSection(source=str(folder / "pairs.jsonl")), tokenizer, folder / "data", max_length=64)
    held_out = texts[16:]
    ids = [
        tokenizer.apply_chat_template(said("user", text), add_generation_prompt=True)["input_ids"] for text in held_out
    ]
    names = [f"p{row}" for row in range(PROMPTS)]
    prompts = {"prompt_id": names, "instruction": held_out, "prompt_ids": ids, "task": TASKS[0]}
    pd.DataFrame(prompts).to_parquet(folder / "data" / "prompts.parquet")
    experiment = check_experiment(values(model={"name_or_path": str(folder / "start")}), where="test")
    train(experiment, data, folder / "train", callbacks=[])
    return folder, experiment


def said(role, text):
    return [{"role": role, "content": text}]


def test_the_last_checkpoint_measures_as_the_trained_model(trained, tmp_path):
    folder, experiment = trained
    checkpoints = checkpoints_to_measure(experiment, folder / "train")
    assert tuple(checkpoints) == STEPS
    final = evaluate(experiment, folder / "data", folder / "train", tmp_path / "out", tmp_path / "out").summary
    table = measure_checkpoints(experiment, folder / "data", checkpoints, tmp_path / "out", tmp_path / "out")
    assert tuple(table["step"]) == STEPS
    first, last = table.to_dict("records")
    assert {"win_rate_low", "forward_kl_per_response_high", "reverse_kl_per_response", "policy_tokens"} <= last.keys()
    assert {key: last[key] for key in last.keys() - {"step"}} == {key: final[key] for key in last.keys() - {"step"}}
    # Linear decay: the policy has moved by the second step, and has further to go.
    assert 0.0 < first["forward_kl_per_response"] < last["forward_kl_per_response"]

    # The reference has answered once; the last checkpoint's weights are the trained model's, which have answered too.
    generated = (tmp_path / "out" / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(generated) == 3 * PROMPTS
    responses = [pd.read_parquet(tmp_path / "out" / f"checkpoint-{step}" / "responses.parquet") for step in STEPS]
    assert responses[0]["reference_response"].tolist() == responses[1]["reference_response"].tolist()
    assert responses[0]["policy_response"].tolist() != responses[1]["policy_response"].tolist()

    # A checkpoint that is no longer measured leaves no result behind.
    measure_checkpoints(experiment, folder / "data", {}, tmp_path / "out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*/summary.json"))


def test_checkpoints_that_cannot_be_measured_are_refused_before_work(trained, tmp_path):
    folder, experiment = trained
    shutil.copytree(folder / "train", tmp_path / "train")
    newest = tmp_path / "train" / "checkpoint-4"
    (newest / "model.safetensors").rename(newest / "shard-0")
    with pytest.raises(ValueError, match="checkpoint-4 holds shards .* FULL_STATE_DICT"):
        checkpoints_to_measure(experiment, tmp_path / "train")
    (newest / "trainer_state.json").unlink()  # as a kill leaves it
    assert (
        list(checkpoints_to_measure(experiment, tmp_path / "train"))
        == list(whole_checkpoints(tmp_path / "train"))
        == [2]
    )
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpoints_to_measure(experiment, tmp_path)
    off = experiment.model_copy(update={"evaluate": experiment.evaluate.model_copy(update={"checkpoints": False})})
    assert checkpoints_to_measure(off, tmp_path) == {}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": "some/model", "lora": {"r": 4}}}, "adapters alone"),
        ({"train": TRAIN | {"save_strategy": "no"}}, "there will be none"),
        (
            {
                "evaluate": {
                    "checkpoints": True,
                    "engine": "server",
                    "server": {"base_url": "http://localhost:1", "policy": "a", "reference": "b"},
                }
            },
            "not for each checkpoint",
        ),
    ],
)
def test_a_config_that_leaves_nothing_to_measure_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        check_experiment(values(**sections), where="test")


def test_comparisons_of_checkpoints_count_as_not_judged(tmp_path):
    for place, failed in ((".", 1), ("checkpoint-2", 0), ("checkpoint-4", 3)):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "summary.json").write_text(json.dumps({"n_failed": failed}), encoding="utf-8")
    assert not_judged(tmp_path) == 4


def test_the_figure_has_a_panel_for_what_was_measured():
    """Win rates may be missing where fewer than two comparisons of a checkpoint were judged."""
    kl = {"forward_kl_per_response": [0.5, 2.0]}
    rate = {"win_rate": [55.0, math.nan]}
    table = pd.DataFrame({"step": STEPS, **kl, **rate})
    for measure in (*kl, *rate):
        table[f"{measure}_low"], table[f"{measure}_high"] = table[measure] - 0.25, table[measure] + 0.25
    figure = within_training(table, "title")
    figure.canvas.draw()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "KL(π_ref‖π) per response (nats), 95 % interval",
        "win rate (%), 95 % interval",
    ]
    (points,) = figure.axes[0].containers
    assert points.lines[0].get_xydata().tolist() == [[2, 0.5], [4, 2.0]]
    alone = within_training(table.drop(columns=[name for name in table if "win_rate" in name]), "title")
    assert len(alone.axes) == 1
