"""What is judged and measured: both models' responses to the same prompts, and their divergence both ways."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epsdpo.data.prompts import Prompts
from epsdpo.data.rendering import read_training_prompts, render_prompts
from epsdpo.evaluation.kl import sequence_kl
from epsdpo.experiment import Experiment
from epsdpo.models.hub import model_identity
from epsdpo.models.local import LocalEngine
from epsdpo.models.respond import Engine, kept_responses, respond
from epsdpo.models.response import Response
from epsdpo.models.server import ServerEngine, served_by
from epsdpo.models.start import load_tokenizer, start_of
from epsdpo.models.weights import load_answering_model

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
    tokenizer = load_tokenizer(experiment)
    training = read_training_prompts(data_dir)
    rendered = render_prompts(list(prompts.table["messages"]), tokenizer, training, prompts.variables)
    reference_path, revision = start_of(experiment)
    policy = _Side(POLICY, str(policy_dir), None, experiment.seed)
    reference = _Side(REFERENCE, reference_path, revision, experiment.seed + 1)
    # Both are needed side by side for the divergence; a server may need the memory before.
    local = settings.engine == "transformers"
    models = {side.name: _load(experiment, side) for side in (policy, reference)} if local else {}
    started = time.monotonic()
    with kept_responses(answers_dir / GENERATED) as kept:
        answers = {}
        for side in (policy, reference):
            engine = _engine(experiment, side, tokenizer, models.get(side.name))
            answers[side.name] = respond(rendered, engine, kept, side.name)
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
    if settings.engine == "server":
        server = settings.server.of_reference() if side.name == REFERENCE else settings.server
        name = getattr(server, side.name)
        made_by |= served_by(server, name)
        return ServerEngine(server, name, tokenizer, settings, side.seed, made_by)
    return LocalEngine(model, tokenizer, settings, side.seed, made_by)


def _load(experiment: Experiment, side: _Side) -> PreTrainedModel:
    return load_answering_model(experiment.model, side.source, side.revision)
