"""`Resumable`: a trainer that goes on where it stopped as if it had not, or says why it cannot.

It goes on from the newest checkpoint that is whole and has all rows of the record that belong to it, and a folder holds
one run only.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from epsdpo.methods.checkpoint_files import (
    FILES_LIST,
    NotWhole,
    numbered_checkpoints,
    pass_over,
    pass_over_unnumbered,
    read_list,
    read_state,
    remove,
    require_listed,
    require_loadable,
    require_parts,
    require_readable_files,
    seal,
)
from epsdpo.methods.record import RECORD_FILES, is_begun
from epsdpo.methods.record_writer import StepRecord

logger = logging.getLogger(__name__)

SUPERSEDED = "superseded"


class CannotContinue(ValueError):
    """A run that cannot begin, or go on, as it was asked to. The message says what is wrong, where, and the remedy."""


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None for the start.
        record_anew: whether the record begins after it, without the rows of the steps before.
    """

    checkpoint: Path | None = None
    record_anew: bool = False


class Resumable:
    """Mixin before a trainer of TRL, whose arguments are a `ResumingConfig`.

    A checkpoint ends with a list of its files and of what of the record belongs to it. `train()` continues only from
    one that is still what its list says:

    - with `resume_from_checkpoint=True` from the newest such; others are passed over by name, and where none is left
      the run begins from the start;
    - with a path from that one, or it is refused;
    - without either it begins from the start, in a folder without a run.

    Raises:
        CannotContinue: from `train()`, naming what is wrong, where, and the remedy.
    """

    title = "the run"  # in what is logged
    record: StepRecord
    _beginning = Beginning()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *positional: Any, **named: Any):
        self._beginning = self._agreed_beginning(resume_from_checkpoint)
        checkpoint = self._beginning.checkpoint
        if checkpoint is not None:
            self.load_beside_the_policy(checkpoint)
        return super().train(checkpoint and str(checkpoint), *positional, **named)

    def begin_record(self, state: TrainerState) -> None:
        """Bring the record to the step at which the run begins; to be called by one process, at that moment."""
        if self._beginning.record_anew:
            _move_aside([self.record.directory / name for name in RECORD_FILES], self.record.directory)
            self._beginning = Beginning(self._beginning.checkpoint)
        self.record.rewind(state.global_step)
        self.record.announce(state.max_steps, state.global_step)

    # ------------------------------------------------------------------------------------- for trainers with more state

    def may_be_anothers(self, state: dict[str, Any]) -> bool:
        """Whether to take a checkpoint without this trainer's own state, or without a list.

        Raises:
            NotWhole: if that state is missing and must not be.
        """
        return False

    def require_same_layout(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that this number or kind of processes cannot read, whatever is wrong with it besides."""

    def require_same_run(self, state: dict[str, Any]) -> None:
        """Refuse the state of a run with other settings (ValueError), or one that is not sound (NotWhole)."""

    def add_to_checkpoint(self, checkpoint: Path) -> None:
        """Write what the trainer keeps beside transformers' files, or put it into `self.state`; in every process."""

    def load_beside_the_policy(self, checkpoint: Path) -> None:
        """Read what `add_to_checkpoint` wrote; in every process."""

    # ------------------------------------------------------------------------------------------------- where it begins

    def _agreed_beginning(self, asked: str | Path | bool | None) -> Beginning:
        """The first process looks, so that files are read once and all processes do the same."""
        found: list[Beginning | ValueError | None] = [None]
        if self.is_world_process_zero():
            try:
                found = [self._find_beginning(asked)]
            except ValueError as refusal:
                found = [refusal]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def _find_beginning(self, asked: str | Path | bool | None) -> Beginning:
        output_dir = Path(self.args.output_dir)
        if not asked:
            self._require_no_run(output_dir)
            return Beginning()
        if asked is not True:
            return self._from_checkpoint(Path(asked), output_dir)
        beginning = self._from_newest(output_dir)
        if beginning.checkpoint is not None:
            logger.info("continuing %s from %s", self.title, beginning.checkpoint)
        elif _holds_run(output_dir):
            logger.warning("%s holds no checkpoint to go on from; %s begins from the start", output_dir, self.title)
        return beginning

    def _require_no_run(self, output_dir: Path) -> None:
        """Refuse a folder that holds a run, or with `start_over` move that run aside."""
        if not _holds_run(output_dir):
            return
        if not self.args.start_over:
            raise CannotContinue(
                f"{output_dir} holds a run, whose record and checkpoints would be mixed with this one's. Continue it, "
                "with resume_from_checkpoint=True, or train in another output_dir; start_over=True moves what is there "
                f"to {output_dir / SUPERSEDED} and begins from the start"
            )
        record = [output_dir / name for name in RECORD_FILES]
        _move_aside([*record, *numbered_checkpoints(output_dir).values()], output_dir)

    def _from_checkpoint(self, checkpoint: Path, output_dir: Path) -> Beginning:
        try:
            rows = self._examine(checkpoint)
        except (NotWhole, OSError) as error:
            raise CannotContinue(
                f"cannot continue from {checkpoint}: {error}. Give another checkpoint, or resume_from_checkpoint=True "
                "to go on from the newest whole one"
            ) from error
        if checkpoint.resolve().parent != output_dir.resolve():
            self._require_no_run(output_dir)
            logger.warning(
                "continuing %s from %s in another folder: its record begins after that step; the rows before it "
                "stay in %s",
                *(self.title, checkpoint, checkpoint.parent),
            )
            return Beginning(checkpoint, record_anew=True)
        if rows is None:  # a checkpoint of whatever trainer
            return Beginning(checkpoint, record_anew=not self.record.holds(read_state(checkpoint)["global_step"]))
        missing = self.record.missing(rows)
        if missing and not self.args.fresh_record:
            raise CannotContinue(self._lost_rows(output_dir, {checkpoint: missing}))
        return Beginning(checkpoint, record_anew=missing is not None)

    def _from_newest(self, output_dir: Path) -> Beginning:
        pass_over_unnumbered(output_dir)
        lost: dict[Path, str] = {}  # checkpoint -> what is not there of its rows
        for checkpoint in reversed(numbered_checkpoints(output_dir).values()):
            try:
                rows = self._examine(checkpoint)
            except (NotWhole, OSError) as error:
                pass_over(checkpoint, error)
                continue
            if rows is None:
                return Beginning(checkpoint, record_anew=not self.record.holds(read_state(checkpoint)["global_step"]))
            missing = self.record.missing(rows)
            if missing is None:
                return Beginning(checkpoint)
            lost[checkpoint] = missing
            pass_over(checkpoint, f"the rows of the record that belong to it are not there: {missing}")
        if not lost:
            return Beginning()
        if not self.args.fresh_record:
            raise CannotContinue(self._lost_rows(output_dir, lost))
        newest = next(iter(lost))
        logger.warning("the record of %s begins anew after %s, and is marked as incomplete", self.title, newest)
        return Beginning(newest, record_anew=True)

    def _examine(self, checkpoint: Path) -> dict[str, Any] | None:
        """The rows of the record that belong to a checkpoint; None if it is one that knows of none.

        Raises:
            NotWhole: if it cannot be used; the message says what is wrong with it.
            ValueError: if it is whole, but of another run or for other processes.
        """
        state = read_state(checkpoint)
        anothers = self.may_be_anothers(state)
        listed = read_list(checkpoint)
        if listed is not None:
            files = dict(listed["files"])
            if anothers:  # a state that is not this trainer's was not there when the list was made
                files.pop(TRAINER_STATE_NAME, None)
            require_listed(checkpoint, files)
        self.require_same_layout(checkpoint, state)
        if anothers:
            require_loadable(state)
            require_readable_files(checkpoint)
        elif listed is None:
            raise NotWhole(
                f"it holds no {FILES_LIST}: its writing was cut off, or an older version or another trainer wrote it"
            )
        require_parts(checkpoint)
        self.require_same_run(state)
        return None if anothers else listed["rows"]

    def _lost_rows(self, output_dir: Path, lost: dict[Path, str]) -> str:
        checkpoint = next(iter(lost))
        found = "; ".join(f"{folder.name}: {missing}" for folder, missing in lost.items())
        return (
            f"{output_dir}: the record has not the rows that belong to the checkpoints any more ({found}). Restore its "
            "files from a copy, or train in another folder. fresh_record=True (--set train.fresh_record=true) goes on "
            f"from {checkpoint.name} with a record that begins after it and is marked as incomplete"
        )

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove(checkpoint)
        self.accelerator.wait_for_everyone()
        self.add_to_checkpoint(checkpoint)
        with self._withheld("save_total_limit", None), self._withheld("push_to_hub", False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # until also the others' files are there
        if self.args.should_save:
            seal(checkpoint, self.record.rows() if self.is_world_process_zero() else None)
            self._delete_old_checkpoints(run_dir, checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    @contextmanager
    def _withheld(self, key: str, value: Any) -> Iterator[None]:
        """Keep transformers from what must wait for the list: deleting the checkpoint before, pushing the new one."""
        wanted = getattr(self.args, key)
        setattr(self.args, key, value)
        try:
            yield
        finally:
            setattr(self.args, key, wanted)

    def _delete_old_checkpoints(self, run_dir: Path, newest: Path) -> None:
        """Keep as many as `save_total_limit` says, the newest and the best among them."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        checkpoints = numbered_checkpoints(run_dir).items()
        others = {step: path for step, path in checkpoints if path.is_dir() and path.name not in kept}
        # Of later steps than this one are only what a resumed run has passed over.
        oldest_first = sorted(others, key=lambda step: (step < self.state.global_step, step))
        for step in oldest_first[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
            remove(others[step])


def _holds_run(output_dir: Path) -> bool:
    return is_begun(output_dir) or any(map(Path.is_dir, numbered_checkpoints(output_dir).values()))


def _move_aside(paths: list[Path], output_dir: Path) -> None:
    """Move what is there of `paths` into a folder of its own below `superseded/`, and say so."""
    there = [path for path in paths if path.exists()]
    if not there:
        return
    place = output_dir / SUPERSEDED / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}"
    place.mkdir(parents=True)
    for path in there:
        path.rename(place / path.name)
    logger.warning("%s moved to %s", ", ".join(path.name for path in there), place)
