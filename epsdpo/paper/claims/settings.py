"""The claims file: what is claimed, by which numbers of which runs it is tested, and what counts as holding.

It may plan several looks, each after more worlds. It is read and checked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.load import read_extended
from epsdpo.experiment.sections.base import Section
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.experiment.values import number_advice
from epsdpo.methods.catalogue import SHARED_PASS
from epsdpo.paper.claims.names import MEASURES

# Places of claims that are not the paper's, and are counted apart from those that are.
THIS_KIT, NOT_IN_THE_PAPER = "this kit", "not in the paper"


class Claim(Section):
    """One claim and its test: the effect is a measure of some recipes, less that of others, in each world.

    It holds if the interval of the effect over worlds lies in the claimed range, does not hold if it lies outside, and
    cannot be told otherwise.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="How tables and figures call it.")
    place: str = Field(description=f"Where the paper says it; or {THIS_KIT!r} or {NOT_IN_THE_PAPER!r}.")
    says: str = Field(description="What is claimed, in our words.")
    measure: Literal[tuple(MEASURES)] = Field(description="The number of each run.")
    of: Annotated[list[str], Field(min_length=1)] = Field(description="Recipes whose measure is taken.")
    minus: list[str] = Field(default_factory=list, description="Recipes whose measure is taken off.")
    combine: Literal["mean", "sum", "range", "frontier"] = Field(
        "mean",
        description="How several recipes become one number: their mean; their sum; the largest less the smallest; or "
        "the height of the frontier that they span over forward KL, `of` above `minus`.",
    )
    above: float | None = Field(None, description="Lower end of the claimed range, in the measure's unit.")
    below: float | None = Field(None, description="Upper end of the claimed range.")

    @model_validator(mode="after")
    def _is_a_test(self) -> Claim:
        if self.above is None and self.below is None:
            raise ValueError("above and below are missing: state the range that is claimed, by one or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"above is {self.above:g} and below {self.below:g}: no effect can lie in that range")
        if self.combine == "frontier" and (self.measure != "win_rate" or not self.minus):
            raise ValueError("combine is 'frontier', which compares win_rate of two sets: use it with `minus`")
        if self.measure == "step_cost" and not len(self.of) == len(self.minus) == 1:
            raise ValueError("measure is step_cost, which compares two contenders: name one in `of`, one in `minus`")
        return self

    @property
    def recipes(self) -> list[str]:
        """The recipes whose runs are needed; none where the benchmark of a step is asked, which has contenders."""
        return [] if self.measure == "step_cost" else [*self.of, *self.minus]

    @property
    def is_difference(self) -> bool:
        """Whether the effect is something less something else."""
        return bool(self.minus) or self.combine == "range" or self.measure.startswith("bound_rise")

    def decisive(self) -> dict[str, Any]:
        """The test, without its wording."""
        return self.model_dump(exclude={"place", "says"})


class Look(Section):
    """One look at the claims that are still open, and the share of all error that it may spend."""

    worlds: Annotated[int, Field(ge=2)] = Field(description="How many worlds have been run by then.")
    error: Annotated[float, Field(gt=0, lt=1)] = Field(description="1 less the coverage of its intervals.")


class Claims(Section):
    """All claims of a file, and what they have in common."""

    worlds: Annotated[int, Field(ge=2)] = Field(description="How many worlds a recipe is run in, or at most.")
    level: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95, description="Coverage of the intervals over worlds; of several looks, of all of a claim's together."
    )
    first_world: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Seed of the first world of `looks`; the others follow on it."
    )
    looks: list[Look] = Field(
        default_factory=list,
        description="When the claims that are open are looked at. Recipes that none of them needs get no more worlds.",
    )
    margins: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Claim -> the largest effect, either way and in its unit, that makes no practical difference.",
    )
    printed: dict[str, float] = Field(
        default_factory=dict, description="Claim -> the paper's own effect, in the unit of its measure."
    )
    figures: dict[str, dict[str, list[str]]] = Field(
        default_factory=dict, description="Figure -> group -> the recipes that it shows, in their order."
    )
    claims: Annotated[list[Claim], Field(min_length=1)] = Field(description="The claims, in the order of the page.")

    @model_validator(mode="after")
    def _names_differ(self) -> Claims:
        names = [claim.name for claim in self.claims]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"claims: {', '.join(twice)} is the name of several claims; give each its own")
        for key, named in (("margins", self.margins), ("printed", self.printed)):
            if unknown := sorted(named.keys() - set(names)):
                raise ValueError(f"{key}: {', '.join(unknown)} is no claim of this file; name one that is")
        return self

    @model_validator(mode="after")
    def _keeps_its_level(self) -> Claims:
        if bool(self.looks) != (self.first_world is not None):
            raise ValueError("looks and first_world go together: state both, or neither")
        if self.looks:
            worlds = [look.worlds for look in self.looks]
            if worlds != sorted(set(worlds)) or worlds[-1] != self.worlds:
                raise ValueError(
                    f"looks are after {worlds} worlds; let them grow, and the last be after all, which `worlds` says "
                    f"are {self.worlds}"
                )
            spent = sum(look.error for look in self.looks)
            if abs(spent - (1.0 - self.level)) > 1e-9:
                raise ValueError(
                    f"looks: their errors sum to {spent:g}, but level is {self.level:g}: the sum must be "
                    f"{1.0 - self.level:g}, for all looks together to keep the level"
                )
        return self

    def looks_at(self, claim: Claim) -> list[Look]:
        """The looks at a claim; one at the whole level where none are planned, or worlds do not matter to it."""
        if self.looks and claim.measure != "step_cost":
            return self.looks
        return [Look(worlds=self.looks[0].worlds if self.looks else self.worlds, error=1.0 - self.level)]

    def worlds_of(self, look: Look) -> range | None:
        """The worlds that a look sees; None for all that there are, where no looks are planned."""
        return None if self.first_world is None else range(self.first_world, self.first_world + look.worlds)

    @property
    def tested(self) -> list[str]:
        """Every recipe that a claim needs."""
        return list(dict.fromkeys(recipe for claim in self.claims for recipe in claim.recipes))

    @property
    def recipes(self) -> list[str]:
        """Every recipe that a claim or a figure needs."""
        shown = (recipe for groups in self.figures.values() for recipes in groups.values() for recipe in recipes)
        return list(dict.fromkeys([*self.tested, *shown]))

    def recipes_for(self, prefix: str) -> list[str]:
        """The recipes of the claims whose measure begins so, and of the figure that is called so."""
        tested = [recipe for claim in self.claims if claim.measure.startswith(prefix) for recipe in claim.recipes]
        shown = [recipe for recipes in self.figures.get(prefix, {}).values() for recipe in recipes]
        return list(dict.fromkeys([*tested, *shown]))

    def decisive(self) -> dict[str, Any]:
        """What the verdicts depend on: everything but wording, figures and what the paper printed."""
        common = self.model_dump(include={"worlds", "level", "first_world", "looks", "margins"})
        return {**common, "claims": [claim.decisive() for claim in self.claims]}


def has_fixed_reference(experiment: Experiment) -> bool:
    """Whether the checkpoints of a run can be compared with the model that training started from."""
    moves = experiment.training_arguments().get("sync_ref_model", False)
    return experiment.method in SHARED_PASS and not moves and experiment.model.lora is None


def read_claims(path: str | Path) -> Claims:
    """Read and check a claims file, on top of those that it `extends`.

    Raises:
        ConfigError: naming the file, each key and what is wrong with it.
    """
    values = read_extended(path)
    try:
        return Claims.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            advice = number_advice(problem["input"]) if "_type" in problem["type"] else ""
            problems.append(f"{path}: {place}: {problem['msg']} (is {problem['input']!r:.80}) {advice}".rstrip())
        raise ConfigError("\n".join(problems)) from None


def check_runs(claims: Claims, experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that do not have all recipes of the claims, each in as many worlds as are asked for.

    Raises:
        ConfigError: listing every recipe that is missing or has too few worlds, or is asked for its bound of ε and has
            no fixed reference that its checkpoints can be compared with.
    """
    worlds: dict[str, set[int]] = {}
    problems = []
    for experiment in experiments:
        recipe, world = recipe_and_world(experiment.name)
        if world is not None:
            worlds.setdefault(recipe, set()).add(world)
        if recipe in claims.recipes_for("bound") and not has_fixed_reference(experiment):
            problems.append(
                f"--claims: {experiment.name} is asked for its bound of ε, for which its checkpoints need a reference "
                f"that stays; with method {experiment.method}{' and LoRA' if experiment.model.lora else ''} they have "
                "none. Name another recipe"
            )
    # Several looks are for the verdicts; figures show of them what there is.
    needed = claims.looks[0].worlds if claims.looks else claims.worlds
    for recipe in claims.tested if claims.looks else claims.recipes:
        count = len(worlds.get(recipe, ()))
        if count < needed:
            known = ", ".join(sorted(worlds)) or "none"
            problems.append(
                f"--claims: recipe {recipe!r} has {count} of {needed} worlds. A recipe is an experiment's name "
                f"without its -seedN, and data.world.seed is swept; recipes here are {known}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
