"""The released code's own models, tokenizer and pairs, in tests/data/official."""

import json
from pathlib import Path

OFFICIAL = Path(__file__).parents[1] / "data" / "official"


def save_official_model(folder: Path) -> Path:
    """The tiny policy and its tokenizer in one new folder, as a user has a model."""
    folder.mkdir()
    for source in (*(OFFICIAL / "policy").iterdir(), *(OFFICIAL / "tok").iterdir()):
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def tokenised_pairs(tokenizer):
    """The 96 pairs, tokenised as trl 0.13 did: prompt and completion apart, no BOS, EOS after each completion."""
    from datasets import Dataset

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [json.loads(line) for line in (OFFICIAL / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
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
