"""The frozen reference runs of the released code: their models, their pairs, and what it decided in bfloat16.

They lie in the repository's tests/data/official, whose README says how they were made.
"""

import json
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from epsdpo.files import read_text
from epsdpo.methods.heads import expose_hidden_states
from epsdpo.methods.loading import load_causal_lm, read_tokenizer

MAX_LENGTH = 128  # tokens, as in the runs


def load_models(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and reference with weights in `dtype`, ready for `decisions_at`.

    Raises:
        FileNotFoundError: if the folder holds no reference runs.
    """
    if not (folder / "pairs.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no reference runs; give tests/data/official of a checkout")
    models = [load_causal_lm(folder / name, dtype=dtype).eval() for name in ("policy", "ref")]
    for model in models:
        expose_hidden_states(model)
    return models[0], models[1]


def load_pairs(folder: Path) -> Dataset:
    """The 96 pairs as trl 0.13 tokenised them: prompt and completion apart, no BOS, EOS after each completion."""
    tokenizer = read_tokenizer(folder / "tok")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [json.loads(line) for line in read_text(folder / "pairs.jsonl").split("\n") if line]
    return Dataset.from_list(
        [
            {
                "pair_id": f"pair-{number}",
                "prompt_ids": ids(row["prompt"]),
                "chosen_ids": [*ids(row["chosen"]), tokenizer.eos_token_id],
                "rejected_ids": [*ids(row["rejected"]), tokenizer.eos_token_id],
            }
            for number, row in enumerate(rows)
        ]
    )


def released_decisions(folder: Path) -> pd.DataFrame:
    """What the released code decided with frozen models in bfloat16: pair_id, epsilon, released (+1, 0, -1)."""
    tables = []
    for file in sorted(folder.glob("bf16_frozen_*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        steps = [int(step) for row in run["rows"] for step in row["steps"]]
        identifiers = [f"pair-{number}" for number in range(len(steps))]
        tables.append(pd.DataFrame({"pair_id": identifiers, "epsilon": run["args"]["epsilon"], "released": steps}))
    return pd.concat(tables, ignore_index=True)
