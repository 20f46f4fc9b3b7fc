"""A causal language model as judge, run here: same prompt and same rule as behind a server, without the server."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from epsdpo.evaluation.judges.answers import read_logprobs
from epsdpo.evaluation.judges.comparison import Answer, Presentation
from epsdpo.evaluation.judges.template import load_template
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.batches import batches, chat_ids, padded, told
from epsdpo.models.response import Failure
from epsdpo.models.weights import context_of, load_scoring_model


class CausalLMJudge:
    """Reads m and M off the model's distribution, of which only the `top_logprobs` likeliest tokens count."""

    def __init__(self, settings: JudgeSection):
        """
        Raises:
            ConfigError: if the model cannot be loaded.
            ValueError, OSError: if the template cannot be used.
        """
        self.name, self.order, self._settings = settings.model, settings.order, settings
        self._model, self._tokenizer, self._weights = load_scoring_model(
            AutoModelForCausalLM, settings, "evaluate.judge"
        )
        self._template = load_template(settings.template)

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The messages and what reads them."""
        return {
            "judge": "causal_lm",
            "weights": self._weights,
            "dtype": self._settings.dtype,
            **told(self._tokenizer),
            "top_logprobs": self._settings.top_logprobs,
            "messages": self._template.fill(presentation),
        }

    @torch.inference_mode()
    def answers(
        self, presentations: Sequence[Presentation], missing: Sequence[bool]
    ) -> Iterator[dict[int, Answer | Failure]]:
        """Batch by batch; see `Judge`. What does not fit into the model's context fails and is not cut."""
        prompts = [chat_ids(self._tokenizer, self._template.fill(item), answer_next=True) for item in presentations]
        context = context_of(self._model)
        for members in batches([len(ids) for ids in prompts], self._settings.batch_size):
            if not any(missing[number] for number in members):
                continue
            fitting = [number for number in members if context is None or len(prompts[number]) <= context]
            answers: dict[int, Answer | Failure] = {
                number: Failure(
                    "longer than the judge's context", f"{len(prompts[number])} tokens, the model reads {context}"
                )
                for number in set(members) - set(fitting)
            }
            if fitting:
                for number, top in zip(fitting, self._top_logprobs([prompts[row] for row in fitting]), strict=True):
                    found = read_logprobs(top)
                    answers[number] = found if isinstance(found, Failure) else Answer(*found)
            yield answers

    def _top_logprobs(self, prompts: list[list[int]]) -> list[list[tuple[str, float]]]:
        """The likeliest tokens after each prompt with their log-probabilities, the likeliest first."""
        ids, mask = padded(prompts, pad=0, side="left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self._model.device
        logits = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        top = logits.float().log_softmax(-1).topk(self._settings.top_logprobs)
        return [
            [(self._tokenizer.decode([token]), value) for token, value in zip(*pair, strict=True)]
            for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
