"""The gold judge of the embedded world, and AlpacaEval's format for what a judge says.

This module knows how two rewards become a preference. The reward itself is `epsdpo.world`'s; rates and intervals are
`epsdpo.evaluation.winrate`'s.
"""

import math
from typing import Any

import pandas as pd

from epsdpo.world_language import followed_rules, gold_reward, parse_instruction

GOLD_JUDGE = "gold"
REFERENCE = "reference"


def gold_judge(instruction: str, response: str) -> float:
    """The gold reward of a response to an instruction, both as texts.

    Raises:
        ValueError: if the instruction is not one of the embedded world.
    """
    return gold_reward(parse_instruction(instruction), response)


def follows_every_rule(instruction: str, response: str) -> bool:
    """Whether a response does all that the instruction asks for, however many words it takes."""
    return all(followed_rules(parse_instruction(instruction), response).values())


def preference(reward_reference: float, reward_model: float, temperature: float) -> float:
    """1 + σ(difference of rewards / temperature): 1 plus the Bradley-Terry chance that the model wins."""
    return 1.0 + 0.5 * (1.0 + math.tanh(0.5 * (reward_model - reward_reference) / temperature))


def annotate(responses: pd.DataFrame, model_name: str, temperature: float) -> list[dict[str, Any]]:
    """Judge every prompt, in the format of AlpacaEval's `annotations.json`.

    `output_1` is the reference, `output_2` the model. Beside AlpacaEval's keys, which its package reads, each row has
    `prompt_id` and the two rewards. Identical outputs are a draw.

    Args:
        responses: columns prompt_id, instruction, reference_response, policy_response, reference_gold, policy_gold.
        model_name: how `generator_2` is called.
        temperature: in units of gold reward, that of the world's labels.
    """
    return [
        {
            "instruction": row.instruction,
            "output_1": row.reference_response,
            "generator_1": REFERENCE,
            "output_2": row.policy_response,
            "generator_2": model_name,
            "annotator": GOLD_JUDGE,
            "preference": 1.5
            if row.policy_response == row.reference_response
            else preference(row.reference_gold, row.policy_gold, temperature),
            "prompt_id": row.prompt_id,
            "reward_1": row.reference_gold,
            "reward_2": row.policy_gold,
        }
        for row in responses.itertuples()
    ]
