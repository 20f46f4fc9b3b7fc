"""Published judgements of AlpacaEval 2, as figures without texts, in the forms that the tests need.

tests/data/README.md says where they come from. Their prompts are called "prompt 000" to "prompt 804".
"""

import json
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[1] / "data" / "alpaca_eval"
GAMED = FOLDER / "gamed_surrogate.csv.gz"
LEADERBOARD = pd.read_csv(FOLDER / "leaderboard.csv").set_index("model")
MODELS = tuple(LEADERBOARD.index)
WEIGHTS = pd.read_csv(FOLDER / "weights.csv").set_index("model")

_JUDGEMENTS = pd.read_csv(FOLDER / "judgements.csv.gz")


def rows_of(model: str) -> list[dict]:
    """The model's judgements in the reduced format."""
    return [
        {
            "instruction": f"prompt {row.prompt:03d}",
            "generator_1": "gpt4_1106_preview",
            "generator_2": model,
            "len_1": row.reference_length,
            "len_2": length,
            "preference": preference,
        }
        for row, length, preference in zip(
            _JUDGEMENTS.itertuples(), _JUDGEMENTS[f"{model} length"], _JUDGEMENTS[f"{model} preference"], strict=True
        )
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_difficulties(path: Path) -> Path:
    """Difficulties by instruction."""
    instructions = [f"prompt {number:03d}" for number in _JUDGEMENTS["prompt"]]
    pd.DataFrame({"instruction": instructions, "instruction_difficulty": _JUDGEMENTS["difficulty"]}).to_csv(
        path, index=False
    )
    return path


def write_numbered_difficulties(path: Path) -> Path:
    """Difficulties by the number of each prompt in AlpacaEval's order."""
    table = pd.DataFrame({"index": _JUDGEMENTS["prompt"], "instruction_difficulty": _JUDGEMENTS["difficulty"]})
    table.to_csv(path, index=False)
    return path
