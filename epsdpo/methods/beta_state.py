"""What a checkpoint says of β, and when it belongs to another run.

It is an entry of `trainer_state.json`: β, what makes the next one, and the settings that a run must not change.
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerState

from epsdpo.methods.checkpoint_files import NotWhole

_KEY = "EpsilonDPO"


def put_entry(state: TrainerState, entry: dict[str, Any]) -> None:
    """Make `entry` part of the checkpoints that are written from `state` on."""
    state.stateful_callbacks[_KEY] = {"args": {}, "attributes": entry}


def get_entry(callbacks: Any) -> dict[str, Any] | None:
    """What `put_entry` put into the checkpoint whose state has these `stateful_callbacks`, or None."""
    saved = callbacks.get(_KEY) if isinstance(callbacks, dict) else None
    entry = saved.get("attributes") if isinstance(saved, dict) else None
    return entry if isinstance(entry, dict) else None


def require_same_layout(checkpoint: Path, entry: dict[str, Any] | None, sharding: str) -> None:
    """Refuse a checkpoint in shards that are not this run's, before its loading fails in the depths of torch.

    Raises:
        ValueError: naming both ways of sharding and the remedy.
    """
    written = entry and entry.get("sharding")
    if written not in (None, sharding):
        raise ValueError(
            f"{checkpoint} was written by a run with {written}, and cannot be read with {sharding}. Continue with "
            f"the first, by the file and --num_processes given to `accelerate launch`, or delete {checkpoint}"
        )


def require_beta(step: int, entry: dict[str, Any] | None, beta: float, fresh_beta: bool) -> None:
    """Refuse a checkpoint at optimiser step `step` that holds no β, unless `fresh_beta` permits to start it over.

    Args:
        beta: with which it would start over.

    Raises:
        NotWhole: naming the remedies.
    """
    if entry is None and not fresh_beta:
        raise NotWhole(
            f"the checkpoint at step {step} holds no β, so it was not written by EpsilonDPOTrainer and the run "
            f"cannot continue where it stopped. Start a new run in another output_dir, or set fresh_beta=True "
            f"to continue its weights with β={beta}"
        )


# Settings that came later, as the runs had them whose checkpoints do not tell.
_UNSAID = {"round_rotary_frequencies": False}


def require_same_run(step: int, entry: dict[str, Any], first: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse what the checkpoint at optimiser step `step` says of β if no run, or another one, can have written it.

    Args:
        first: what the entry said before the first step; β itself and all that makes the next one.
        settings: what a run must not change.

    Raises:
        NotWhole: if something is missing, or β is no positive number.
        ValueError: if it belongs to a run with other settings.
    """
    saved = _UNSAID | entry["settings"] if isinstance(entry.get("settings"), dict) else {}
    lacks = [*(first.keys() - entry.keys()), *(f"settings.{key}" for key in settings.keys() - saved.keys())]
    if lacks:
        raise NotWhole(f"what the checkpoint at step {step} says of β lacks {', '.join(sorted(lacks))}")
    for name in first:
        if not _is_like(first[name], entry[name]) or (name == "beta" and not entry[name] > 0):
            raise NotWhole(f"the checkpoint at step {step} says {name}={entry[name]!r}, which no training comes to")
    changed = {key: value for key, value in saved.items() if value != settings.get(key)}
    if changed:
        changes = ", ".join(f"{key}: {old} → {settings.get(key)}" for key, old in changed.items())
        raise ValueError(
            f"the checkpoint at step {step} belongs to a run with other settings ({changes}). "
            "Restore them to resume it, or start a new run in another output_dir"
        )


def _is_like(first: Any, saved: Any) -> bool:
    """Whether a value read back has the form of what it was at first: a finite number, or a mapping of such."""
    if isinstance(first, dict):
        alike = isinstance(saved, dict) and first.keys() == saved.keys()
        return alike and all(_is_like(first[key], saved[key]) for key in first)
    return type(saved) in (int, float) and math.isfinite(saved)
