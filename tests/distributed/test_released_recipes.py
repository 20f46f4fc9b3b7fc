"""The released recipes as they are but for model and data, in this process and through accelerate in two."""

import json

import pytest
import yaml
from kit.launching import REPOSITORY, launcher, run, train_here
from safetensors.torch import load_file
from transformers import AutoTokenizer

from epsdpo.experiment import load_experiment
from epsdpo.methods.record import read_pairs, read_steps

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tiny_ultrafeedback(tmp_path, official):
    """Rows as princeton-nlp's sets have them: a prompt string, and whole conversations as chosen and rejected."""
    folder = tmp_path / "ultrafeedback"
    folder.mkdir()
    lines = (official / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        row = json.loads(line)
        user = {"role": "user", "content": row["prompt"]}
        rows.append(
            {
                "prompt": row["prompt"],
                **{
                    side: [user, {"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")
                },
            }
        )
    for split, part in {"train": rows[:36], "test": rows[36:44]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", ["table1_llama3", "table1_mistral"])
def test_released_recipes_run_with_model_and_data_swapped(recipe, processes, tiny_ultrafeedback, official, tmp_path):
    values = load_experiment(REPOSITORY / "configs" / "paper" / recipe / "epsilon_dpo.yaml").model_dump()
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(official / "tok")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    for source in (official / "policy").iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    values["model"] |= {"name_or_path": str(model), "revision": None}
    values["data"]["source"] = str(tiny_ultrafeedback)
    values["train"] |= {"use_cpu": True, "global_batch_size": 8}
    config = tmp_path / f"{recipe}.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    if processes == 1:
        train_here(config, tmp_path / "out")
    else:
        two = launcher("configs/accelerate/cpu.yaml")
        run(*two, "-m", "epsdpo.train", "--config", config, "--output", tmp_path / "out")
    steps = read_steps(tmp_path / "out" / "train")
    assert len(steps) == 5 and steps["beta_before"][0] == 0.01  # 36 pairs in batches of 8
    pairs = read_pairs(tmp_path / "out" / "train")
    assert len(pairs) == pairs["pair_id"].nunique() == 36  # none twice, though 36 pairs fill no whole batch
    assert {path.name for path in (tmp_path / "out" / "train").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in range(1, 6)
    }
    weights = load_file(tmp_path / "out" / "train" / "model" / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}
