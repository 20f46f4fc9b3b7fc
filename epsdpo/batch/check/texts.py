"""Tokenizer and chat template, on rows as the data have them: whether pairs become what the model knows.

Rows are the first ones of local data; of a hub data set, which is not fetched, an example in the format of that set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from epsdpo.batch.check.findings import ERROR, NOTE, OK, WARNING, Finding
from epsdpo.batch.check.pins import on_hub
from epsdpo.batch.check.training import local_config
from epsdpo.data.prompts import read_prompts
from epsdpo.data.rendering import TrainingPrompts, render_prompts
from epsdpo.data.rows import (
    REFUSALS,
    STANDARD,
    Refused,
    Tokens,
    check_tokens,
    cut_prompt,
    detect_format,
    read_pair,
    render,
    tokenise,
)
from epsdpo.data.sources import DataError, Rows, find_source, read_split
from epsdpo.data.split import check_split
from epsdpo.experiment import ON_POLICY, TEMPLATE_DATE, WORLD, ConfigError, DataSection, Experiment
from epsdpo.methods.chat_template import writes_date
from epsdpo.methods.loading import read_tokenizer
from epsdpo.methods.vocabulary import token_problem
from epsdpo.models.gguf import as_folder
from epsdpo.models.server import require_ids_for_dates
from epsdpo.models.start import read_chat_template

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
        except ConfigError as error:
            if not on_hub(template.partition("@")[0]):
                yield Finding(ERROR, " ".join(str(error).split()))
                return
            yield Finding(NOTE, f"chat template: not tried, since {template} is neither a file nor in the hub's cache")
            return
    yield check_rendering(rows, tokenizer, experiment.data.template_date)
    yield from _embeddings(experiment, rows, tokenizer)
    if not_used := [name for name, count in rows.not_used.items() if count]:
        yield Finding(NOTE, f"data: columns that are not used: {', '.join(not_used)}")
    yield from _dates(experiment, tokenizer)
    yield from _evaluation_prompts(experiment, rows, tokenizer)


def _embeddings(experiment: Experiment, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether the model has embeddings for the tokens of the first rows, and for what fills up a batch."""
    config = local_config(experiment.model.name_or_path, experiment.model.revision)
    if config is None:
        return
    embeddings = config.get_text_config().vocab_size
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    used = [-1 if padding is None else padding]
    data_format = detect_format(rows)
    for row in rows.values if data_format else ():
        try:
            rendered = render(read_pair(row, data_format), tokenizer, experiment.data.template_date)
        except (Refused, TypeError):  # the latter without an EOS to end plain text with, which is said already
            continue
        [tokens] = tokenise([rendered], tokenizer, templated=data_format != STANDARD)
        used += tokens.prompt + tokens.chosen + tokens.rejected
    if problem := token_problem(max(used), tokenizer, embeddings, experiment.model.name_or_path):
        yield Finding(ERROR, problem)
    elif max(tokenizer.get_vocab().values(), default=0) >= embeddings:
        yield Finding(
            NOTE,
            f"tokenizer: it knows {len(tokenizer)} tokens, and the model's embedding has {embeddings} rows; rows that "
            "use one of the last are refused before training",
        )


def _evaluation_prompts(experiment: Experiment, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether evaluation asks as the first rows of local data are trained, which it would refuse after training."""
    section, data = experiment.evaluate and experiment.evaluate.prompts, experiment.data
    data_format = detect_format(rows)
    if section is None or section.source == WORLD or data.source == ON_POLICY or on_hub(data.source) or not data_format:
        return
    texts, token_ids = [], []
    for row in rows.values:
        try:
            rendered = render(read_pair(row, data_format), tokenizer, data.template_date)
        except Refused:
            continue
        [tokens] = tokenise([rendered], tokenizer, templated=data_format != STANDARD)
        texts.append(rendered.parts()[0])
        token_ids.append(tokens.prompt)
    if not texts:
        return
    training = TrainingPrompts(
        texts,
        [cut_prompt(ids, data.max_prompt_length) for ids in token_ids],
        templated=data_format != STANDARD,
        bos=int(token_ids[0][:1] == [tokenizer.bos_token_id]),
        max_prompt_length=data.max_prompt_length,
        day=data.template_date,
        where=f"the first rows of {rows.where}",
    )
    conversations, variables = [[{"role": "user", "content": _QUESTION}]], None
    try:
        if Path(section.source).expanduser().exists():
            prompts = read_prompts(section.model_copy(update={"max_prompts": _LOOKED_AT}))
            conversations, variables = list(prompts.table["messages"]), prompts.variables
        render_prompts(conversations, tokenizer, training, variables)
    except DataError as error:
        yield Finding(WARNING, f"evaluate.prompts, by the first rows of the data: {' '.join(str(error).split())}")


def _dates(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """What chat templates that write today's date are told, in which days must not differ."""
    evaluate, on_policy = experiment.evaluate, experiment.data.on_policy
    if writes_date(tokenizer):
        yield Finding(
            NOTE,
            f"chat template: it writes today's date, and is told {experiment.data.template_date} on any day "
            "(data.template_date). The trained model's copy of it still asks the clock of whoever uses it",
        )
        for place, section in (("evaluate.server", evaluate), ("data.on_policy.server", on_policy)):
            if section is not None and section.server is not None:
                try:
                    require_ids_for_dates(section.server, tokenizer, place)
                except ConfigError as error:
                    yield Finding(ERROR, str(error))
    judge = None if evaluate is None or evaluate.judge is None else evaluate.judge
    ranker = None if on_policy is None else on_policy.ranker
    for place, section in (("evaluate.judge", judge), ("data.on_policy.ranker", ranker)):
        if section is None or section.model in (None, WORLD) or getattr(section, "kind", "") == "chat":
            continue
        theirs = local_tokenizer(section.model, section.revision)
        if theirs is not None and writes_date(theirs):
            yield Finding(NOTE, f"{place}: its chat template writes today's date, and is told {TEMPLATE_DATE} always")


def check_rendering(rows: Rows, tokenizer: PreTrainedTokenizerBase, day: str = TEMPLATE_DATE) -> Finding:
    """The first usable row through tokenizer and chat template: refused, or shown as the model reads it."""
    try:
        data_format = check_split(rows, tokenizer)
    except ConfigError as error:
        return Finding(ERROR, str(error))
    refused: dict[str, int] = {}
    said: dict[str, str] = {}
    for row in rows.values:
        try:
            [tokens] = tokenise(
                [render(read_pair(row, data_format), tokenizer, day)], tokenizer, templated=data_format != STANDARD
            )
            check_tokens(tokens, tokenizer.bos_token_id)
        except Refused as refusal:
            refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
            said.setdefault(refusal.reason, refusal.message and f" ({refusal.message})")
            continue
        return _rendered(tokens, tokenizer)
    reasons = "; ".join(f"{count} because {REFUSALS[reason]}{said[reason]}" for reason, count in refused.items())
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
        return read_tokenizer(*as_folder(name, revision), local_files_only=True)
    except Exception:  # what is wrong with a local one is said by `sources`
        return None
