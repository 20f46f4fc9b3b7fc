"""`epsdpo verify`: a run, or all of a batch, against the published ones, in one of three verdicts."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from epsdpo.experiment import ConfigError
from epsdpo.experiment.values import value_text
from epsdpo.runs.layout import VERDICTS, experiment_of, experiments_in
from epsdpo.runs.manifest import read_manifest
from epsdpo.trajectory.same_run.bands import bands_for
from epsdpo.trajectory.same_run.causes import cause_of
from epsdpo.trajectory.same_run.departures import Departure, evaluation_departure, first_departure
from epsdpo.trajectory.same_run.gold_files import Gold, add_to_gold, folders_of, gold_of
from epsdpo.trajectory.same_run.quantities import RunNumbers, numbers_of, training_in

SAME_BITS = "same bits"
WITHIN = "the published run within prediction intervals"
ANOTHER = "another run"
_ABOUT_NAMES = ("name", "title", "trajectory")


@dataclass(frozen=True)
class Verdict:
    """Of one experiment.

    Attributes:
        experiment: its name.
        says: `SAME_BITS`, `WITHIN` or `ANOTHER`.
        why: in words.
        departure: of another run, where it is one; `cause` is what that points to.
        settings: of another run, which keys of its config differ, in words.
    """

    experiment: str
    says: str
    why: str
    departure: Departure | None = None
    cause: str = ""
    settings: tuple[str, ...] = ()


def verify_run(run: RunNumbers, gold: Gold) -> Verdict:
    """Whether a run is one of the published ones, as far as its numbers say."""
    evaluations = [(repeat.summary, repeat.answers) for repeat in gold.repeats if repeat.summary]
    all_of_it = f"all {len(run.steps)} steps{' and its evaluation' if run.summary and evaluations else ''}"
    evaluated_so = not (run.summary and evaluations) or (run.summary, run.answers) in evaluations
    if evaluated_so and any(_same_bits(run, repeat) for repeat in gold.repeats):
        return Verdict(run.experiment, SAME_BITS, all_of_it)
    bands = bands_for(run, gold)
    departure = first_departure(run, bands) or evaluation_departure(run, bands, gold)
    if departure is None:
        on = "the same data" if bands.same_data else "data of their own"
        why = f"{all_of_it}, of {len(bands.peers)} repeats on {on}"
        return Verdict(run.experiment, WITHIN, why)
    cause, reason = cause_of(run, bands, departure)
    place = "evaluation" if departure.step is None else f"step {departure.step}"
    why = f"{place}, {departure.words}. Points to {cause}: {reason}"
    return Verdict(run.experiment, ANOTHER, why, departure, cause, _other_settings(run, bands.peers[0]))


def verdicts_of(run_dir: Path, gold: Path | None = None) -> list[Verdict]:
    """Of each experiment in a folder whose training has ended and that has a published one; none where none has."""
    found = []
    for folder in _trained_below(run_dir):
        run, published = _with_gold(folder, gold)
        if published is not None:
            found.append(verify_run(run, published))
    return found


def verify_folder(run_dir: Path, gold: Path | None = None) -> int:
    """Print a verdict for each experiment of a folder, and last the one of all; 1 if any is another run, else 0.

    Raises:
        ConfigError: if nothing has ended there, or nothing is published of it.
    """
    verdicts = verdicts_of(run_dir, gold)
    if not verdicts:
        where = gold or "configs/*/gold"
        raise ConfigError(
            f"{run_dir}: of no finished experiment there is a published run in {where}. Name it: --against"
        )
    for verdict in verdicts:
        print(f"{verdict.experiment}: {verdict.says}: {verdict.why}")
        if verdict.settings:
            print(f"    settings that differ: {'; '.join(verdict.settings)}")
    last = joint(verdicts)
    print(last.says if len(verdicts) > 1 and last.says != ANOTHER else f"{last.says}: {last.experiment}, {last.why}")
    return int(last.says == ANOTHER)


def joint(verdicts: list[Verdict]) -> Verdict:
    """Of several the one that says least good."""
    return max(verdicts, key=lambda verdict: (SAME_BITS, WITHIN, ANOTHER).index(verdict.says))


def keep_verdicts(verdicts: list[Verdict], folder: Path) -> None:
    """Write them into the folder of a report, for the index of its batch; nothing where there are none."""
    if verdicts:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({verdict.experiment: verdict.says for verdict in verdicts}, indent=1)
        (folder / VERDICTS).write_text(text + "\n", encoding="utf-8")


def published_range(train_dir: Path, quantity: str) -> pd.DataFrame | None:
    """From the least to the largest value of the published repeats at each step: step, low, high; None without any."""
    _, gold = _with_gold(train_dir, None)
    if gold is None:
        return None
    values = pd.concat([repeat.steps[quantity] for repeat in gold.repeats], axis=1)
    return pd.DataFrame({"step": values.index, "low": values.min(axis=1), "high": values.max(axis=1)})


def keep_as_gold(run_dir: Path, gold: Path) -> list[Path]:
    """Add every experiment of a folder to the published ones."""
    return [add_to_gold(numbers_of(folder), gold) for folder in _trained_below(run_dir)]


def _trained_below(run_dir: Path) -> list[Path]:
    """Folders of experiments whose training has ended: those of a batch, or the one that is given."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no folder. Give a folder of `epsdpo run`, e.g. runs/demo")
    folders = [run_dir / name for name in experiments_in(run_dir)]
    folders = [folder for folder in folders if (folder / "train").is_dir()] or [run_dir]
    return [folder for folder in folders if read_manifest(training_in(folder)) is not None]


def _with_gold(folder: Path, given: Path | None) -> tuple[RunNumbers | None, Gold | None]:
    """A run's numbers and what is published of it; nothing is read of one whose name tells that nothing is."""
    if given is None and not folders_of(experiment_of(training_in(folder)).name):
        return None, None
    run = numbers_of(folder)
    return run, gold_of(run, given)


def _same_bits(run: RunNumbers, repeat: RunNumbers) -> bool:
    return run.steps["bits"].equals(repeat.steps["bits"]) and run.may_have_data_of(repeat)


def _other_settings(run: RunNumbers, published: RunNumbers) -> tuple[str, ...]:
    own, other = run.settings, published.settings
    differ = [key for key in own if key in other and own[key] != other[key]]
    differ += [key for key in {**own, **other} if key.startswith("train.") and (key in own) != (key in other)]
    return tuple(
        f"{key} {value_text(own.get(key))}, published {value_text(other.get(key))}"
        for key in differ
        if key not in _ABOUT_NAMES
    )
