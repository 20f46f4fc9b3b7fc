"""PairRM as judge: a DeBERTa that reads the instruction and both outputs at once.

It reads the published form of `llm-blender/PairRM-hf` (Jiang et al., arXiv 2306.02561): a safetensors checkpoint with
`pretrained_model.*` and `head_layer.*`, three marker tokens, and a budget of tokens for each part. The original
`llm-blender/PairRM` holds the same weights in a form of its own, which is not read here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from epsdpo.evaluation.judges.comparison import Answer, Presentation
from epsdpo.experiment import ConfigError
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.batches import batches, padded
from epsdpo.models.response import Failure
from epsdpo.models.weights import load_scoring_model

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
_OF_CONFIG = ("drop_out", "n_tasks", "source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_INSTRUCTION_TOKENS = 1224
_TOTAL_TOKENS = 2048


class PairRankerModel(DebertaV2PreTrainedModel):
    """DeBERTa with a two-layer head on [state at the source marker, state at a candidate's marker]."""

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        if lacking := [name for name in _OF_CONFIG if not hasattr(config, name)]:
            raise ValueError(f"its config has no {', '.join(lacking)}; a pair ranker is one like llm-blender/PairRM-hf")
        self.pretrained_model = DebertaV2Model(config)
        size = config.hidden_size
        # Positions 0 and 3 are dropout in training; they keep the checkpoint's names of the two layers.
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch,) log-odds that the first candidate is better, from ids and mask of shape (batch, sequence)."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        markers = (self.config.source_prefix_id, self.config.cand1_prefix_id, self.config.cand2_prefix_id)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        source, first, second = (states[rows, (input_ids == marker).int().argmax(-1)] for marker in markers)
        scores = [self.head_layer(torch.cat([source, candidate], dim=-1)) for candidate in (first, second)]
        return (scores[0] - scores[1]).mean(dim=-1)


class PairRankerJudge:
    """P(the first output is better) = σ(log-odds). Parts beyond the published budget are cut, and counted."""

    def __init__(self, settings: JudgeSection):
        """
        Raises:
            ConfigError: if the model cannot be loaded, or the tokenizer does not have the three markers where the
                model's config says.
        """
        self.name, self.order, self._settings = settings.model, settings.order, settings
        self._model, self._tokenizer, self._weights = load_scoring_model(PairRankerModel, settings, "evaluate.judge")
        config = self._model.config
        self._markers = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
        found = self._tokenizer.convert_tokens_to_ids([SOURCE, FIRST, SECOND])
        if found != self._markers:
            raise ConfigError(
                f"evaluate.judge.model: the tokenizer of {settings.model!r} has {SOURCE}, {FIRST}, {SECOND} at "
                f"{found}, its config at {self._markers}. A pair ranker is a checkpoint like llm-blender/PairRM-hf"
            )

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The texts in their order, and what ranks them."""
        return {
            "judge": "pair_ranker",
            "weights": self._weights,
            "dtype": self._settings.dtype,
            "instruction": presentation.comparison.instruction,
            "outputs": [presentation.first, presentation.second],
        }

    @torch.inference_mode()
    def answers(
        self, presentations: Sequence[Presentation], missing: Sequence[bool]
    ) -> Iterator[dict[int, Answer | Failure]]:
        """Batch by batch; see `Judge`. A text that holds one of the markers fails: it would stand for a part."""
        encoded = [self._encode(item) for item in presentations]
        device = self._model.device
        for members in batches([len(ids) for ids, _ in encoded], self._settings.batch_size):
            if not any(missing[number] for number in members):
                continue
            readable = [number for number in members if self._has_each_marker_once(encoded[number][0])]
            answers: dict[int, Answer | Failure] = {
                number: Failure("text holds a marker of the pair ranker") for number in set(members) - set(readable)
            }
            if readable:
                sequences = [encoded[number][0] for number in readable]
                ids, mask = padded(sequences, self._tokenizer.pad_token_id, side="right")
                log_odds = self._model(ids.to(device), mask.to(device)).double()
                losses = torch.sigmoid(-log_odds).tolist()
                for number, value, second_wins in zip(readable, log_odds.tolist(), losses, strict=True):
                    evidence = {"log_odds_first": value, "cut": encoded[number][1]}
                    answers[number] = Answer(second_wins, evidence)
            yield answers

    def _encode(self, presentation: Presentation) -> tuple[list[int], bool]:
        """Instruction, first and second output, each behind its marker, and whether any was cut."""
        instruction, cut = self._part(SOURCE + presentation.comparison.instruction, _INSTRUCTION_TOKENS)
        budget = (_TOTAL_TOKENS - len(instruction)) // 2
        first, first_cut = self._part(FIRST + presentation.first, budget)
        second, second_cut = self._part(SECOND + presentation.second, budget)
        return instruction + first + second, cut or first_cut or second_cut

    def _part(self, text: str, budget: int) -> tuple[list[int], bool]:
        """Ids of a part with the special tokens around it, at most `budget`, and whether it was cut to that."""
        ids = self._tokenizer.encode(text, max_length=budget, truncation=True)
        return ids, len(ids) == budget and len(self._tokenizer.encode(text)) > budget

    def _has_each_marker_once(self, ids: list[int]) -> bool:
        return all(ids.count(marker) == 1 for marker in self._markers)
