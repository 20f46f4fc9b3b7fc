"""The embedded world as the rest of the project sees it: a reference model, preference pairs, evaluation prompts.

It samples on-policy pairs from the reference, labels them with noise, and keeps model and pairs in a cache addressed by
a hash of whatever decides them.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import transformers

from epsdpo.experiment import WorldSection
from epsdpo.methods.loading import load_causal_lm, read_tokenizer
from epsdpo.runs.derived import derived_folder
from epsdpo.world import language as world_language
from epsdpo.world import model as world_model
from epsdpo.world.language import (
    Instruction,
    build_tokenizer,
    followed_rules,
    gold_reward,
    instructions,
    parse_instruction,
    render,
    sample_instructions,
)
from epsdpo.world.model import SftSettings, sample_responses, train_reference

__all__ = [
    "Instruction",
    "SftSettings",
    "build_tokenizer",
    "evaluation_prompts",
    "followed_rules",
    "gold_reward",
    "parse_instruction",
    "preference_pairs",
    "reference_model_dir",
    "render",
    "sample_instructions",
]

logger = logging.getLogger(__name__)

_DEFAULT_SFT = SftSettings()


def reference_model_dir(settings: WorldSection, sft: SftSettings = _DEFAULT_SFT) -> Path:
    """The folder of the SFT model and its tokenizer, for `from_pretrained`; trained now if the cache has none.

    The first call takes about a minute on two cores. The same settings give the same weights on the same machine.
    """

    def build(folder: Path) -> None:
        logger.info("training the embedded world's SFT model (%d steps), once for all runs", sft.steps)
        tokenizer = build_tokenizer()
        train_reference(sft, settings.seed, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached("model", {"seed": settings.seed, "sft": asdict(sft)}, build)


def preference_pairs(
    settings: WorldSection, split: Literal["train", "eval"], sft: SftSettings = _DEFAULT_SFT
) -> pd.DataFrame:
    """On-policy preference pairs: the SFT model's own responses, compared by noisy labels of the gold reward.

    Of an instruction's distinct, non-empty responses the best by noisy label is chosen and the worst rejected. The
    label of a response is gold/τ + Gumbel noise, τ = `label_temperature`, which is the Plackett-Luce model; for two
    responses it is Bradley-Terry: P(y ≻ y') = σ((gold(y) − gold(y'))/τ). An instruction with fewer than two distinct
    responses is replaced by the next one; how many were is in `frame.attrs["instructions_without_a_pair"]`.

    Returns:
        One row per pair: `pair_id`, `prompt`, `chosen`, `rejected` (lists of chat messages), `chosen_gold`,
        `rejected_gold`, `task`.
    """
    wanted = {"train": settings.train_pairs, "eval": settings.eval_pairs}[split]
    reference = reference_model_dir(settings, sft)

    def build(folder: Path) -> None:
        _sample_pairs(settings, split, wanted, reference).to_parquet(folder / "pairs.parquet")

    decided_by = {
        "model": reference.name,
        "seed": settings.seed,
        "split": split,
        "pairs": wanted,
        "responses_per_prompt": settings.responses_per_prompt,
        "label_temperature": settings.label_temperature,
    }
    pairs = pd.read_parquet(_cached("pairs", decided_by, build) / "pairs.parquet")
    for column, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        pairs[column] = [[{"role": role, "content": text}] for text in pairs[column]]
    return pairs


def evaluation_prompts(settings: WorldSection) -> pd.DataFrame:
    """Held-out instructions: `prompt_id`, `prompt` (chat messages), `instruction` (its text), `task`."""
    rows = [
        {
            "prompt_id": f"prompt-{index}",
            "prompt": [{"role": "user", "content": render(instruction)}],
            "instruction": render(instruction),
            "task": instruction.task,
        }
        for index, instruction in enumerate(sample_instructions(settings.prompts, settings.seed, "prompts"))
    ]
    return pd.DataFrame(rows)


def _sample_pairs(settings: WorldSection, split: str, wanted: int, reference: Path) -> pd.DataFrame:
    """`wanted` rows of texts and gold rewards, sampled in as many rounds as it takes."""
    logger.info("sampling %d responses for %s pairs", wanted * settings.responses_per_prompt, split)
    tokenizer = read_tokenizer(reference)
    model = load_causal_lm(reference, dtype=torch.float32)
    noise = np.random.default_rng([settings.seed, *split.encode()])
    unused = instructions(settings.seed, split)
    rows: list[dict[str, Any]] = []
    asked = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(noise.integers(2**32)))
        while len(rows) < wanted:
            batch = list(islice(unused, wanted - len(rows)))
            asked += len(batch)
            texts = [render(instruction) for instruction in batch]
            answers = sample_responses(model, tokenizer, texts, settings.responses_per_prompt)
            rows += _label(batch, answers, settings.label_temperature, noise)
    pairs = pd.DataFrame(rows)
    pairs.insert(0, "pair_id", [f"{split}-{index}" for index in range(wanted)])
    pairs.attrs["instructions_without_a_pair"] = asked - wanted
    logger.info("%d of %d instructions gave no two distinct responses and were replaced", asked - wanted, asked)
    return pairs


def _label(
    batch: list[Instruction], answers: list[list[str]], temperature: float, noise: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for instruction, responses in zip(batch, answers, strict=True):
        distinct = sorted({response for response in responses if response})
        if len(distinct) < 2:
            continue
        gold = np.array([gold_reward(instruction, response) for response in distinct])
        label = gold / temperature + noise.gumbel(size=len(distinct))
        best, worst = label.argmax(), label.argmin()
        yield {
            "prompt": render(instruction),
            "chosen": distinct[best],
            "rejected": distinct[worst],
            "chosen_gold": gold[best],
            "rejected_gold": gold[worst],
            "task": instruction.task,
        }


def _cached(kind: str, decided_by: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills, built once per value of `decided_by`, world source and library versions."""
    versions = [torch.__version__, transformers.__version__]
    return derived_folder(kind, {**decided_by, "source": _source_digest(), "versions": versions}, build)


def _source_digest() -> str:
    sources = (world_language.__file__, world_model.__file__, __file__)
    return hashlib.sha256(b"\n".join(Path(source).read_bytes() for source in sources)).hexdigest()
