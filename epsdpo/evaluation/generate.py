"""What is judged and measured: both models' responses to the same prompts, and their divergence both ways.

This module knows which model is asked through which engine. What responses are worth is left to the judge, and what all
of it comes to in numbers to `epsdpo.evaluation`.
"""

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epsdpo.data.prompts import Prompts
from epsdpo.data.rendering import read_training_prompts, render_prompts
from epsdpo.evaluation.kl import sequence_kl
from epsdpo.experiment import Experiment
from epsdpo.methods.loading import load_causal_lm
from epsdpo.models.kept import open_store
from epsdpo.models.local import LocalEngine
from epsdpo.models.respond import Engine, respond
from epsdpo.models.response import Response
from epsdpo.models.start import load_tokenizer, model_identity, reference_source

logger = logging.getLogger(__name__)

GENERATED = "generated.jsonl"
POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class Answers:
    """Both models' responses.

    Attributes:
        responses: one row per prompt: prompt_id, instruction, task, given_response where the source has any, for
            `policy_` and `reference_` each response, tokens and finished, then reverse_kl (nats along the
            policy's response) and forward_kl (nats along the reference's).
        provenance: flat and for the summary: prompts, models and times.
    """

    responses: pd.DataFrame
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Side:
    """One of the two models: where its weights are, and the seed of its responses."""

    name: str
    source: str
    revision: str | None
    seed: int


def answer_prompts(
    experiment: Experiment, prompts: Prompts, data_dir: Path, policy_dir: Path, answers_dir: Path
) -> Answers:
    """Let policy and reference answer, and measure KL(π‖π_ref) and KL(π_ref‖π) on what they said.

    Responses are kept in `generated.jsonl` of `answers_dir` as they come: a call that was killed goes on there. Models
    run in the precision of `model.dtype`, on the GPU if there is one. They sample from different streams of random
    numbers, so that their responses are independent; the reference's are the same for every run with this seed.

    Args:
        experiment: has an `evaluate` section.
        prompts: what is asked.
        data_dir: prepared data, to whose prompts the rendered ones are held.
        policy_dir: the trained model.
        answers_dir: exists.
    """
    settings = experiment.evaluate
    tokenizer = load_tokenizer(experiment.model, experiment.data)
    training = read_training_prompts(data_dir)
    rendered = render_prompts(list(prompts.table["messages"]), tokenizer, training, prompts.variables)
    reference_path, revision = reference_source(experiment.model, experiment.data)
    policy = _Side(POLICY, str(policy_dir), None, experiment.seed)
    reference = _Side(REFERENCE, reference_path, revision, experiment.seed + 1)
    # Both are needed side by side for the divergence; other engines need the memory before.
    local = settings.engine == "transformers"
    models = {side.name: _load(experiment, side) for side in (policy, reference)} if local else {}
    started = time.monotonic()
    with open_store(answers_dir / GENERATED) as store:
        answers = {}
        for side in (policy, reference):
            engine = _engine(experiment, side, tokenizer, models.get(side.name))
            answers[side.name] = respond(rendered, engine, store, side.name)
            _free_gpu_memory()
    generated = time.monotonic()
    models = models or {side.name: _load(experiment, side) for side in (policy, reference)}
    logger.info("measuring KL(π‖π_ref) on the policy's responses and KL(π_ref‖π) on the reference's")
    divergence = {}
    for side, other in ((POLICY, REFERENCE), (REFERENCE, POLICY)):
        sequences = [(p.token_ids, r.token_ids) for p, r in zip(rendered, answers[side], strict=True)]
        divergence[side] = sequence_kl(models[side], models[other], sequences, settings.batch_size).nats

    responses = _table(prompts, answers)
    responses["reverse_kl"], responses["forward_kl"] = divergence[POLICY], divergence[REFERENCE]
    provenance = {
        "prompts": {**prompts.report, "bos_per_prompt": rendered[0].bos, "first_as_rendered": rendered[0].text},
        "sampling_seconds": generated - started,
        "kl_seconds": time.monotonic() - generated,
        "policy": policy.source,
        "reference": reference.source,
        "reference_revision": reference.revision,
    }
    return Answers(responses, provenance)


def _table(prompts: Prompts, answers: dict[str, list[Response]]) -> pd.DataFrame:
    columns = ["prompt_id", "instruction", "task"]
    if prompts.table["given_response"].notna().any():
        columns.append("given_response")
    table = prompts.table[columns].copy()
    for side, given in answers.items():
        table[f"{side}_response"] = [response.text for response in given]
        table[f"{side}_tokens"] = [len(response.token_ids) for response in given]
        table[f"{side}_finished"] = [response.finished for response in given]
    return table


def _engine(
    experiment: Experiment, side: _Side, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None
) -> Engine:
    settings = experiment.evaluate
    made_by = {
        **model_identity(side.source, side.revision),
        "engine": settings.engine,
        "dtype": experiment.model.dtype,
        **settings.model_dump(include={"temperature", "top_p", "max_new_tokens", "stop_token_ids"}),
        "seed": side.seed,
    }
    if settings.engine == "vllm":
        from epsdpo.models.vllm import VllmEngine

        dtype = experiment.model.dtype
        return VllmEngine(side.source, side.revision, dtype, tokenizer, settings, side.seed, made_by)
    if settings.engine == "server":
        from epsdpo.models.server import ServerEngine

        name = getattr(settings.server, side.name)
        made_by |= {"server": settings.server.base_url, "name": name, "endpoint": settings.server.endpoint}
        return ServerEngine(settings.server, name, tokenizer, settings, side.seed, made_by)
    return LocalEngine(model, tokenizer, settings, side.seed, made_by)


def _load(experiment: Experiment, side: _Side) -> PreTrainedModel:
    model = load_causal_lm(
        side.source,
        revision=side.revision,
        dtype=getattr(torch, experiment.model.dtype),
        attn_implementation=experiment.model.attn_implementation,
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _free_gpu_memory() -> None:
    """An engine in this process gives its memory back only once it is collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
