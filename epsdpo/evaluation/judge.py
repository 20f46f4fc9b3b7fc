"""What a judge says of the responses: which texts it compares, and its answers as columns and as annotations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.data.prompts import Prompts
from epsdpo.evaluation.judges.ask import judge_comparisons
from epsdpo.evaluation.judges.causal_lm import CausalLMJudge
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import Comparison, Judge, Judgement
from epsdpo.evaluation.judges.cost import cost_of
from epsdpo.evaluation.judges.counts import BY_ORDER, annotations, summarise
from epsdpo.evaluation.judges.gold import GOLD_JUDGE, GoldJudge
from epsdpo.evaluation.judges.pair_ranker import PairRankerJudge
from epsdpo.evaluation.judges.reward import RewardModelJudge
from epsdpo.evaluation.judges.template import load_template
from epsdpo.experiment import EvaluateSection, Experiment
from epsdpo.experiment.sections.judge import JudgeSection

_JUDGES = {
    "chat": ChatJudge,
    "causal_lm": CausalLMJudge,
    "reward_model": RewardModelJudge,
    "pair_ranker": PairRankerJudge,
}


def check_given_responses(prompts: Prompts, settings: EvaluateSection) -> None:
    """Refuse, before models are loaded, prompts that lack the response which the policy's is to be compared with.

    Raises:
        ValueError: naming how many do, and the first.
    """
    if settings.judge is None or settings.against != "given":
        return
    table = prompts.table
    without = table["prompt_id"][table["given_response"].isna()]
    if len(without):
        raise ValueError(
            f"evaluate.against is 'given', but {len(without)} of {len(table)} prompts of {prompts.report['source']} "
            f"bring no response along, the first is {without.iloc[0]!r}. Use against: reference, or other prompts"
        )


def load_judge(settings: JudgeSection, label_temperature: float) -> Judge:
    """The judge that a config names, with its model loaded where it runs here.

    Args:
        label_temperature: of the embedded world, for the gold judge.

    Raises:
        ConfigError: if its key is missing or its model cannot be loaded.
        ValueError, OSError: if its template cannot be used.
    """
    return GoldJudge(label_temperature) if settings.kind == "gold" else _JUDGES[settings.kind](settings)


class LazyJudge:
    """The experiment's judge, and where its answers are kept.

    A missing key or an unreadable template shows when this is made. A judge that runs here is loaded when it is first
    asked: until then its memory belongs to the models that answer.
    """

    def __init__(self, settings: JudgeSection, label_temperature: float, answers_dir: Path):
        """
        Args:
            label_temperature: of the embedded world, for the gold judge.
            answers_dir: where answers are kept.
        """
        self.settings, self._temperature, self._answers_dir = settings, label_temperature, answers_dir
        self._judge: Judge | None = None
        load_template(settings.template)
        if settings.kind in ("gold", "chat"):
            self._judge = load_judge(settings, label_temperature)

    def compare(self, comparisons: list[Comparison]) -> list[Judgement]:
        """Judge them; what is asked is kept, but for the gold judge's answers, which cost nothing.

        Raises:
            JudgeError: if the judge cannot be asked.
        """
        if self._judge is None:
            self._judge = load_judge(self.settings, self._temperature)
        free = self.settings.kind == "gold"
        return judge_comparisons(comparisons, self._judge, None if free else self._answers_dir)

    @property
    def name(self) -> str:
        """How annotations call it."""
        return GOLD_JUDGE if self.settings.kind == "gold" else self.settings.model

    def in_words(self) -> str:
        """Who judged, and how, for reports."""
        if self.settings.kind == "gold":
            return f"{self.name} (the embedded world's own reward, label temperature {self._temperature:g})"
        order = {"seeded": "AlpacaEval's order", "both": "both orders"}[self.settings.order]
        how = {
            "chat": f"a chat server, {self.settings.mode}, {order}",
            "causal_lm": f"a causal language model, log-probabilities, {order}",
            "reward_model": "a reward model",
            "pair_ranker": f"a pair ranker, {order}",
        }
        return f"{self.name} ({how[self.settings.kind]})"


@dataclass(frozen=True)
class Judged:
    """What a judge said.

    Attributes:
        preferences: one row per response: preference in [1, 2], NaN where judging failed, and the columns `BY_ORDER`,
            NaN where that order was not shown.
        annotations: rows in AlpacaEval's format, one per distinct instruction, with `prompt_id`.
        numbers: for the summary: judge, counts, order effects, times, tokens and what they cost.
    """

    preferences: pd.DataFrame
    annotations: list[dict[str, Any]]
    numbers: dict[str, Any]


def judge_responses(responses: pd.DataFrame, experiment: Experiment, judge: LazyJudge) -> Judged:
    """Let the judge compare the policy's responses with what `evaluate.against` names.

    Args:
        responses: columns instruction, prompt_id, policy_response, and reference_response or given_response.

    Raises:
        JudgeError: if the judge cannot be asked.
    """
    against = experiment.evaluate.against
    comparisons = [
        Comparison(instruction, opponent, policy)
        for instruction, opponent, policy in zip(
            responses["instruction"], responses[f"{against}_response"], responses["policy_response"], strict=True
        )
    ]
    judgements = judge.compare(comparisons)
    preferences = pd.DataFrame({"preference": [judgement.preference for judgement in judgements]}, dtype="float64")
    for switched, column in BY_ORDER.items():
        found = [judgement.records.get(switched, {}).get("preference") for judgement in judgements]
        preferences[column] = pd.array(found, dtype="float64")
    rows = annotations(comparisons, judgements, judge.name, experiment.name, against)
    numbered = [{**row, "prompt_id": number} for row, number in zip(rows, responses["prompt_id"], strict=True)]
    distinct = list({row["instruction"]: row for row in reversed(numbered)}.values())[::-1]
    counts = summarise(judgements)
    numbers = {
        "judge": judge.in_words(),
        "against": against,
        **counts,
        "n_annotations": len(distinct),
        "judge_cost": cost_of(counts["prompt_tokens"], counts["completion_tokens"], judge.settings),
    }
    return Judged(preferences, distinct, numbers)
