"""What every training leaves behind: checkpoints to look at, and a model folder that is whole or not there.

SFT and preference training share it.
"""

from collections.abc import Callable
from pathlib import Path

from transformers import Trainer

from epsdpo.files import flush_to_disk, flush_tree, partial_of
from epsdpo.methods.checkpoint_files import (
    NotWhole,
    numbered_checkpoints,
    pass_over,
    pass_over_unnumbered,
    read_list,
    read_state,
    require_listed,
)

ADAPTER_FOLDER = "adapter"


def whole_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Optimiser step -> checkpoint, in order, of those written to their end and still so; others are passed over.

    Each file is read once for its SHA-256, about a second per GB. A checkpoint of an earlier version, which has no list
    of its files, counts as whole if transformers came to its end with it.
    """
    return {step: folder for step, folder in ended_checkpoints(output_dir).items() if is_as_listed(folder)}


def ended_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """As `whole_checkpoints`, but without a look at the content of the files."""
    pass_over_unnumbered(output_dir)
    checkpoints = {}
    for step, folder in numbered_checkpoints(output_dir).items():
        try:
            read_state(folder)
        except (NotWhole, OSError) as error:
            pass_over(folder, error)
            continue
        checkpoints[step] = folder
    return checkpoints


def is_as_listed(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint are what its list says, if it has one; if not, it is said to be passed over."""
    try:
        content = read_list(checkpoint)
        if content is not None:
            require_listed(checkpoint, content["files"])
    except (NotWhole, OSError) as error:
        pass_over(checkpoint, error)
        return False
    return True


def keep_model(trainer: Trainer, model_dir: Path, merge: Callable[[Path, Path], None] | None = None) -> None:
    """Save the trained model and tokenizer; under another name first, so that `model_dir` is whole once it exists.

    It says that training is over, so that the record beside it, too, is on the disk before.

    Args:
        merge: where an adapter was trained, writes the whole model that it makes: from the adapter's folder, which is
            kept beside the model's, into another.
    """
    unfinished = partial_of(model_dir)
    adapter_dir = model_dir.with_name(ADAPTER_FOLDER)
    trainer.save_model(str(unfinished if merge is None else adapter_dir))
    if trainer.is_world_process_zero():
        if merge is not None:
            merge(adapter_dir, unfinished)
        flush_tree(model_dir.parent)
        unfinished.rename(model_dir)
        flush_to_disk(model_dir.parent)
    trainer.accelerator.wait_for_everyone()
