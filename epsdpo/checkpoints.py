"""What every training leaves behind: checkpoints that it can go on from, and a model folder that is whole or not there.

SFT and preference training share it. What is trained is left to `epsdpo.sft` and `epsdpo.train`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from epsdpo.experiment import Experiment

ADAPTER_FOLDER = "adapter"

logger = logging.getLogger(__name__)


def process_state(experiment: Experiment) -> PartialState:
    """The processes that train together, on the devices that the trainer will use."""
    return PartialState(cpu=experiment.train.get("use_cpu", False))


def whole_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Optimiser step -> checkpoint, in order, of those written to their end; one cut off by a kill is passed over."""
    checkpoints = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"):
        try:
            # transformers writes this file last.
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s is not whole (training was killed while writing it); passing it over", folder)
            continue
        checkpoints[state["global_step"]] = folder
    return dict(sorted(checkpoints.items()))


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest of `whole_checkpoints`, or None."""
    return next(reversed(whole_checkpoints(output_dir).values()), None)


def keep_model(trainer: Trainer, model_dir: Path, merge: Callable[[Path, Path], None] | None = None) -> None:
    """Save the trained model and tokenizer; under another name first, so that `model_dir` is whole once it exists.

    Args:
        merge: where an adapter was trained, writes the whole model that it makes: from the adapter's folder, which is
            kept beside the model's, into another.
    """
    unfinished = model_dir.with_name(f"{model_dir.name}.partial")
    adapter_dir = model_dir.with_name(ADAPTER_FOLDER)
    trainer.save_model(str(unfinished if merge is None else adapter_dir))
    if trainer.is_world_process_zero():
        if merge is not None:
            merge(adapter_dir, unfinished)
        unfinished.rename(model_dir)
    trainer.accelerator.wait_for_everyone()
