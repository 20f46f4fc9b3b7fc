"""A training in one process that is told to end saves a checkpoint at the next optimiser step."""

from transformers import Trainer, TrainerCallback

from epsdpo.runs.preempted import Preempted, told_to_end


class _SavesAndStops(TrainerCallback):
    def __init__(self):
        self.told = False

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.told

    def on_save(self, args, state, control, **kwargs):
        # Not before the checkpoint is written, which keeps what `control` says.
        control.should_training_stop = control.should_training_stop or self.told


def train_until_told(trainer: Trainer) -> None:
    """Train, going on from the newest checkpoint, to the end or until this process is told to end.

    Several processes would have to agree on the step; they end at once, and go on from their last checkpoint.

    Raises:
        Preempted: if it was told, and the checkpoint is written.
    """
    stops = _SavesAndStops()
    if trainer.accelerator.num_processes == 1:
        trainer.add_callback(stops)
        with told_to_end(lambda: setattr(stops, "told", True)):
            trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train(resume_from_checkpoint=True)
    state = trainer.state
    if stops.told and state.global_step < state.max_steps:
        raise Preempted(
            f"told to end, and saved a checkpoint at step {state.global_step} of {state.max_steps}; the same command "
            "goes on from it"
        )
