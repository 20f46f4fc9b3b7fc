"""Each evaluation says what its own data say, whatever was predicted, interrupted or evaluated before it."""

import pandas as pd
import pytest
from kit.official import OFFICIAL
from transformers import AutoModelForCausalLM, TrainerCallback

from epsdpo.methods.catalogue import config_class, trainer_class
from epsdpo.methods.record import read_steps

REFERENCE_FREE = {"simpo": {"loss_type": "simpo", "cpo_alpha": 0.0}, "orpo": {}}
WITH_REFERENCE = {"epsilon_dpo": {}, "beta_dpo": {}, "ipo": {"loss_type": ["ipo"]}, "kto": {}}


@pytest.fixture
def make(make_trainer, official_pairs):
    """A trainer of a method on the same pairs, of which the held-out ones do not fill the last batch."""

    def make(method, eval_pairs=None, **settings):
        policy, reference = (AutoModelForCausalLM.from_pretrained(OFFICIAL / name) for name in ("policy", "ref"))
        models = {"model": policy, "ref_model": reference}
        return make_trainer(
            official_pairs.select(range(12)),
            official_pairs.select(range(80, 90)) if eval_pairs is None else eval_pairs,
            trainer=trainer_class(method),
            config=config_class(method),
            models={"model": str(OFFICIAL / "policy")} if method in REFERENCE_FREE else models,
            per_device_eval_batch_size=4,
            prediction_loss_only=True,
            **(REFERENCE_FREE | WITH_REFERENCE)[method],
            **settings,
        )

    return make


def without_times(log):
    """What was logged, but for times and for what transformers and TRL count over a trainer's whole life."""
    others = ("_time", "_runtime", "_per_second", "num_tokens", "total_flos")
    return {key: value for key, value in log.items() if not key.endswith(others)}


def logged(trainer):
    return without_times(trainer.state.log_history[-1])


class Interrupt(TrainerCallback):
    """Ends the evaluation under way at its second batch, once."""

    def __init__(self):
        self.batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.batches == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [*WITH_REFERENCE, *REFERENCE_FREE])
def test_evaluation_is_the_same_after_others(make, method):
    """After a prediction, and after an evaluation or prediction that was interrupted."""
    trainer = make(method)
    returned = trainer.evaluate()
    expected = logged(trainer)
    predicted = trainer.predict(trainer.train_dataset).metrics
    assert predicted["test_loss"] != returned["eval_loss"] == expected["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == returned["eval_loss"]
    assert logged(trainer) == expected
    for interrupted in (trainer.evaluate, lambda: trainer.predict(trainer.train_dataset)):
        trainer.add_callback(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        trainer.evaluate()
        assert logged(trainer) == expected


@pytest.mark.parametrize("method", [*WITH_REFERENCE, *REFERENCE_FREE])
def test_what_was_predicted_or_interrupted_is_not_in_the_logs_of_training(make, method, tmp_path):
    """Nor are micro-batches of a training that was interrupted in the losses and metrics of the next."""

    class InterruptTraining(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    logs, steps = [], []
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    for name in ("disturbed", "plain"):
        folder = tmp_path / name
        trainer = make(method, output_dir=str(folder), gradient_accumulation_steps=2, **settings)
        if name == "disturbed":
            trainer.predict(trainer.train_dataset)
            trainer.add_callback(Interrupt())
            with pytest.raises(KeyboardInterrupt):
                trainer.evaluate()
            trainer.add_callback(InterruptTraining)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.remove_callback(InterruptTraining)
        trainer.train()
        logs.append([without_times(log) for log in trainer.state.log_history])
        steps.append(read_steps(folder).drop(columns="seconds"))
    assert logs[0] == logs[1]
    pd.testing.assert_frame_equal(*steps)


@pytest.mark.parametrize("method", ["epsilon_dpo", "kto"])
def test_named_sets_are_evaluated_apart(make, official_pairs, method):
    sets = {"one": official_pairs.select(range(80, 90)), "other": official_pairs.select(range(70, 77))}
    trainer = make(method, sets)
    trainer.evaluate()
    together = [without_times(log) for log in trainer.state.log_history]
    for log, (name, pairs) in zip(together, sets.items(), strict=True):
        alone = make(method, pairs)
        alone.evaluate()
        assert {key.replace(f"{name}_", ""): value for key, value in log.items()} == logged(alone)


def test_a_prediction_weighs_pairs_like_an_evaluation(make):
    """10 pairs in batches of 4: transformers would weigh the last two as four."""
    trainer = make("epsilon_dpo")
    evaluated = trainer.evaluate()["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == evaluated
