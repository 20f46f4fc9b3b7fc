"""What is asked: prompts from the embedded world, a file or a hub data set, as conversations that end with the user.

Rows come in several shapes: AlpacaEval's instructions, messages, Anthropic-HH's preference pairs. What cannot be used
is counted.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.data.rows import checked_messages, plain_text, transcript_turns
from epsdpo.data.sources import DataError, read_file
from epsdpo.experiment import WORLD, PromptsSection
from epsdpo.files import writable
from epsdpo.methods import beside
from epsdpo.methods.beside import SHOWN, WRITTEN, Messages, Refused, template_variables, with_system
from epsdpo.models.hub import commit_of

logger = logging.getLogger(__name__)

# Why a row may be left out. The first reason that applies is the one counted.
LEFT_OUT = {
    "no_prompt": "none of the columns instruction, messages, prompt and chosen has a value",
    "wrong_type": "the prompt is neither valid Unicode text nor a list of messages with role and content",
    "not_a_transcript": "the chosen text does not start with a Human: or Assistant: header",
    "no_assistant_turn": "the chosen conversation does not end with the assistant, so that nothing answers a prompt",
    "no_user_turn": "the conversation does not end with the user",
    "empty_prompt": "the user's last turn has no text",
    "several_turns": "the prompt has more than one turn, and prompts.single_turn is set",
    **beside.REFUSALS,
}

_PROMPT_COLUMNS = ("messages", beside.QUESTION, "prompt", "chosen")
_BESIDE_THE_PROMPT = ("output", "prompt_id", "dataset", "task", *WRITTEN)
_EXAMPLES = 3


@dataclass(frozen=True)
class Prompts:
    """What is asked, in the order of the source.

    Attributes:
        table: prompt_id (unique), instruction (the text of a single turn, or all turns, labelled), messages, task,
            given_response (the source's own answer, None if it has none), and where any prompt has some
            template_variables (tools, documents and settings for the chat template).
        report: source, revision, rows_read, rows_kept, left_out (reason -> rows, examples, meaning), not_used (column
            -> rows that have a value in it) and duplicates (how many prompts repeat an earlier one; they are kept).
    """

    table: pd.DataFrame
    report: dict[str, Any]

    @property
    def variables(self) -> list[dict[str, Any]] | None:
        """What each prompt hands to the chat template; None where none brings anything."""
        return list(self.table["template_variables"]) if "template_variables" in self.table else None


def read_prompts(section: PromptsSection, data_dir: Path | None = None) -> Prompts:
    """The prompts that a section `prompts` of an experiment names, checked and counted.

    Args:
        section: says where they are.
        data_dir: the prepared data, which hold the embedded world's held-out prompts; only needed for those.

    Raises:
        DataError: for a source that is not there or cannot be read, two prompts with one id, or none that can be used.
        FileNotFoundError: if the world's prompts have not been prepared.
    """
    if section.source == WORLD:
        return prompts_of(_world_rows(data_dir), section)
    paths, revision = _find_files(section)
    rows, not_used = _read_rows(paths, section)
    return prompts_of(rows, section, revision, not_used)


def prompts_of(
    rows: Sequence[dict[str, Any]],
    section: PromptsSection,
    revision: str | None = None,
    not_used: Mapping[str, int] | None = None,
) -> Prompts:
    """The prompts in rows that were read already, checked and counted as `section` says; as `read_prompts`."""
    kept: list[dict[str, Any]] = []
    left_out: dict[str, list[int]] = {}
    said: dict[str, str] = {}  # reason -> its meaning, with what the first such row says
    for number, row in enumerate(rows):
        if section.max_prompts is not None and len(kept) == section.max_prompts:
            break
        try:
            kept.append(_prompt(row, number, section.single_turn))
        except Refused as refusal:
            left_out.setdefault(refusal.reason, []).append(number)
            if refusal.message:
                said.setdefault(refusal.reason, f"{LEFT_OUT[refusal.reason]} ({refusal.message})")
    meanings = {**LEFT_OUT, **said}
    report = _report(section, revision, len(rows), kept, left_out, dict(not_used or {}), meanings)
    return Prompts(_table(kept, section.source, left_out, meanings), report)


def _prompt(row: dict[str, Any], number: int, single_turn: bool) -> dict[str, Any]:
    """A row of the table. Raises `Refused` with the reason, a key of `LEFT_OUT`, if there is no prompt in it."""
    messages, given_response = _conversation(row)
    if not messages or messages[-1]["role"] != "user":
        raise Refused("no_user_turn")
    if not messages[-1].get("content", "").strip():
        raise Refused("empty_prompt")
    variables = template_variables(row)
    messages = with_system(messages, row)
    if single_turn and len(messages) > 1:
        raise Refused("several_turns")
    prompt_id, task = row.get("prompt_id"), row.get("task") or row.get("dataset")
    return {
        "prompt_id": f"prompt-{number}" if prompt_id is None else writable(str(prompt_id)),
        "instruction": _as_text(messages, variables),
        "messages": messages,
        "task": "" if task is None else writable(str(task)),
        "given_response": given_response,
        "template_variables": variables,
    }


def _conversation(row: dict[str, Any]) -> tuple[Messages, str | None]:
    """The turns up to where the model is to answer, and the answer that the row brings along."""
    given = row.get("output")
    given = writable(given) if isinstance(given, str) else None
    if row.get("messages") is not None:
        return checked_messages(row["messages"], "messages"), given
    for column in ("instruction", "prompt"):
        if isinstance(row.get(column), list):
            return checked_messages(row[column], column), given
        if row.get(column) is not None:
            return [{"role": "user", "content": plain_text(row[column], column)}], given
    if row.get("chosen") is None:
        raise Refused("no_prompt")
    chosen = row["chosen"]
    turns = checked_messages(chosen, "chosen") if isinstance(chosen, list) else transcript_turns(chosen, "chosen")
    if not turns or turns[-1]["role"] != "assistant":
        raise Refused("no_assistant_turn")
    return turns[:-1], turns[-1].get("content")


def _as_text(messages: Messages, variables: Mapping[str, Any]) -> str:
    """What was asked, for judges and people: tools and documents too, and calls of tools."""
    shown = [f"{name.capitalize()}: {_json(variables[name])}" for name in SHOWN if name in variables]
    if len(messages) == 1 and not shown:
        return messages[0]["content"]
    for message in messages:
        said = [message.get("content", ""), *(_json(message[name]) for name in ("tool_calls",) if name in message)]
        shown.append(f"{message['role'].capitalize()}: {' '.join(filter(None, said))}")
    return "\n\n".join(shown)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(
    kept: list[dict[str, Any]], source: str, left_out: dict[str, list[int]], meanings: Mapping[str, str]
) -> pd.DataFrame:
    if not kept:
        reasons = "; ".join(f"{reason} ({len(rows)} rows): {meanings[reason]}" for reason, rows in left_out.items())
        raise DataError(f"prompts.source {source!r} has no prompt that can be used. {reasons or 'It is empty'}")
    table = pd.DataFrame(kept)
    if not table["template_variables"].any():
        table = table.drop(columns="template_variables")
    repeated = table["prompt_id"][table["prompt_id"].duplicated()]
    if len(repeated):
        raise DataError(
            f"prompts.source {source!r}: prompt_id {repeated.iloc[0]!r} occurs twice. Make the ids unique, or "
            "leave the column out: rows are then numbered"
        )
    return table


def _report(
    section: PromptsSection,
    revision: str | None,
    rows_read: int,
    kept: list[dict[str, Any]],
    left_out: dict[str, list[int]],
    not_used: dict[str, int],
    meanings: Mapping[str, str],
) -> dict[str, Any]:
    asked = ([prompt["messages"], prompt["template_variables"]] for prompt in kept)
    duplicates = len(kept) - len({json.dumps(each, sort_keys=True) for each in asked})
    report = {
        "source": section.source,
        "revision": revision,
        "files": section.files,
        "rows_read": rows_read,
        "rows_kept": len(kept),
        "left_out": {
            reason: {"rows": len(rows), "examples": rows[:_EXAMPLES], "meaning": meanings[reason]}
            for reason, rows in left_out.items()
        },
        "not_used": not_used,
        "duplicates": duplicates,
    }
    logger.info("%s: %d prompts from %d rows", section.source, len(kept), rows_read)
    for reason, entry in report["left_out"].items():
        logger.warning(
            "%s: %d rows left out as %s, first %s: %s",
            *(section.source, entry["rows"], reason, entry["examples"], entry["meaning"]),
        )
    if duplicates:
        logger.warning(
            "%s: %d prompts repeat an earlier one; they get its response and count again", section.source, duplicates
        )
    return report


# ----------------------------------------------------------------------------------------------------------- sources


def _read_rows(paths: list[Path], section: PromptsSection) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of all files, and in how many of them columns that are not read have a value.

    Of a source with a named column that one stands for the prompt, and none of the others that may hold one is read.
    """
    column = section.column
    rows: list[dict[str, Any]] = []
    not_used: Counter[str] = Counter()
    for path in paths:
        table = read_file(path, [*(_PROMPT_COLUMNS if column is None else [column]), *_BESIDE_THE_PROMPT])
        if column is not None and column not in table.names:
            raise DataError(
                f"prompts.column is {column!r}, and {path} has the columns {', '.join(table.names)}. Name one"
            )
        not_used.update({name: sum(filled) for name, filled in table.filled.items()})
        for number, row in enumerate(table.rows):
            if column not in (None, "prompt"):
                row = {**{name: row.get(name) for name in _BESIDE_THE_PROMPT}, "prompt": row[column]}
            asks = column == beside.QUESTION or (row.get("messages") is None and row.get(beside.QUESTION) is not None)
            noticed = (*beside.MEDIA, *(beside.REST_OF_QUESTION if asks else ()))
            rows.append(row | {name: True for name in noticed if name in table.filled and table.filled[name][number]})
    return rows, not_used


def _world_rows(data_dir: Path) -> list[dict[str, Any]]:
    path = data_dir / "prompts.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no held-out prompts; run the prepare stage of this experiment first")
    return pd.read_parquet(path, columns=["prompt_id", "instruction", "task"]).to_dict("records")


def _find_files(section: PromptsSection) -> tuple[list[Path], str | None]:
    """The files to read, and the commit that they are of if they come from the hub."""
    path = Path(section.source).expanduser()
    if path.is_file():
        if section.files:
            raise DataError(f"prompts.files is set, but source {section.source!r} is a file. Remove it")
        return [path], None
    if not section.files:
        raise DataError(
            f"prompts.source {section.source!r} is no file (seen from {Path.cwd()}). If it is a folder or a "
            "hub data set, say in prompts.files what to read of it"
        )
    if path.is_dir():
        missing = [name for name in section.files if not (path / name).is_file()]
        if missing:
            raise DataError(f"prompts.files: {path} holds no {missing[0]!r}")
        return [path / name for name in section.files], None
    return _fetch(section)


def _fetch(section: PromptsSection) -> tuple[list[Path], str]:
    from huggingface_hub import hf_hub_download

    try:
        commit = commit_of(section.source, section.revision, "dataset")
        paths = [hf_hub_download(section.source, name, repo_type="dataset", revision=commit) for name in section.files]
    except Exception as error:  # whatever the client's HTTP library raises, see `commit_of`
        raise DataError(
            f"prompts.source {section.source!r} is no local path, and the hub did not give "
            f"{', '.join(section.files)}: {type(error).__name__}: {error}. If this machine is offline, fetch the files "
            "elsewhere and name their path; otherwise check the id, the revision and the names"
        ) from error
    return [Path(path) for path in paths], commit
