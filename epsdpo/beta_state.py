"""What a checkpoint says of β, and when it belongs to another run.

It knows the entry that the trainer keeps in `trainer_state.json`, which transformers writes last: β is there exactly
when the checkpoint is whole. What the trainer does with it is the trainer's business.
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

logger = logging.getLogger(__name__)

_KEY = "EpsilonDPO"


def put_entry(state: TrainerState, entry: dict[str, Any]) -> None:
    """Make `entry` part of the checkpoints that are written from `state` on."""
    state.stateful_callbacks[_KEY] = {"args": {}, "attributes": entry}


def get_entry(state: TrainerState) -> dict[str, Any] | None:
    """What `put_entry` put into the checkpoint that `state` was read from, or None."""
    saved = (state.stateful_callbacks or {}).get(_KEY)
    return saved and saved["attributes"]


def require_readable(checkpoint: Path, sharding: str) -> None:
    """Refuse a checkpoint in shards that are not this run's, before its loading fails in the depths of torch.

    Raises:
        ValueError: naming both ways of sharding and the remedy.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks", {}).get(_KEY)
    written = saved and saved["attributes"].get("sharding")
    if written not in (None, sharding):
        raise ValueError(
            f"{checkpoint} was written by a run with {written}, and cannot be read with {sharding}. Continue with "
            f"the first, by the file and --num_processes given to `accelerate launch`, or delete {checkpoint}"
        )


def require_same_run(
    step: int, entry: dict[str, Any] | None, settings: dict[str, Any], fresh_beta: bool
) -> dict[str, Any] | None:
    """The entry of a checkpoint at optimiser step `step`, if the run may go on from it; None: with a fresh β.

    Raises:
        ValueError: if it holds no β and `fresh_beta` does not permit that, or belongs to a run with other settings.
    """
    if entry is None:
        if not fresh_beta:
            raise ValueError(
                f"the checkpoint at step {step} holds no β, so it was not written by EpsilonDPOTrainer and the run "
                f"cannot continue where it stopped. Start without resume_from_checkpoint, or set fresh_beta=True "
                f"to continue its weights with β={settings['beta']}"
            )
        logger.warning("resuming at step %d with a fresh β of %g, as fresh_beta=True asks for", step, settings["beta"])
        return None
    changed = {key: value for key, value in entry["settings"].items() if value != settings.get(key)}
    if changed:
        changes = ", ".join(f"{key}: {old} → {settings.get(key)}" for key, old in changed.items())
        raise ValueError(
            f"the checkpoint at step {step} belongs to a run with other settings ({changes}). "
            "Restore them to resume it, or start a new run in another output_dir"
        )
    return entry
