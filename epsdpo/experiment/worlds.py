"""The same experiments in other worlds than those that their config sweeps."""

from collections.abc import Iterable

from epsdpo.experiment.schema import Experiment
from epsdpo.experiment.sweep import point_names, point_title, recipe_and_world

_SEED = "data.world.seed"


def by_recipe(experiments: Iterable[Experiment]) -> dict[str, Experiment]:
    """One experiment of each recipe that is swept over worlds; the first that is met."""
    found: dict[str, Experiment] = {}
    for experiment in experiments:
        recipe, world = recipe_and_world(experiment.name)
        if world is not None:
            found.setdefault(recipe, experiment)
    return found


def in_world(experiment: Experiment, world: int) -> Experiment:
    """The experiment, one of a sweep over worlds, as the sweep would state it for this world."""
    recipe, before = recipe_and_world(experiment.name)
    (suffix,) = point_names([{_SEED: world}], experiment.name)
    title = experiment.title.removesuffix(point_title({_SEED: before})) + point_title({_SEED: world})
    data = experiment.data.model_copy(update={"world": experiment.data.world.model_copy(update={"seed": world})})
    return experiment.model_copy(update={"name": recipe + suffix, "title": title, "data": data})
