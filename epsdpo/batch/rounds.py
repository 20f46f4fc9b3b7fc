"""Worlds added where claims are open: a batch run look after look, as its claims file plans.

After each look the page of claims says which of them are decided. Those need no more worlds, and a recipe that no open
claim needs gets none. What is wanted follows from the plan and from that page alone, so that a command given again
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from epsdpo.batch.runner import Outcome
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.worlds import by_recipe, in_world
from epsdpo.paper.claims.settings import Claims
from epsdpo.paper.claims.verdicts import CANNOT_BE_TOLD
from epsdpo.runs.layout import SUPERSEDED
from epsdpo.runs.manifest import read_manifest

CLAIMS, VERDICTS_TABLE = "claims", "verdicts.csv"  # in a run folder, as 06_claims writes it


def worlds_wanted(claims: Claims, verdicts: pd.DataFrame | None) -> dict[str, int]:
    """Recipe -> in how many worlds it is wanted by now: as many as the claim that stayed open longest.

    Args:
        verdicts: of `as_table`, as of the last look; None before the first.
    """
    looks = [look.worlds for look in claims.looks]
    wanted = dict.fromkeys(claims.tested, looks[0])
    if verdicts is None:
        return wanted
    stood = verdicts.set_index("name")
    for claim in claims.claims:
        if claim.name not in stood.index:
            continue
        verdict = stood.loc[claim.name]
        worlds = int(verdict["looked_at"])
        # Where a world has no effect, further worlds cannot give all of them one.
        if verdict["verdict"] == CANNOT_BE_TOLD and verdict["worlds"] >= worlds:
            worlds = next((after for after in looks if after > worlds), worlds)
        for recipe in claim.recipes:
            wanted[recipe] = max(wanted[recipe], worlds)
    return wanted


def wanted_experiments(claims: Claims, experiments: Iterable[Experiment], run_dir: Path) -> list[Experiment]:
    """The experiments that a run folder should hold by now, in the order of their recipes and worlds.

    Args:
        experiments: one or more of each recipe, in whatever worlds.

    Raises:
        ConfigError: if a recipe of the claims is missing.
    """
    recipes = by_recipe(experiments)
    if missing := [recipe for recipe in claims.tested if recipe not in recipes]:
        raise ConfigError(
            f"--claims: {', '.join(missing)}: no such recipe. A recipe is an experiment's name without its -seedN, and "
            f"data.world.seed is swept; recipes here are {', '.join(sorted(recipes)) or 'none'}"
        )
    wanted = worlds_wanted(claims, _last_verdicts(run_dir))
    return [
        in_world(experiment, claims.first_world + number)
        for recipe, experiment in recipes.items()
        for number in range(wanted.get(recipe, 0))
    ]


def _last_verdicts(run_dir: Path) -> pd.DataFrame | None:
    """The table of the last look whose page is finished; None where there is none, or none of several looks.

    The batch of the next look moves that page aside when it begins, so that one which was interrupted left it there.
    """
    pages = [run_dir / CLAIMS, *(run_dir / SUPERSEDED).glob(f"{CLAIMS}-*")]
    finished = [(manifest["finished"], page) for page in pages if (manifest := read_manifest(page)) is not None]
    for _, page in sorted(finished, reverse=True):
        if (page / VERDICTS_TABLE).exists():
            table = pd.read_csv(page / VERDICTS_TABLE)
            return table if {"name", "verdict", "worlds", "looked_at"} <= set(table) else None
    return None


def run_looks(
    claims: Claims,
    experiments: Iterable[Experiment],
    run_dir: Path,
    run: Callable[[list[Experiment]], Outcome],
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Run what is wanted until no look is left that would add to it; stop where something fails.

    Args:
        experiments: as for `wanted_experiments`.
        run: runs a batch of experiments in `run_dir`, up to its page of claims.
        tell: is given a line before each round.
    """
    experiments = list(experiments)
    wanted = wanted_experiments(claims, experiments, run_dir)
    while True:
        tell(f"{len(wanted)} experiments, in up to {claims.worlds} worlds, as far as claims are open")
        outcome = run(wanted)
        if outcome.failed or outcome.not_run:
            return outcome
        before, wanted = wanted, wanted_experiments(claims, experiments, run_dir)
        if {one.name for one in wanted} <= {one.name for one in before}:
            return outcome
