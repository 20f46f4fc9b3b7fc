"""Table 8's data sets in miniature, where `datasets` finds them before it asks a hub, and a run folder to measure.

The harness's own task definitions are used: `load_dataset("openai/gsm8k")` takes a folder of that name below the
working directory. Rows are made up here, in the data sets' formats.
"""

import json
from pathlib import Path

import yaml

from epsdpo.experiment import EXPERIMENT_FILE, check_experiment, save_experiment

QUESTIONS, EXAMPLES = 4, 30  # ARC takes 25 examples, and MMLU's dev split has 5
CONTEXT = 4096  # tokens: GSM8K's five examples and 256 tokens of answer need room


def _arc(number):
    choices = {"text": ["red", "blue", "green", "grey"], "label": ["A", "B", "C", "D"]}
    return {
        "id": f"q{number}",
        "question": f"Which colour is {number}?",
        "choices": choices,
        "answerKey": "ABCD"[number % 4],
    }


def _hellaswag(number):
    return {
        "ind": number,
        "activity_label": "Walking",
        "ctx_a": f"Person {number} gets up.",
        "ctx_b": "then they",
        "endings": ["walk away.", "fly [title] off.", "sing.", "melt."],
        "label": str(number % 4),
    }


def _truthfulqa(number):
    one = {"choices": ["Yes.", "No."], "labels": [1, 0]}
    return {"question": f"Is {number} a number?", "mc1_targets": one, "mc2_targets": one}


def _winogrande(number):
    sentence = f"The cup {number} did not fit the box because the _ was too large."
    return {"sentence": sentence, "option1": "cup", "option2": "box", "answer": str(1 + number % 2)}


def _gsm8k(number):
    return {"question": f"What is {number} plus 1?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1}"}


def _mmlu(subject):
    choices = ["one", "two", "three", "four"]
    return lambda number: {
        "question": f"How many, {number}?",
        "subject": subject,
        "choices": choices,
        "answer": number % 4,
    }


def write_data_sets(folder: Path, mmlu_subjects: list[str]) -> None:
    """Write all of them below `folder`, which is to be the working directory."""
    both, asked = {"train": EXAMPLES, "validation": QUESTIONS}, {"test": QUESTIONS}
    _write(folder / "allenai/ai2_arc", {"ARC-Challenge": both | asked}, lambda _: _arc)
    _write(folder / "Rowan/hellaswag", {"default": both}, lambda _: _hellaswag)
    _write(folder / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": QUESTIONS}}, lambda _: _truthfulqa)
    _write(folder / "allenai/winogrande", {"winogrande_xl": both}, lambda _: _winogrande)
    _write(folder / "openai/gsm8k", {"main": {"train": EXAMPLES} | asked}, lambda _: _gsm8k)
    _write(folder / "cais/mmlu", {name: {"dev": 5} | asked for name in mmlu_subjects}, _mmlu)


def _write(folder: Path, configs: dict[str, dict[str, int]], row_of) -> None:
    """A data set of JSON lines, whose card says which files make which subset and split.

    Args:
        configs: for each subset how many rows each split has.
        row_of: gives for the name of a subset what makes its row of a number.
    """
    folder.mkdir(parents=True)
    card = []
    for name, splits in configs.items():
        files = []
        for split, count in splits.items():
            path, row = folder / f"{name}-{split}.jsonl", row_of(name)
            path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")
            files.append({"split": split, "path": path.name})
        card.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n", encoding="utf-8")


def write_model(folder: Path, tokenizer, seed: int) -> None:
    """A random Llama of a few thousand weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(run_dir: Path, reference: Path, tokenizer, policies: dict[str, int]) -> None:
    """What `epsdpo run` leaves of trained experiments, as far as it is read here; `policies` are seeds of weights."""
    (run_dir / ".epsdpo").mkdir(parents=True)
    (run_dir / ".epsdpo" / "plan.json").write_text('{"stages": {}}', encoding="utf-8")
    for name, seed in policies.items():
        folder = run_dir / name
        (folder / "train").mkdir(parents=True)
        values = {
            "name": name,
            "title": f"{name} <b>",
            "method": "dpo",
            "train": {"beta": 0.1},
            "model": {"name_or_path": str(reference), "dtype": "float32"},
        }
        save_experiment(check_experiment(values, where="test"), folder / EXPERIMENT_FILE)
        write_model(folder / "train" / "model", tokenizer, seed)
        finish_training(folder, key=f"key-{seed}")


def finish_training(folder: Path, key: str) -> None:
    """The manifest that training ends with, as far as it is read here."""
    manifest = {"stage": "train", "key": key, "key_parts": {}, "git": None, "seconds": 1.0}
    (folder / "train" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
