"""Responses of a model that vLLM runs in this process.

This module knows as much of vLLM as its documentation says: `LLM.generate` on token ids, with `SamplingParams`. **It
has never been run**: vLLM needs a GPU, which none of this kit's tests has.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from epsdpo.data.rendering import RenderedPrompt
from epsdpo.models.local import end_tokens
from epsdpo.models.response import Decoding, Response, own_seed


class VllmEngine:
    """A model that vLLM loads, as an engine for `epsdpo.models.respond`.

    Every prompt has a seed of its own. vLLM batches as it sees fit, so an answer may differ by a rounding from run to
    run, more often than with `LocalEngine`. The model is loaded when the first answer is asked for, and let go of with
    the last.

    Raises:
        ImportError: if vLLM is not installed.
    """

    def __init__(
        self,
        source: str,
        revision: str | None,
        dtype: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Decoding,
        seed: int,
        made_by: dict[str, Any],
    ):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "engine is 'vllm', and vLLM cannot be imported. Install it with pip install 'epsdpo[vllm]' on "
                "a machine with a GPU, or use engine: transformers"
            ) from error
        self.made_by = made_by
        self._settings, self._seed = settings, seed
        self._sampling = vllm.SamplingParams
        self._ends = end_tokens(
            GenerationConfig.from_pretrained(source, revision=revision, trust_remote_code=False), tokenizer, settings
        )
        self._load = functools.partial(
            vllm.LLM,
            model=source,
            revision=revision,
            tokenizer_revision=revision,
            dtype=dtype,
            trust_remote_code=False,
        )

    def answers(self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]) -> Iterator[dict[int, Response]]:
        """`batch_size` prompts at a time; what came back is stored before the next are sent."""
        model = self._load()
        wanted = [index for index, is_missing in enumerate(missing) if is_missing]
        for start in range(0, len(wanted), self._settings.batch_size):
            members = wanted[start : start + self._settings.batch_size]
            outputs = model.generate(
                [{"prompt_token_ids": prompts[index].token_ids} for index in members],
                [self._sampling_of(prompts[index]) for index in members],
                use_tqdm=False,
            )
            yield {
                index: Response(answer.text, list(answer.token_ids), answer.finish_reason == "stop")
                for index, answer in zip(members, (output.outputs[0] for output in outputs), strict=True)
            }

    def _sampling_of(self, prompt: RenderedPrompt) -> Any:
        return self._sampling(
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_tokens=self._settings.max_new_tokens,
            stop_token_ids=self._ends,
            seed=own_seed(prompt.token_ids, self._seed),
        )
