"""The claims file: what is claimed, by which numbers of which runs it is tested, and what counts as holding.

It is read and checked here, and a run folder gets a copy of it before its first run.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.sections.base import Section
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.experiment.values import number_advice, unusable
from epsdpo.files import read_text, written_whole
from epsdpo.methods.catalogue import SHARED_PASS
from epsdpo.paper.claims.names import MEASURES

CLAIMS_FILE = "claims.yaml"  # in a run folder: the copy that was made before the first run

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


class Claims(Section):
    """All claims of a file, and what they have in common."""

    worlds: Annotated[int, Field(ge=2)] = Field(description="How many worlds each recipe must have been run in.")
    level: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Coverage of the intervals over worlds.")
    figures: dict[str, dict[str, list[str]]] = Field(
        default_factory=dict, description="Figure -> group -> the recipes that it shows, in their order."
    )
    claims: Annotated[list[Claim], Field(min_length=1)] = Field(description="The claims, in the order of the page.")

    @model_validator(mode="after")
    def _names_differ(self) -> Claims:
        names = [claim.name for claim in self.claims]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"claims: {', '.join(twice)} is the name of several claims; give each its own")
        return self

    @property
    def recipes(self) -> list[str]:
        """Every recipe that a claim or a figure needs."""
        shown = (recipe for groups in self.figures.values() for recipes in groups.values() for recipe in recipes)
        return list(dict.fromkeys([*(recipe for claim in self.claims for recipe in claim.recipes), *shown]))

    def recipes_for(self, prefix: str) -> list[str]:
        """The recipes of the claims whose measure begins so, and of the figure that is called so."""
        tested = [recipe for claim in self.claims if claim.measure.startswith(prefix) for recipe in claim.recipes]
        shown = [recipe for recipes in self.figures.get(prefix, {}).values() for recipe in recipes]
        return list(dict.fromkeys([*tested, *shown]))

    def decisive(self) -> dict[str, Any]:
        """What the verdicts depend on: everything but wording and figures."""
        return {"worlds": self.worlds, "level": self.level, "claims": [claim.decisive() for claim in self.claims]}


def has_fixed_reference(experiment: Experiment) -> bool:
    """Whether the checkpoints of a run can be compared with the model that training started from."""
    moves = experiment.training_arguments().get("sync_ref_model", False)
    return experiment.method in SHARED_PASS and not moves and experiment.model.lora is None


def read_claims(path: str | Path) -> Claims:
    """Read and check a claims file.

    Raises:
        ConfigError: naming the file, each key and what is wrong with it.
    """
    try:
        values = yaml.safe_load(read_text(Path(path)))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such claims file") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if problems := [f"{path}: {'.'.join(map(str, key))} {problem}" for key, problem in unusable(values)]:
        raise ConfigError("\n".join(problems))
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
    for recipe in claims.recipes:
        count = len(worlds.get(recipe, ()))
        if count < claims.worlds:
            known = ", ".join(sorted(worlds)) or "none"
            problems.append(
                f"--claims: recipe {recipe!r} has {count} of {claims.worlds} worlds. A recipe is an experiment's name "
                f"without its -seedN, and data.world.seed is swept; recipes here are {known}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def fix_claims(claims: Claims, run_dir: Path) -> None:
    """Leave the claims in a run folder before its first run; later they can be reworded, but no longer changed.

    Raises:
        ConfigError: if the folder holds claims that are tested otherwise.
    """
    path = run_dir / CLAIMS_FILE
    fixed_at = datetime.now(UTC).isoformat(timespec="seconds")
    if path.exists():
        fixed_at, before = fixed_claims(run_dir)
        if before.decisive() != claims.decisive():
            tests = [claim.decisive() for claim in before.claims]
            changed = [claim.name for claim in claims.claims if claim.decisive() not in tests]
            raise ConfigError(
                f"{path}: claims were fixed at {fixed_at}, before the runs of this folder, and are now tested "
                f"otherwise ({', '.join(changed) or 'worlds, level or fewer claims'}). Restore them, or choose "
                "another folder with --output"
            )
    with written_whole(path) as partial:
        content = {"fixed_at": fixed_at, "claims": claims.model_dump()}
        partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def fixed_claims(run_dir: Path) -> tuple[str, Claims]:
    """When the claims of a run folder were fixed (UTC), and what they are.

    Raises:
        ConfigError: if the folder has none.
    """
    path = run_dir / CLAIMS_FILE
    if not path.exists():
        raise ConfigError(f"{path}: no such file. Give the folder of a batch that was run with --claims")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return content["fixed_at"], Claims.model_validate(content["claims"])
    except (IsADirectoryError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as the claims that were fixed before the runs ({' '.join(str(error).split())}). "
            "Restore it: what they were cannot be known otherwise"
        ) from error
