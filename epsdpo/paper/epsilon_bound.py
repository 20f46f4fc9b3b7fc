"""Up to which ε the decisions of pairs hold, over training: Figure 5.

    python -m epsdpo.paper.epsilon_bound --train-dir TRAIN --data DATA [--sft-dir SFT] [--pairs N] [--output DIR]

For every whole checkpoint of a run and for its final model, policy and reference run once over each batch of pairs, and
the criterion of Eq. 5 is evaluated on their hidden states at each ε of a grid, in the run's own arithmetic (train.bf16,
train.criterion_dtype). The upper bound of a pair is the largest ε of the grid up to which all its decisions are the one
at the smallest ε. The figure shows the mean bound of the pairs that relax (ε↓) and of those that tighten (ε↑).

The paper draws 100 values of ε uniformly from (0.005, 0.02); here as many are evenly spaced. It does not fully state
which pairs it took, what it did with those that are tied at small ε, and how it aggregated. Here the pairs are held-out
ones where there are any, spread evenly over them; tied pairs have no bound; and a pair that holds throughout counts
with the largest ε, so that a mean is a lower limit wherever `share_at_largest` is above 0, and says so. Every bound is
kept, for other ways to count.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from torch.distributed import checkpoint as sharded
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo import plots
from epsdpo.data.prepared import DataError, PreparedData, load_prepared
from epsdpo.evaluation.scores.clusters import conversations_of_rendered
from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.methods.heads import require_same_vocabulary
from epsdpo.methods.kernels import ARITHMETICS
from epsdpo.methods.record import DamagedRecord, read_steps
from epsdpo.models.start import after_sft, start_of
from epsdpo.paper.drawing_bound import epsilon_bounds
from epsdpo.paper.frozen import decisions_at, load_frozen, precision_of
from epsdpo.plots.csv_files import write_csv
from epsdpo.runs.layout import MODEL_FOLDER, experiment_of
from epsdpo.train.checkpoints import whole_checkpoints
from epsdpo.train.preferences import trainer_arguments
from epsdpo.trajectory.summary import DECISIONS

EPSILONS = tuple(np.linspace(0.005, 0.02, 100).tolist())
PAIRS = 256
BOOTSTRAP_SAMPLES = 2000

_SECONDS_BETWEEN_LINES = 30.0


# ------------------------------------------------------------------------------------------------------------- bounds


def upper_bounds(decisions: np.ndarray, epsilons: Sequence[float]) -> np.ndarray:
    """The largest ε up to which each pair's decision is the one at the smallest ε; NaN where that one is a tie.

    Args:
        decisions: (epsilons, pairs), from `decisions_at`.
        epsilons: increasing.

    Returns:
        (pairs,) float64.
    """
    if (np.diff(epsilons) <= 0.0).any():
        raise ValueError(f"epsilons={list(epsilons)} must increase; sort them and remove those that repeat")
    holds = np.logical_and.accumulate(decisions == decisions[0], axis=0)
    bounds = np.asarray(epsilons, dtype=np.float64)[holds.sum(axis=0) - 1]
    return np.where(decisions[0] == 0, np.nan, bounds)


def mean_bounds(bounds: pd.DataFrame, epsilons: Sequence[float], seed: int) -> pd.DataFrame:
    """The mean bound at each optimiser step, of relaxed and of tightened pairs apart.

    Args:
        bounds: from `measure`.
        seed: of the bootstrap.

    Returns:
        One row per step and decision: step, decision, pairs (with that decision), of_pairs (all that were measured),
        bound (mean), low, high (95 % bootstrap interval over the pairs' prompts; NaN for fewer than two),
        share_at_largest (of the pairs, those that hold throughout: above 0, bound is a lower limit) and
        largest_epsilon.
    """
    rows = []
    for step, at_step in bounds.groupby("step"):
        for decision in ("relaxed", "tightened"):
            values = at_step.loc[at_step["decision"] == decision, "bound"]
            row = {"step": step, "decision": decision, "pairs": len(values), "of_pairs": len(at_step)}
            row |= {"bound": values.mean(), "low": np.nan, "high": np.nan}
            if len(values) > 1:
                prompts = at_step.loc[values.index].get("prompt")
                interval = bootstrap_interval(values, BOOTSTRAP_SAMPLES, seed, prompts=prompts)
                row |= {"low": interval.low, "high": interval.high}
            rows.append(row | {"share_at_largest": (values == epsilons[-1]).mean(), "largest_epsilon": epsilons[-1]})
    return pd.DataFrame(rows)


def with_limit(text: str, share_at_largest: float, largest: float) -> str:
    """A mean bound, given as text, as the lower limit that it is where pairs hold up to the largest ε tried."""
    if not share_at_largest > 0.0:
        return text
    if share_at_largest == 1.0:
        return f"≥ {largest:g} (largest ε tried)"
    return f"≥ {text} ({share_at_largest:.1%} of pairs at {largest:g}, the largest ε tried)"


def _in_words(table: pd.DataFrame) -> str:
    """The table of `mean_bounds` as text for people."""
    words = [
        "–" if np.isnan(row.bound) else with_limit(f"{row.bound:.4g}", row.share_at_largest, row.largest_epsilon)
        for row in table.itertuples()
    ]
    shown = table.drop(columns=["share_at_largest", "largest_epsilon"]).assign(bound=words)
    return shown.to_string(index=False, float_format="{:.4g}".format)


# --------------------------------------------------------------------------------------------------------- over a run


def measured_pairs(data: PreparedData, count: int) -> Dataset:
    """The pairs on which a run's policies are measured: at most `count` held-out ones, or training ones without any.

    They are spread evenly over the data, whose parts may lie one after the other.
    """
    pairs = data.train if data.eval is None else data.eval
    return pairs.select(np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int)))


def measure_run(
    experiment: Experiment, train_dir: Path, data: PreparedData, epsilons: Sequence[float], count: int = PAIRS
) -> pd.DataFrame:
    """`measure` on the `measured_pairs` of a run, in the arithmetic of its trainer.

    Args:
        experiment: the one trained in `train_dir`, after its SFT if it has one.

    Raises:
        ConfigError: if its checkpoints have no fixed reference, or it is not trained to its end.
    """
    arguments = trainer_arguments(experiment, data, train_dir)
    _require_fixed_reference(experiment, arguments)
    return measure(experiment, train_dir, measured_pairs(data, count), arguments, epsilons)


def measure(
    experiment: Experiment, train_dir: Path, pairs: Dataset, arguments: EpsilonDPOConfig, epsilons: Sequence[float]
) -> pd.DataFrame:
    """The bound of each pair at every whole checkpoint of a run and at its end, with a line of progress now and then.

    Args:
        experiment: the one trained in `train_dir`, after its SFT if it has one.
        pairs: rows of prepared data.
        arguments: the trainer's, from which length, batch, device and precision are taken.
        epsilons: increasing.

    Returns:
        One row per step and pair: step, pair_id, prompt (a digest, equal for pairs of one conversation), decision (at
        the smallest ε), bound (NaN where tied).
    """
    source, revision = start_of(experiment)
    reference = load_frozen(experiment, source, arguments.device, revision=revision)
    collate = DataCollatorForPreference(
        pad_token_id=0,  # padding is masked: any token will do
        max_length=arguments.max_length,
        truncation_mode=arguments.truncation_mode,
    )
    names = {value: name for name, value in DECISIONS.items()}
    texts = conversations_of_rendered(pairs["prompt"])
    prompts = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]
    tables = []
    policies = policies_of(train_dir)
    for number, (step, folder) in enumerate(policies.items(), start=1):
        progress = Progress(f"model {number}/{len(policies)} (step {step})", len(pairs))
        policy = _load_policy(experiment, folder, arguments.device)
        require_same_vocabulary(policy, reference)
        for start in range(0, len(pairs), arguments.per_device_eval_batch_size):
            rows = pairs.select(range(start, min(start + arguments.per_device_eval_batch_size, len(pairs)))).to_list()
            with precision_of(arguments):
                decisions = decisions_at(
                    policy, reference, collate(rows), epsilons, ARITHMETICS[arguments.criterion_dtype]
                )
            table = {"step": step, "pair_id": [row["pair_id"] for row in rows]}
            table |= {"prompt": prompts[start : start + len(rows)]}
            table |= {"decision": [names[value] for value in decisions[0]], "bound": upper_bounds(decisions, epsilons)}
            tables.append(pd.DataFrame(table))
            progress.tell(start + len(rows))
    return pd.concat(tables, ignore_index=True)


def policies_of(train_dir: Path) -> dict[int, Path]:
    """Optimiser step -> folder of the policy after it; at the last step the final model in place of its checkpoint."""
    model_dir = train_dir / MODEL_FOLDER
    if not model_dir.is_dir():
        raise ConfigError(f"{model_dir}: no trained policy. Let the training of this run come to its end first")
    return whole_checkpoints(train_dir) | {int(read_steps(train_dir)["step"].iloc[-1]): model_dir}


def _load_policy(experiment: Experiment, folder: Path, device: torch.device) -> PreTrainedModel:
    shards = folder / f"{FSDP_MODEL_NAME}_0"
    if not shards.is_dir():
        return load_frozen(experiment, str(folder), device)
    # FSDP2 wrote the weights in shards and nothing else; the model around them is the reference's.
    source, revision = start_of(experiment)
    policy = load_frozen(experiment, source, device, revision=revision)
    sharded.load({"model": policy.state_dict()}, checkpoint_id=shards, no_dist=True)
    return policy


class Progress:
    """A line at the end, and one every half a minute before."""

    def __init__(self, title: str, pairs: int):
        self.title, self.pairs = title, pairs
        self.started = self.last_line = time.monotonic()

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if done < self.pairs and now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        left = math.ceil((now - self.started) * (self.pairs - done) / done)
        print(f"{self.title}: {done}/{self.pairs} pairs · {left // 60}:{left % 60:02d} left", flush=True)


def _require_fixed_reference(experiment: Experiment, arguments: object) -> None:
    """Refuse runs whose checkpoints cannot be compared with the model that training started from."""
    if not isinstance(arguments, EpsilonDPOConfig):
        raise ConfigError(f"{experiment.name}: method {experiment.method} has no reference. Give a run of dpo, say")
    if arguments.sync_ref_model:
        raise ConfigError(f"{experiment.name}: the reference of {experiment.method} moves. Give a run of dpo, say")
    if experiment.model.lora is not None:
        raise ConfigError(f"{experiment.name}: model.lora keeps adapters as checkpoints. Give a run without it")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m epsdpo.paper.epsilon_bound`, which returns its exit code. 0: measured. 2: refused, with the reason."""
    parser = argparse.ArgumentParser(
        prog="python -m epsdpo.paper.epsilon_bound",
        description="Up to which ε the decisions of pairs hold, over training.",
    )
    parser.add_argument("--train-dir", metavar="DIR", required=True, help="training folder of a run, with checkpoints")
    parser.add_argument("--data", metavar="DIR", required=True, help="prepared data of the run")
    parser.add_argument("--sft-dir", metavar="DIR", default="", help="SFT folder of the run, if it has model.sft")
    parser.add_argument("--pairs", metavar="N", type=int, default=PAIRS, help=f"how many pairs (default: {PAIRS})")
    parser.add_argument("--output", metavar="DIR", help="default: epsilon_bound beside the training folder")
    options = parser.parse_args(arguments)
    train_dir = Path(options.train_dir)
    output = Path(options.output or train_dir.parent / "epsilon_bound")
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: at least one pair is needed")
    try:
        experiment = after_sft(experiment_of(train_dir), options.sft_dir)
        bounds = measure_run(experiment, train_dir, load_prepared(options.data), EPSILONS, options.pairs)
    except (ConfigError, DamagedRecord, DataError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    table = mean_bounds(bounds, EPSILONS, experiment.seed)
    figure = epsilon_bounds(table, f"{experiment.title}: up to which ε decisions hold")
    caption = (
        f"{experiment.title}: mean over held-out pairs of the largest ε up to which a pair keeps its decision, with "
        "95 % intervals, by decision and optimiser step. An ε below the curves changes few decisions. Hollow points "
        f"are lower limits: some of their pairs hold up to {EPSILONS[-1]:g}, the largest ε tried, and count with it."
    )
    plots.save(figure, output / "epsilon_bound.png", data=table, caption=caption)
    write_csv(bounds, output / "pairs.csv")
    print(_in_words(table))
    print(f"Figure and tables: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
