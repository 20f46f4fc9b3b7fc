"""KTO (arXiv 2402.01306): TRL's own trainer and loss, on the two halves of each pair as desirable and undesirable."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from trl import KTOTrainer as TrlKTOTrainer

from epsdpo.methods.kto_config import KTOConfig
from epsdpo.methods.recorded import RecordsSteps


class KTOTrainer(RecordsSteps, TrlKTOTrainer):
    """TRL's KTO on the responses of each pair, one desirable and one undesirable, as TRL itself unpairs them.

    TRL goes through the rows in order, and of its own unpairing a thousand desirable ones come first, then a thousand
    undesirable ones. Here both halves of a pair are in the same micro-batch, so that every step sees as many of either
    kind. The pairs are shuffled once, by the seed, and come in that order in every epoch.
    """

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        training = dataset_name == "train"
        rows = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        if training:
            dataset = dataset.shuffle(seed=args.seed)
        return Dataset.from_list(list(unpaired(dataset, rows // 2)))

    def trl_metrics(self, mode: str) -> dict[str, list[float]]:
        return self._metrics[mode]

    def margins(self, metrics: dict[str, float]) -> dict[str, float]:
        margin = metrics["rewards/margins"]
        log_ratios = {f"{side}_log_ratio": metrics[f"rewards/{side}"] / self.beta for side in ("chosen", "rejected")}
        return {"reward_margin": margin, "log_ratio_margin": margin / self.beta, **log_ratios}


def unpaired(pairs: Dataset, at_once: int) -> Iterator[dict[str, Any]]:
    """TRL's rows of KTO: for every `at_once` pairs their chosen responses, then their rejected ones.

    `KL_completion_ids` is the completion of the row before within these, and in the first row that of the last, so
    that with two pairs or more it is a response to another prompt.
    """
    for batch in pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(at_once):
        completions = [*batch["chosen_ids"], *batch["rejected_ids"]]
        labels = [True] * len(batch["chosen_ids"]) + [False] * len(batch["rejected_ids"])
        others = [completions[-1], *completions[:-1]]
        for prompt, completion, other, label in zip(batch["prompt_ids"] * 2, completions, others, labels, strict=True):
            yield {"prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other, "label": label}
