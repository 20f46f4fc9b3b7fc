"""Which row of the data each pair is, on its way through tokenisation, batches and processes.

Decisions are recorded pair by pair, and a run on several processes must count each pair once, however transformers and
accelerate collate rows and deal them out.
"""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from epsdpo.methods.config import EpsilonDPOConfig

REPEATED = -1  # in place of a pair's index: it is there to fill a batch and counts for nothing


class ScoredPairs(NamedTuple):
    """A batch of pairs, chosen sequences first, then rejected ones, under policy and reference.

    Attributes:
        pair_index: (pairs,), `REPEATED` for pairs that count for nothing.
        completion_mask: (2·pairs, sequence), 1 at completion tokens.
        token_logps: (2·pairs, sequence - 1), log-probability of each completion token under the policy in nats, 0
            elsewhere; it has a gradient.
        ref_token_logps: likewise under the reference.
        log_ratio_margin: (pairs,), z - γ.
        steps: (pairs,), the decision of Eq. 5.
    """

    pair_index: torch.Tensor
    completion_mask: torch.Tensor
    token_logps: torch.Tensor
    ref_token_logps: torch.Tensor
    log_ratio_margin: torch.Tensor
    steps: torch.Tensor


def number_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data with a column `pair_index`, the number of each row."""
    if isinstance(dataset, Dataset):
        return dataset.add_column("pair_index", list(range(len(dataset))))
    return dataset.map(lambda row, index: {"pair_index": index}, with_indices=True)


def pair_ids(dataset: Dataset | IterableDataset) -> dict[int, str]:
    """Row number -> the data's own name of the pair, where it has one and can be looked up."""
    if not isinstance(dataset, Dataset) or "pair_id" not in dataset.column_names:
        return {}
    return {index: str(pair_id) for index, pair_id in zip(dataset["pair_index"], dataset["pair_id"], strict=True)}


class KeepPairIndex:
    """A collator that passes on which row of the data set each pair is, as `pair_index` (pairs,)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        batch["pair_index"] = torch.tensor([example["pair_index"] for example in examples])
        return batch


def mark_repeats(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Give the index `REPEATED` to pairs with which accelerate filled up the last batch of an epoch.

    Every process gets equally many pairs at a time, the last time by starting over; those pairs have been, or will be,
    counted where they belong. Of the last batches taken together the first `left_over` pairs are no repeats.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes > 1 and state.end_of_dataloader:
        pairs = len(batch["pair_index"])
        # Not accelerate's `remainder`, which is that of one process in an epoch that is resumed in its middle.
        left_over = len(state.active_dataloader.dataset) % (processes * pairs)
        place = accelerator.process_index * pairs + torch.arange(pairs, device=batch["pair_index"].device)
        if left_over:
            batch["pair_index"] = batch["pair_index"].masked_fill(place >= left_over, REPEATED)
    return batch


def require_one_order(args: EpsilonDPOConfig, accelerator: Accelerator, datasets: list) -> None:
    """Refuse what would deal pairs to processes in a way that depends on their number, or tears pairs apart.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, and torch's DataParallel cannot share them. Start a process for each "
            "with `accelerate launch` and a file of configs/accelerate, or set CUDA_VISIBLE_DEVICES=0"
        )
    if accelerator.num_processes == 1:
        return
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        raise ValueError(
            "streamed data cannot be dealt to several processes pair by pair. Load the data set whole (without "
            "streaming=True), or use one process"
        )
    if accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches:
        raise ValueError(
            f"accelerator_config={args.accelerator_config.to_dict()} tears pairs apart or lets processes wait for one "
            "another. Leave split_batches, dispatch_batches and even_batches at their defaults"
        )
