"""One run of sampling: prompts → responses → scores → pairs, with everything counted on the way.

It goes on where a killed run stopped.
"""

import gc
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from epsdpo.data.on_policy.pairs import REFUSED, make_pairs
from epsdpo.data.on_policy.rank import Answered, load_ranker, score_responses
from epsdpo.data.prepared import PAIRS, REPORT
from epsdpo.data.prompts import prompts_of, read_prompts
from epsdpo.data.rendering import render_untrained
from epsdpo.data.rows import CONVERSATIONAL, check_tokenizer
from epsdpo.data.sources import DataError
from epsdpo.experiment import WORLD, ConfigError, Experiment
from epsdpo.files import writable, written_whole
from epsdpo.methods.beside import SHOWN
from epsdpo.models.hub import model_identity
from epsdpo.models.kept import Kept
from epsdpo.models.local import LocalEngine
from epsdpo.models.local_models import require_local
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.respond import Engine, kept_responses, respond
from epsdpo.models.response import Response
from epsdpo.models.server import ServerEngine, served_by
from epsdpo.models.start import load_tokenizer, start_of
from epsdpo.models.weights import load_answering_model

logger = logging.getLogger(__name__)

RESPONSES, GENERATED, SCORES = "responses.parquet", "generated.jsonl", "scores.jsonl"

_EXAMPLES = 3


@dataclass(frozen=True)
class SampledPairs:
    """What a sampled folder holds.

    Attributes:
        pairs: see `make_pairs`.
        responses: every response: prompt_id, number (from 0), response, tokens, finished, score (NaN for none).
        report: report.json.
    """

    pairs: pd.DataFrame
    responses: pd.DataFrame
    report: dict[str, Any]


def sample_pairs(experiment: Experiment, output_dir: str | Path, keep_in: str | Path | None = None) -> SampledPairs:
    """Sample, score and pair responses of the experiment's model (before any SFT) into `output_dir`.

    Responses and scores are kept as they come: a call that was killed goes on there. `report.json` is written last.

    Args:
        experiment: with a section `data.on_policy`, whose prompts are asked `responses_per_prompt` times, each time
            with another seed.
        keep_in: folder for responses and scores; by default `output_dir`.

    Raises:
        ConfigError: if the section is missing, or the ranker cannot be loaded or is no reward model.
        DataError: if there are no prompts to ask, or no prompt comes to a pair.
    """
    section = experiment.data.on_policy
    if section is None:
        raise ConfigError(
            f"experiment {experiment.name!r} has no section data.on_policy. Add one and data.source: on_policy"
        )
    require_local(experiment)
    tokenizer = load_tokenizer(experiment)
    check_tokenizer(tokenizer, CONVERSATIONAL)
    table, rendered, prompts_report = _prompts(experiment, tokenizer)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / REPORT).unlink(missing_ok=True)
    keep_in = Path(keep_in or output_dir)
    keep_in.mkdir(parents=True, exist_ok=True)

    with kept_responses(keep_in / GENERATED) as kept:
        rounds = _ask(experiment, tokenizer, rendered, kept)
        _free_gpu_memory()  # the ranker may need it
        answered = [
            Answered(messages, response.text)
            for answers in rounds
            for messages, response in zip(table["messages"], answers, strict=True)
        ]
        ranker = load_ranker(section.ranker)
        scores = score_responses(answered, ranker, keep_in / SCORES)
    responses = _responses(table, rounds, scores)
    pairs, refused = make_pairs(table, responses)
    report = {
        "prompts": prompts_report,
        "model": model_identity(*start_of(experiment)),
        "ranker": ranker.made_by,
        "settings": section.model_dump(),
        "responses": len(responses),
        "cut_by_max_new_tokens": int((~responses["finished"]).sum()),
        "unscored": int(responses["score"].isna().sum()),
        "pairs": len(pairs),
        "refused": {
            reason: {"prompts": len(ids), "examples": ids[:_EXAMPLES], "meaning": REFUSED[reason]}
            for reason, ids in refused.items()
        },
    }
    if pairs.empty:
        reasons = "; ".join(f"{entry['prompts']}: {entry['meaning']}" for entry in report["refused"].values())
        raise DataError(f"data.on_policy: none of {len(table)} prompts comes to a pair ({reasons})")
    logger.info("%d pairs of %d prompts", len(pairs), len(table))
    for name, frame in ((RESPONSES, responses), (PAIRS, pairs)):
        with written_whole(output_dir / name) as partial:
            frame.to_parquet(partial, index=False)
    with written_whole(output_dir / REPORT) as partial:
        partial.write_text(json.dumps(writable(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return SampledPairs(pairs, responses, report)


def _prompts(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase
) -> tuple[pd.DataFrame, list[RenderedPrompt], dict[str, Any]]:
    """What is asked: each prompt once, none longer than `data.max_prompt_length`, and none with tools or documents,
    which the ranker would not be shown; and what was counted."""
    section = experiment.data.on_policy.prompts
    prompts = prompts_of(_world_rows(experiment), section) if section.source == WORLD else read_prompts(section)
    day = experiment.data.template_date
    rendered = render_untrained(list(prompts.table["messages"]), tokenizer, day, prompts.variables)
    limit = experiment.data.max_prompt_length
    seen: set[tuple[int, ...]] = set()
    kept, too_long, unranked = [], [], 0
    for place, prompt in enumerate(rendered):
        ids = tuple(prompt.token_ids)
        if any(name in prompt.variables for name in SHOWN):
            unranked += 1
        elif limit is not None and len(ids) > limit:
            too_long.append(place)
        elif ids not in seen:
            seen.add(ids)
            kept.append(place)
    report = {
        **prompts.report,
        "asked": len(kept),
        "longer_than_max_prompt_length": len(too_long),
        "with_tools_or_documents": unranked,
    }
    if not kept:
        raise DataError(
            f"data.on_policy.prompts: of {len(rendered)} prompts {len(too_long)} are longer than "
            f"data.max_prompt_length ({limit}), and {unranked} bring tools or documents, which the ranker would not be "
            "shown. None is left"
        )
    return prompts.table.iloc[kept].reset_index(drop=True), [rendered[place] for place in kept], report


def _world_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """The world's training instructions; those of evaluation are others."""
    from epsdpo.world.build import render, sample_instructions

    world = experiment.data.world
    instructions = sample_instructions(world.train_pairs, world.seed, "train")
    return [{"instruction": render(instruction), "task": instruction.task} for instruction in instructions]


def _ask(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, prompts: list[RenderedPrompt], kept: Kept
) -> list[list[Response]]:
    """`responses_per_prompt` rounds of one response to each prompt."""
    engines = _engines(experiment, tokenizer)
    return [
        respond(prompts, engine, kept, f"response {number} of {len(engines)}")
        for number, engine in enumerate(engines, start=1)
    ]


def _engines(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> list[Engine]:
    """One engine for each response to a prompt. Those in this process share the model."""
    section = experiment.data.on_policy
    source, revision = start_of(experiment)
    made_by = {
        **model_identity(source, revision),
        "engine": section.engine,
        "dtype": experiment.model.dtype,
        **section.model_dump(include={"temperature", "top_p", "max_new_tokens", "stop_token_ids"}),
    }
    seeds = range(section.seed, section.seed + section.responses_per_prompt)
    if section.engine == "server":
        server, place = section.server, "data.on_policy.server"
        made_by |= served_by(server, server.model)
        return [
            ServerEngine(server, server.model, tokenizer, section, seed, {**made_by, "seed": seed}, place)
            for seed in seeds
        ]
    model = load_answering_model(experiment.model, source, revision)
    return [LocalEngine(model, tokenizer, section, seed, {**made_by, "seed": seed}) for seed in seeds]


def _free_gpu_memory() -> None:
    """A model gives its memory back only once it is collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _responses(table: pd.DataFrame, rounds: list[list[Response]], scores: list[float | None]) -> pd.DataFrame:
    """All responses, those to one prompt together; `scores` are round by round."""
    frames = [
        pd.DataFrame(
            {
                "prompt_id": table["prompt_id"],
                "number": number,
                "response": [response.text for response in answers],
                "tokens": [len(response.token_ids) for response in answers],
                "finished": [response.finished for response in answers],
                "score": pd.Series(scores[number * len(table) : (number + 1) * len(table)], dtype="float64"),
            }
        )
        for number, answers in enumerate(rounds)
    ]
    return pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)
