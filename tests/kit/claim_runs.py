"""Runs as a batch that tests claims leaves them: written by hand, or real ones that stand for several worlds."""

import json
import shutil
from pathlib import Path

import pandas as pd

from epsdpo.experiment import EXPERIMENT_FILE, check_experiment, save_experiment
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.paper.claims.fixed import fix_claims
from epsdpo.paper.claims.run_table import WITHIN_TRAINING
from epsdpo.paper.claims.settings import Claims
from epsdpo.runs.manifest import MANIFEST

FIGURES = ("main", "frontier", "two_epsilons", "dynamics", "margins", "initial_beta", "label_noise")
NO_ROUNDS = pd.DataFrame(columns=["contender", "length", "round", "seconds"])
SUMMARY = {
    "win_rate": 55.0,
    "length_controlled_win_rate": 53.0,
    "forward_kl_per_response": 1.0,
    "reverse_kl_per_response": 0.8,
    "policy_gold": 0.6,
    "reference_gold": 0.5,
    "policy_tokens": 6.0,
    "reference_tokens": 5.0,
}


def write_run(
    batch: Path,
    recipe: str,
    world: int,
    steps: int = 40,
    decide=lambda step: (1, -1),
    margin=1.0,
    checkpoints=(),
    **train,
) -> Path:
    """A finished run: `decide` gives the decisions of each step's pairs, all of whose log-ratio margins are `margin`.

    Args:
        checkpoints: (step, win rate, forward KL) of each that was evaluated.
        train: keys of the experiment's train section; β stays where it is.
    """
    folder = batch / f"{recipe}-seed{world}"
    values = {
        "name": folder.name,
        "title": f"Run {recipe}, seed={world}",
        "method": "epsilon_dpo",
        "data": {"world": {"seed": world}},
        "train": {"beta": 0.1, **train},
    }
    folder.mkdir(parents=True)
    save_experiment(check_experiment(values, where="test"), folder / EXPERIMENT_FILE)
    _write_record(folder / "train", steps, decide, margin, values["train"]["beta"])
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    if checkpoints:
        table = pd.DataFrame(checkpoints, columns=["step", "win_rate", "forward_kl_per_response"])
        table.to_csv(folder / "evaluate" / WITHIN_TRAINING, index=False)
    for stage, started in (("train", f"2026-01-0{world}T00:00:00+00:00"), ("evaluate", "later")):
        (folder / stage / MANIFEST).write_text(json.dumps({"key": stage, "started": started}), encoding="utf-8")
    return folder


def _write_record(train_dir: Path, steps: int, decide, margin: float, beta: float) -> None:
    record = BetaRecord(train_dir)
    record.rewind(0)
    for step in range(1, steps + 1):
        decisions = decide(step)
        pairs = pd.DataFrame(
            {
                "step": step,
                "epoch": step / steps,
                "pair_id": [f"pair-{step}-{place}" for place in range(len(decisions))],
                "decision": decisions,
                "beta": beta,
                # Of pairs that tighten, half as sure.
                "chosen_logps": [margin / 2 if decision == -1 else margin for decision in decisions],
                "rejected_logps": 0.0,
                "ref_chosen_logps": 0.0,
                "ref_rejected_logps": 0.0,
                "chosen_tokens": 5,
                "rejected_tokens": 6,
            }
        )
        record.append({"step": step, "beta_before": beta, "beta_after": beta, "loss": 0.7, "seconds": 0.5}, pairs)
    record.close()


def as_two_worlds(batch: Path, recipes: dict[str, str], target: Path) -> None:
    """A batch of real runs as one that tests claims: each experiment stands for the runs of a recipe in two worlds.

    Args:
        batch: folder of finished runs.
        recipes: name of an experiment there -> recipe.
    """
    for data in batch.glob("data-*"):
        shutil.copytree(data, target / data.name)
    for name, recipe in recipes.items():
        for world in (1, 2):
            shutil.copytree(batch / name, target / f"{recipe}-seed{world}")
    claim = {"place": "Table 1", "says": "<script>alert('claim')</script> wins more often", "measure": "win_rate"}
    first, *others = recipes.values()
    content = {
        "worlds": 2,
        "first_world": 1,
        "looks": [{"worlds": 2, "error": 0.05}],
        "margins": {"wins_far_more": 99.0},
        "figures": dict.fromkeys(FIGURES, {"compared": list(recipes.values())}) | {"bound": {"all": others}},
        "claims": [
            {**claim, "name": "wins", "of": others or [first], "above": 10.0},
            {**claim, "name": "wins_far_more", "of": others or [first], "minus": [first], "above": 30.0},
            {**claim, "name": "costs_less", "measure": "step_cost", "of": ["one"], "minus": ["other"], "below": 0.0},
        ],
    }
    fix_claims(Claims.model_validate(content), target)
