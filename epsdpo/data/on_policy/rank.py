"""What scores responses, a reward model or the embedded world's gold reward, and the scores that are kept.

scores.jsonl   {"key": "7d…", "score": 1.25}   null for what cannot be scored
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from epsdpo.data.rows import Messages
from epsdpo.experiment import WORLD, RankerSection
from epsdpo.models.kept import Kept, ask_missing
from epsdpo.models.reward_model import RewardModel
from epsdpo.world.language import gold_score


class Answered(NamedTuple):
    """A conversation that ends with the user, and a response to it."""

    messages: Messages
    response: str


class Ranker(Protocol):
    """Something that scores responses; higher is better.

    Attributes:
        made_by: everything but the response that decides a score.
    """

    made_by: dict[str, Any]

    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """Scores of all `missing` responses, by index, a few at a time; None for what cannot be scored."""
        ...


def load_ranker(section: RankerSection) -> Ranker:
    """The ranker that a config names.

    Raises:
        ConfigError: if it cannot be loaded, or is no reward model.
    """
    return GoldRanker() if section.model == WORLD else RewardModelRanker(section)


class GoldRanker:
    """The reward that the embedded world's instructions state themselves."""

    made_by = {"ranker": WORLD}

    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """All at once; see `Ranker`."""
        yield {
            number: gold_score(item.messages[-1]["content"], item.response)
            for number, item in enumerate(answered)
            if missing[number]
        }


class RewardModelRanker:
    """The reward of the whole conversation."""

    def __init__(self, section: RankerSection):
        self._model = RewardModel(section, "data.on_policy.ranker")
        self.made_by = {"ranker": "reward_model", **self._model.made_by}

    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """Batch by batch; see `Ranker`. What does not fit into the model's context has no score."""
        for found in self._model.rewards([[self._model.encode(*item)] for item in answered], missing):
            rewards = {number: math.nan if own is None else own[0] for number, own in found.items()}
            yield {number: reward if math.isfinite(reward) else None for number, reward in rewards.items()}


def score_responses(answered: Sequence[Answered], ranker: Ranker, path: Path) -> list[float | None]:
    """The score of each response, in their order, from the file at `path` or asked for and put there.

    A response that occurs twice is scored once.
    """
    keys = [_key(ranker.made_by, item) for item in answered]
    with Kept(path, _read) as kept:
        ask_missing(dict(zip(keys, answered, strict=True)), kept, ranker.scores, _record, "scores of responses")
        return [kept[key]["score"] for key in keys]


def _key(made_by: dict[str, Any], item: Answered) -> str:
    return hashlib.sha256(json.dumps([made_by, *item], sort_keys=True).encode("ascii")).hexdigest()


def _record(key: str, item: Answered, score: float | None) -> dict[str, Any]:
    return {"key": key, "score": score}


def _read(record: dict[str, Any]) -> dict[str, Any]:
    if type(record["score"]) not in (int, float, type(None)):
        raise ValueError("its score is no number")
    return record
