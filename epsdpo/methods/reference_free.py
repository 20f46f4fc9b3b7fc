"""SimPO, CPO and ORPO: TRL's own trainers for methods that have no reference, on the pairs that all methods train on.

TRL 1.16 keeps them in `trl.experimental`; SimPO is its CPO with `loss_type: simpo`. They build whole logits, so they
need more memory than the methods with a pass over tiles.
"""

import copy
from typing import Any

from datasets import Dataset
from trl.experimental.cpo import CPOTrainer as TrlCPOTrainer
from trl.experimental.orpo import ORPOTrainer as TrlORPOTrainer

from epsdpo.methods.loading import load_causal_lm
from epsdpo.methods.method_config import MethodConfig
from epsdpo.methods.recorded import RecordsSteps

_NO_LABEL = -100


class _OnPreparedPairs(RecordsSteps):
    """What CPO and ORPO have in common here: rows made of token ids, and a record without a reference in it.

    Args:
        model: where to load the policy from, by the `model_init_kwargs` of `args`.
        args: its `max_length` cuts completions, as in the other methods.
        train_dataset: with the columns `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of int).
        eval_dataset: likewise, or None.
        named: further arguments of TRL's trainer, of which `processing_class` is needed: its padding token is the EOS
            where it has none.
    """

    def __init__(self, model: str, args: MethodConfig, train_dataset: Dataset, eval_dataset: Dataset | None, **named):
        # Loaded here, because TRL's would ask accelerate to spread it over the devices of one process.
        options = {**(args.model_init_kwargs or {})}
        options.pop("trust_remote_code", None)  # which is not a choice here
        policy = load_causal_lm(model, **options)
        args = copy.copy(args)
        args.model_init_kwargs = None
        args.remove_unused_columns = False  # as TRL's own collator needs it
        tokenizer = named["processing_class"]
        if tokenizer.pad_token is None:  # Llama 3 and Mistral have none; TRL's DPO does this by itself
            tokenizer.pad_token = tokenizer.eos_token
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        super().__init__(
            model=policy,
            args=args,
            train_dataset=train_dataset.select_columns(columns),
            eval_dataset=None if eval_dataset is None else eval_dataset.select_columns(columns),
            **named,
        )

    def tokenize_row(self, feature: dict[str, list[int]], model: Any = None) -> dict[str, list[int]]:
        """The columns that TRL's collator pads, from ids instead of texts: prompts are those of all other methods."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = feature[f"{side}_ids"][: max(0, self.max_length - len(prompt))]
            row[f"{side}_input_ids"] = prompt + completion
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
            row[f"{side}_labels"] = [_NO_LABEL] * len(prompt) + completion
        return row

    def trl_metrics(self, mode: str) -> dict[str, list[float]]:
        return self._stored_metrics[mode]

    def margins(self, metrics: dict[str, float]) -> dict[str, float]:
        # There is no reference to compare with, and so no log-ratio.
        return {"reward_margin": metrics["rewards/margins"], "reward_accuracy": metrics["rewards/accuracies"]}


class CPOTrainer(_OnPreparedPairs, TrlCPOTrainer):
    """TRL's CPO (arXiv 2401.08417), and SimPO (arXiv 2405.14734) with `loss_type="simpo"` and `cpo_alpha=0.0`."""


class ORPOTrainer(_OnPreparedPairs, TrlORPOTrainer):
    """TRL's ORPO (arXiv 2403.07691); its λ is `beta`."""
