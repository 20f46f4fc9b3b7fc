"""Which of a prompt's scored responses make a pair, and what a table of pairs is. Pure functions."""

import json
from collections.abc import Sequence

import pandas as pd

from epsdpo.methods.beside import SETTINGS

# Why a prompt may come to no pair. The first reason that applies is the one counted.
REFUSED = {
    "no_two_texts": "fewer than two different responses that have text and a score",
    "tied": "the best and the worst response have the same score",
}


def best_and_worst(texts: Sequence[str], scores: Sequence[float | None]) -> tuple[int, int] | str:
    """Places of the response with the highest and of that with the lowest score, the first of equals.

    Args:
        texts: a prompt's responses; blank ones are not considered.
        scores: theirs; None where there is none.

    Returns:
        The two places, or the reason, a key of `REFUSED`, why there is no pair.
    """
    able = [place for place, text in enumerate(texts) if text.strip() and scores[place] is not None]
    if len({texts[place] for place in able}) < 2:
        return "no_two_texts"
    best = max(able, key=lambda place: scores[place])
    worst = min(able, key=lambda place: scores[place])
    return "tied" if scores[best] == scores[worst] else (best, worst)


def make_pairs(prompts: pd.DataFrame, responses: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """One pair for each prompt that has one, and the ids of the others by reason.

    Args:
        prompts: prompt_id and messages, and where there are any the template_variables with which they were asked.
        responses: prompt_id, response and score (NaN for none), several rows for each prompt.

    Returns:
        pair_id (the prompt's id), prompt, chosen and rejected (lists of messages), chosen_score and rejected_score, and
        chat_template_kwargs (JSON) where prompts have any; and reason -> prompt ids, for `REFUSED`.
    """
    pairs, refused = [], {}
    by_prompt = dict(list(responses.groupby("prompt_id", sort=False)))
    brings = "template_variables" in prompts
    told = prompts["template_variables"] if brings else [{}] * len(prompts)
    for prompt_id, messages, variables in zip(prompts["prompt_id"], prompts["messages"], told, strict=True):
        own = by_prompt[prompt_id]
        texts = own["response"].tolist()
        scores = [None if pd.isna(score) else score for score in own["score"]]
        chosen = best_and_worst(texts, scores)
        if isinstance(chosen, str):
            refused.setdefault(chosen, []).append(prompt_id)
            continue
        best, worst = chosen
        pairs.append(
            {
                "pair_id": prompt_id,
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": texts[best]}],
                "rejected": [{"role": "assistant", "content": texts[worst]}],
                "chosen_score": scores[best],
                "rejected_score": scores[worst],
                SETTINGS: json.dumps(variables),
            }
        )
    columns = ["pair_id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score"]
    columns += [SETTINGS] if brings else []
    return pd.DataFrame(pairs, columns=columns), refused
