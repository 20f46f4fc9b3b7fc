"""Which runs of a batch share a recipe: all that decides the outcome but seeds and the precision of the criterion."""

import json
from collections import Counter
from collections.abc import Sequence

from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.schema import ABOUT_EARLIER_PARTS
from epsdpo.report.collect import Run

METHODS = ("dpo", "epsilon_dpo")

# Keys of `train` that say when a run is looked at or kept, and change nothing in it.
_ONLY_LOOKING = (
    *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_strategy", "eval_steps"),
    *ABOUT_EARLIER_PARTS,
)


def typical_runs(runs: Sequence[Run]) -> list[Run]:
    """For each of DPO and ε-DPO the runs of one recipe, one per world: the recipe most like the others of the batch.

    A recipe is what remains of an experiment without names, seeds and the criterion's precision, which the measurement
    sets itself. It is the more typical, the more runs of the batch share each of its training settings.

    Raises:
        ConfigError: if there is none.
    """
    common = Counter(item for run in runs for item in _training_settings(run.experiment))
    found = []
    for method in METHODS:
        recipes: dict[str, list[Run]] = {}
        for run in runs:
            if run.experiment.method == method and run.experiment.model.lora is None:
                recipes.setdefault(recipe_of(run.experiment), []).append(run)
        if recipes:
            best = max(
                recipes.values(), key=lambda alike: sum(common[i] for i in _training_settings(alike[0].experiment))
            )
            found += {world_seed(run.experiment): run for run in reversed(best)}.values()
    if not found:
        raise ConfigError(
            "no finished run of DPO or ε-DPO without model.lora: there is no policy to measure. Give the folder of a "
            "batch that has one, such as runs/paper-mini"
        )
    return found


def recipe_of(experiment: Experiment) -> str:
    """What decides a run's outcome but for seeds and the criterion's precision; not how often it is looked at."""
    values = experiment.model_dump(exclude={"name": True, "title": True, "seed": True, "trajectory": True})
    for key in ("criterion_dtype", *_ONLY_LOOKING):
        values["train"].pop(key, None)
    values["train"] |= {key: value for key, value in experiment.criterion().items() if key == "epsilon"}
    values["data"]["world"].pop("seed")
    (values["evaluate"] or {}).pop("checkpoints", None)
    return json.dumps(values, sort_keys=True, default=str)


def world_seed(experiment: Experiment) -> int | None:
    """The seed of the world that an experiment is run in; None off the world."""
    return experiment.data.world.seed if experiment.data.speaks_world else None


def _training_settings(experiment: Experiment) -> list[tuple[str, str]]:
    left_out = ("criterion_dtype", *_ONLY_LOOKING)
    settings = [(key, str(value)) for key, value in experiment.train.items() if key not in left_out]
    return [*settings, ("label_temperature", str(experiment.data.world.label_temperature))]
