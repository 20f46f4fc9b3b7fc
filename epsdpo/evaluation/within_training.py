"""How win rate and divergences move within training (Figure 3): kept checkpoints, evaluated as the final model."""

import logging
from pathlib import Path

import pandas as pd

from epsdpo.evaluation.evaluate import evaluate
from epsdpo.experiment import Experiment
from epsdpo.runs.layout import SUMMARY
from epsdpo.train.checkpoints import ended_checkpoints, is_as_listed

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WITH_INTERVAL = ("win_rate", "length_controlled_win_rate", "forward_kl_per_response", "reverse_kl_per_response")
_MEASURES = (
    "n_failed",
    *(f"{measure}{end}" for measure in _WITH_INTERVAL for end in ("", "_low", "_high")),
    "policy_avg_length",
    "policy_tokens",
)


def checkpoints_to_measure(experiment: Experiment, train_dir: Path) -> dict[int, Path]:
    """Optimiser step -> folder of each whole checkpoint of `train_dir`; empty unless `evaluate.checkpoints` is true.

    Raises:
        ValueError: if checkpoints are asked for and there is none, or one holds no whole weights.
    """
    if experiment.evaluate is None or not experiment.evaluate.checkpoints:
        return {}
    ended = ended_checkpoints(train_dir)
    for folder in ended.values():
        if not any((folder / name).exists() for name in _WEIGHTS):
            raise ValueError(
                f"{folder} holds shards of a distributed run, no {' or '.join(_WEIGHTS)}. Train with "
                "fsdp_state_dict_type: FULL_STATE_DICT under FSDP2, or zero3_save_16bit_model: true under ZeRO-3, in "
                "the file for `accelerate launch`, or set evaluate.checkpoints: false"
            )
    checkpoints = {step: folder for step, folder in ended.items() if is_as_listed(folder)}
    if not checkpoints:
        raise ValueError(
            f"evaluate.checkpoints is true, but {train_dir} holds no whole checkpoint. Train with "
            "save_strategy: steps, save_steps and save_total_limit: null, or set evaluate.checkpoints: false"
        )
    return checkpoints


def measure_checkpoints(
    experiment: Experiment, data_dir: Path, checkpoints: dict[int, Path], output_dir: Path, answers_dir: Path
) -> pd.DataFrame:
    """Evaluate each checkpoint against the model that training started from, on the same prompts and random numbers.

    Each leaves what `evaluate` leaves in `output_dir/checkpoint-<step>`. The reference's responses and all that was
    judged before are taken from `answers_dir`, and so are the last checkpoint's if it has the trained model's weights.

    Args:
        checkpoints: of `checkpoints_to_measure`.

    Returns:
        One row per checkpoint: step; with a judge n_failed and, in percent and with `_low` and `_high`, win_rate and
        length_controlled_win_rate; likewise in nats forward_kl_per_response and reverse_kl_per_response; then the
        mean length of its responses, policy_avg_length (characters) and policy_tokens. No row without checkpoints.
    """
    # Those of an earlier call would pass for results of this one.
    for summary in Path(output_dir).glob(f"checkpoint-*/{SUMMARY}"):
        summary.unlink()
    # What a judge thinks of published outputs is the same at every step.
    section = experiment.evaluate.model_copy(update={"calibrate_with": None})
    experiment = experiment.model_copy(update={"evaluate": section})
    rows = []
    for step, folder in checkpoints.items():
        logger.info("evaluating the checkpoint after step %d", step)
        place = Path(output_dir) / f"checkpoint-{step}"
        summary = evaluate(experiment, data_dir, folder.parent, place, answers_dir, policy=folder.name).summary
        rows.append({"step": step, **{key: summary[key] for key in _MEASURES if key in summary}})
    return pd.DataFrame(rows)
