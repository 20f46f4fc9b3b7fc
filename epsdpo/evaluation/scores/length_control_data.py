"""What AlpacaEval 2's length control needs beside judgements: gamed rows and the difficulty of each prompt.

Two files of the hub, or a caller's own.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.alpaca_eval_prompts import prompt_number
from epsdpo.evaluation.scores.annotations import InputError
from epsdpo.evaluation.scores.length_control import GamedRows
from epsdpo.files import encoding_of

# The file that every published length-controlled win rate was made with. It holds the difficulties, too.
HUB_REPOSITORY = "tatsu-lab/alpaca_eval"
HUB_FILE = "df_gamed.csv"
HUB_REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
HUB_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"

# Differences between copies of one difficulty that come from writing it with nine digits.
_ROUNDING = 1.0e-6


@dataclass(frozen=True)
class Difficulties:
    """γ of each prompt, found by its instruction, never by its place in a file.

    Attributes:
        by_prompt: γ by the number of an AlpacaEval prompt, of others by the instruction itself.
    """

    by_prompt: dict[int | str, float]

    def of(self, instruction: str) -> float:
        """γ of a prompt; NaN if it is not known."""
        return self.by_prompt.get(_key(instruction), np.nan)

    def of_first(self, count: int) -> np.ndarray:
        """γ of AlpacaEval's first prompts, which its package gives a file of `count` rows, whichever these are."""
        return np.array([self.by_prompt.get(number, np.nan) for number in range(count)])


def read_gamed(path: str | Path) -> GamedRows:
    """Read gamed rows: a CSV, plain or compressed, with columns preference, std_delta_len and instruction_difficulty.

    Preferences are chances of a win in [0, 1] there. Rows without one, which enter no fit, are left out.

    Raises:
        InputError: if the file or a column is missing, or a value is not what it should be.
    """
    path = Path(path)
    table = _read_csv(path)
    columns = ("preference", "std_delta_len", "instruction_difficulty")
    for column in columns:
        _require_numbers(path, table, column, may_be_missing=column == "preference")
    table = table[table["preference"].notna()]
    outside = table.index[~table["preference"].between(0.0, 1.0)]
    if len(outside):
        value = table.loc[outside[0], "preference"]
        raise InputError(f"{path}: row {outside[0]}: `preference` is {value:g}; of gamed rows it is in [0, 1]")
    return GamedRows(*(table[column].to_numpy(dtype=np.float64) for column in columns))


def read_difficulties(path: str | Path) -> Difficulties:
    """Read difficulties: a CSV, plain or compressed, with the column `instruction_difficulty`.

    A row's prompt is told by `instruction`, its text, or else by `index` (or a first column without name), its number
    in AlpacaEval's order. A prompt may come twice, as in the file of gamed rows, if both rows say the same.

    Raises:
        InputError: if the file or a column is missing, a value is not a number, or rows contradict each other.
    """
    path = Path(path)
    table = _read_csv(path).rename(columns={"Unnamed: 0": "index"})
    _require_numbers(path, table, "instruction_difficulty")
    if "instruction" in table:
        prompts = table["instruction"].map(_key).tolist()
    else:
        _require_numbers(path, table, "index")
        prompts = table["index"].tolist()
    known: dict[int | str, float] = {}
    for number, (prompt, difficulty) in enumerate(zip(prompts, table["instruction_difficulty"], strict=True)):
        if abs(known.setdefault(prompt, float(difficulty)) - difficulty) > _ROUNDING:
            raise InputError(
                f"{path}: row {number}: `instruction_difficulty` of prompt {prompt!r} is {difficulty:g}, "
                f"but {known[prompt]:g} in a row before. Keep the one that is right"
            )
    return Difficulties(known)


def _key(instruction: str) -> int | str:
    number = prompt_number(instruction)
    return instruction if number is None else number


def hub_file() -> Path:
    """The published gamed rows and difficulties, downloaded on first use, from huggingface_hub's cache after that.

    Raises:
        OSError: if the file is not in the cache and the hub cannot be asked.
        InputError: if it is not the published file.
    """
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset", revision=HUB_REVISION))
    require_sha256(path, HUB_SHA256)
    return path


def require_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the published one.

    Raises:
        InputError: if the SHA-256 of the file is another.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{path}: its SHA-256 is {found}, that of the published file is {expected}: the copy is damaged or "
            "tampered with. Delete it, and it is downloaded again"
        )


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, encoding=encoding_of(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error) as error:  # pandas' own parser errors are ValueErrors
        raise InputError(f"{path}: not a table in CSV: {error}") from error


def _require_numbers(path: Path, table: pd.DataFrame, column: str, may_be_missing: bool = False) -> None:
    if column not in table:
        raise InputError(f"{path}: no column `{column}`; it has {', '.join(map(str, table.columns))}")
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = table.index[~np.isfinite(values) & ~(may_be_missing & table[column].isna())]
    if len(wrong):
        raise InputError(f"{path}: row {wrong[0]}: `{column}` is {str(table.loc[wrong[0], column])!r}, not a number")
