"""Tokenizer and chat template, on rows as the data have them: whether pairs become what the model knows.

Rows are the first ones of local data; of a hub data set, which is not fetched, an example in the format of that set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from epsdpo.checking.findings import ERROR, NOTE, OK, WARNING, Finding
from epsdpo.checking.sources import on_hub
from epsdpo.data.rows import (
    REFUSALS,
    STANDARD,
    Refused,
    Tokens,
    check_tokenizer,
    check_tokens,
    detect_format,
    read_pair,
    render,
    tokenise,
)
from epsdpo.data.sources import DataError, Rows, find_source, read_split
from epsdpo.experiment import ON_POLICY, WORLD, ConfigError, DataSection, Experiment
from epsdpo.loading import read_tokenizer
from epsdpo.models import read_chat_template

_LOOKED_AT = 20  # rows of local data
_SHOWN = 160  # characters of a rendered prompt

_TRANSCRIPTS = "hh-rlhf"  # in the name of data sets whose rows are transcripts with Human: and Assistant: headers
_QUESTION, _BETTER, _WORSE = "How many legs has a spider?", "A spider has eight legs.", "Six."


def check_texts(experiment: Experiment) -> Iterator[Finding]:
    """Findings on the data's first rows, on the tokenizer, and on the first pair as the model would read it."""
    if experiment.model.name_or_path == WORLD:
        yield Finding(OK, "data and tokenizer: of the embedded world, made where it is run")
        return
    try:
        rows = sample_rows(experiment.data)
    except DataError as error:
        yield Finding(ERROR, str(error))
        return
    name, template = experiment.model.name_or_path, experiment.model.chat_template
    tokenizer = local_tokenizer(name, experiment.model.revision)
    if tokenizer is None:
        yield Finding(NOTE, f"tokenizer: not tried, since that of {name} is neither a folder nor in the hub's cache")
        return
    if template is not None:
        try:
            tokenizer.chat_template = read_chat_template(template, local_files_only=True)
        except ConfigError:
            yield Finding(NOTE, f"chat template: not tried, since {template} is neither a file nor in the hub's cache")
            return
    yield check_rendering(rows, tokenizer)


def check_rendering(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """The first usable row through tokenizer and chat template: refused, or shown as the model reads it."""
    data_format = detect_format(rows)
    if data_format is None:
        return Finding(ERROR, f"{rows.where}: rows hold no prompt. Name its column in data.columns.prompt")
    try:
        check_tokenizer(tokenizer, data_format)
    except ConfigError as error:
        return Finding(ERROR, str(error))
    refused: dict[str, int] = {}
    for row in rows.values:
        try:
            [tokens] = tokenise(
                [render(read_pair(row, data_format), tokenizer)], tokenizer, templated=data_format != STANDARD
            )
            check_tokens(tokens, tokenizer.bos_token_id)
        except Refused as refusal:
            refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
            continue
        return _rendered(tokens, tokenizer)
    reasons = "; ".join(f"{count} because {REFUSALS[reason]}" for reason, count in refused.items())
    return Finding(ERROR, f"{rows.where}: of the first {len(rows.values)} rows none can be used: {reasons}")


def _rendered(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> Finding:
    prompt = tokenizer.decode(tokens.prompt)
    shown = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}…"
    ending = tokenizer.decode(tokens.chosen[-2:])
    reads = f"a prompt reads {shown!r}, and a response ends in {ending!r}"
    if tokenizer.bos_token_id is None:
        return Finding(OK, f"texts: {reads}; the tokenizer has no BOS")
    if tokens.prompt[0] != tokenizer.bos_token_id:
        return Finding(WARNING, f"texts: {reads}; there is no BOS ({tokenizer.bos_token!r}) in front")
    return Finding(OK, f"texts: {reads}; one BOS in front")


def sample_rows(section: DataSection) -> Rows:
    """Rows in the format of the data: their first ones where they are local.

    Raises:
        DataError: if local data lack a split or a column, or cannot be read.
    """
    if section.source != ON_POLICY and not on_hub(section.source):
        source = find_source(section)
        for split in filter(None, (section.eval_split, section.train_split)):
            rows = read_split(source, section, split, _LOOKED_AT)
        return rows
    row: dict[str, Any]
    if _TRANSCRIPTS in section.source:
        row = {
            side: f"\n\nHuman: {_QUESTION}\n\nAssistant: {answer}"
            for side, answer in (("chosen", _BETTER), ("rejected", _WORSE))
        }
    else:
        user = {"role": "user", "content": _QUESTION}
        sides = (("chosen", _BETTER), ("rejected", _WORSE))
        row = {
            "prompt": _QUESTION,
            **{side: [user, {"role": "assistant", "content": answer}] for side, answer in sides},
        }
    return Rows(section.source, list(row), tuple(row), [row])


def local_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer, if it is here."""
    try:
        return read_tokenizer(name, revision, local_files_only=True)
    except (OSError, ValueError):
        return None
