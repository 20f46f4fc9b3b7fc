"""The pairs of a run in batches, and its reference with its hidden states on them, from which all passes start."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.evaluation.scores.clusters import conversations_of_rendered
from epsdpo.methods.heads import head_of
from epsdpo.models.start import start_of
from epsdpo.paper.epsilon_bound import Progress
from epsdpo.paper.frozen import completion_tokens, hidden_states, load_frozen, precision_of
from epsdpo.paper.precision.decisions import States
from epsdpo.paper.real_text.subjects import Subject

_BATCH = 8  # pairs at once


class Bench:
    """The pairs of a run in batches, and its reference with its states on them."""

    def __init__(self, subject: Subject):
        self.device = subject.arguments.device
        # Padding is masked: any token will do.
        collate = DataCollatorForPreference(pad_token_id=0, max_length=subject.arguments.max_length)
        parts = [
            subject.pairs.select(range(start, min(start + _BATCH, len(subject.pairs))))
            for start in range(0, len(subject.pairs), _BATCH)
        ]
        self.batches = [collate(part.to_list()) for part in parts]
        self.pair_ids = [list(part["pair_id"]) for part in parts]
        self.prompts = dict(
            zip(subject.pairs["pair_id"], conversations_of_rendered(list(subject.pairs["prompt"])), strict=True)
        )
        source, revision = start_of(subject.experiment)
        self.reference = load_frozen(subject.experiment, source, self.device, revision=revision)
        self.head = head_of(self.reference)
        self.hidden = self.states_of(self.reference, subject, "reference")

    def states_of(self, model: PreTrainedModel, subject: Subject, what: str) -> list[torch.Tensor]:
        """A model's hidden states on each batch; a line of progress now and then says how far `what` is."""
        progress, states, done = Progress(f"{what}, hidden states", len(subject.pairs)), [], 0
        with torch.no_grad(), precision_of(subject.arguments):
            for batch, pair_ids in zip(self.batches, self.pair_ids, strict=True):
                states.append(hidden_states(model, batch))
                done += len(pair_ids)
                progress.tell(done)
        return states

    def states(self, hidden: list[torch.Tensor]) -> list[States]:
        """The states of each batch, with a policy's hidden ones."""
        found = []
        for policy, reference, batch in zip(hidden, self.hidden, self.batches, strict=True):
            mask, labels = completion_tokens(batch, self.device)
            found.append((policy, reference, labels, mask))
        return found


class Benches:
    """The last bench, which runs with the same reference and pairs share."""

    def __init__(self):
        self._of, self._bench = "", None

    def of(self, subject: Subject) -> Bench:
        if self._bench is None or subject.reference != self._of:
            self._bench, self._of = Bench(subject), subject.reference
        return self._bench
