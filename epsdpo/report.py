"""The runs of a batch folder, joined: one row per experiment, with what it did and what it gained.

It reads what the stages wrote (`experiment.yaml`, the β record, `summary.json`, manifests) and makes tables; the
notebook `05_report` shows them.
"""

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.evaluation.run import RESPONSES, SUMMARY
from epsdpo.evaluation.winrate import bootstrap_interval
from epsdpo.experiment import EXPERIMENT_FILE, Experiment, load_saved
from epsdpo.manifest import MANIFEST
from epsdpo.record import read_steps
from epsdpo.trajectory import summarise

STAGE_FOLDERS = ("train", "trajectory", "evaluate")
PAGE = "notebook.html"


@dataclass(frozen=True)
class Run:
    """One trained experiment of a batch.

    Attributes:
        directory: its folder.
        experiment: its resolved config.
        steps: its β record, one row per optimiser step.
        trajectory: `epsdpo.trajectory.summarise` of it.
        evaluation: the numbers of its evaluate stage, or None if it has none.
    """

    directory: Path
    experiment: Experiment
    steps: pd.DataFrame
    trajectory: dict[str, float]
    evaluation: dict[str, Any] | None


def collect(batch_dir: str | Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a batch folder, baselines first, and the names of experiments that did not finish.

    Raises:
        FileNotFoundError: if no experiment of the folder was trained.
    """
    batch_dir = Path(batch_dir)
    runs, unfinished = [], []
    for file in sorted(batch_dir.glob(f"*/{EXPERIMENT_FILE}")):
        folder = file.parent
        if not (folder / "train" / MANIFEST).exists():
            unfinished.append(folder.name)
            continue
        summary = folder / "evaluate" / SUMMARY
        runs.append(
            Run(
                directory=folder,
                experiment=load_saved(file),
                steps=read_steps(folder / "train"),
                trajectory=summarise(folder / "train"),
                evaluation=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None,
            )
        )
    if not runs:
        raise FileNotFoundError(
            f"{batch_dir} holds no trained experiment. Give the folder of `epsdpo run`, e.g. runs/demo"
        )
    return sorted(runs, key=lambda run: (run.experiment.method != "dpo", run.experiment.name)), unfinished


def results_table(runs: list[Run]) -> pd.DataFrame:
    """One row per run: title, settings, β, decisions, and the evaluation's numbers with their intervals."""
    rows = []
    for run in runs:
        train = run.experiment.training_arguments()
        rows.append(
            {
                "title": run.experiment.title,
                "method": run.experiment.method,
                "epsilon": train.get("epsilon"),
                "criterion": train.get("criterion_dtype"),
                **run.trajectory,
                **(run.evaluation or {}),
            }
        )
    return pd.DataFrame(rows)


def overview(results: pd.DataFrame) -> pd.DataFrame:
    """The settings and the β of each run, as text for people; "–" for what its method does not have."""
    return pd.DataFrame(
        {
            "run": results["title"],
            "method": results["method"],
            "ε": results["epsilon"].map("{:g}".format, na_action="ignore").fillna("–"),
            "criterion": results["criterion"].fillna("–"),
            "steps": results["steps"],
            "β at start": results["beta_initial"].map("{:.4g}".format),
            "β at end": results["beta_final"].map("{:.4g}".format),
            "mean step": results["mean_step"].map("{:+.3f}".format, na_action="ignore").fillna("–"),
            "s per step": results["seconds_per_step"].map("{:.2f}".format),
        }
    ).set_index("run")


def evaluation_overview(results: pd.DataFrame) -> pd.DataFrame:
    """Win rates, divergence, gold reward and length of each evaluated run, with 95 % intervals, as text for people."""

    def measure(name: str, form: str) -> pd.Series:
        columns = results[[name, f"{name}_low", f"{name}_high"]]
        return columns.apply(lambda row: "{:{f}} [{:{f}}, {:{f}}]".format(*row, f=form), axis=1)

    return pd.DataFrame(
        {
            "run": results["title"],
            "win rate (%)": measure("win_rate", ".1f"),
            "length-controlled (%)": measure("length_controlled_win_rate", ".1f"),
            "KL per response (nats)": measure("kl_per_response", ".2f"),
            "gold reward": measure("policy_gold", ".3f"),
            "characters": results["policy_avg_length"],
            "prompts": results["n_scored"],
        }
    ).set_index("run")


def headline(runs: list[Run]) -> str:
    """HTML: what each run came to, a sentence each with intervals; a difference that may be chance is called so."""
    gains = gains_over_baseline(runs).set_index("title")
    sentences = []
    for run in runs:
        summary, title = run.evaluation, run.experiment.title
        first, last = (f"{run.trajectory[end]:.4g}" for end in ("beta_initial", "beta_final"))
        text = f"β stayed at {first}" if first == last else f"β went from {first} to {last}"
        if summary is not None:
            if "win_rate" in summary:
                text += (
                    f"; win rate over its reference {summary['win_rate']:.1f} % "
                    f"[{summary['win_rate_low']:.1f}, {summary['win_rate_high']:.1f}]"
                )
            text += f" at a divergence of {summary['kl_per_response']:.2f} nats per response"
        if title in gains.index:
            gain = gains.loc[title]
            certain = gain["low"] > 0 or gain["high"] < 0
            text += (
                f"; {gain['difference']:+.1f} points [{gain['low']:+.1f}, {gain['high']:+.1f}] to "
                f"{gain['baseline']}{'' if certain else ', which may be chance'}"
            )
        sentences.append(f"<li><b>{html.escape(title)}</b>: {html.escape(text)}.</li>")
    return f"<ul>{''.join(sentences)}</ul>"


def links_table(runs: list[Run], page_dir: str | Path) -> str:
    """HTML: each run's pages, as links that work from a page in `page_dir`, with the stages' times."""
    rows = []
    for run in runs:
        cells = [f"<td>{html.escape(run.experiment.title)}</td>"]
        for stage in STAGE_FOLDERS:
            page, manifest = run.directory / stage / PAGE, run.directory / stage / MANIFEST
            if not manifest.exists():
                cells.append("<td>–</td>")
                continue
            seconds = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
            link = html.escape(os.path.relpath(page.resolve(), Path(page_dir).resolve()))
            cells.append(f'<td><a href="{link}">{stage}</a> ({seconds:.0f} s)</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("run", *STAGE_FOLDERS))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def gains_over_baseline(runs: list[Run], samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Win rate of each run less that of the first judged one (the baseline), prompt by prompt, in percentage points.

    Both were judged against the same reference on the same prompts, so the difference is taken per prompt before it is
    bootstrapped; its interval is narrower than two separate ones suggest.

    Returns:
        One row per further run: title, baseline, difference, low, high (95 % interval), prompts.
    """
    judged = [run for run in runs if run.evaluation is not None and "win_rate" in run.evaluation]
    preferences = [_preferences(run) for run in judged]
    rows = []
    for run, preference in zip(judged[1:], preferences[1:], strict=True):
        both = pd.concat([preferences[0], preference], axis=1, join="inner", keys=["baseline", "run"])
        difference = 100.0 * (both["run"] - both["baseline"])
        interval = bootstrap_interval(difference, samples, seed)
        rows.append(
            {
                "title": run.experiment.title,
                "baseline": judged[0].experiment.title,
                "difference": difference.mean(),
                "low": interval.low,
                "high": interval.high,
                "prompts": len(both),
            }
        )
    return pd.DataFrame(rows, columns=["title", "baseline", "difference", "low", "high", "prompts"])


def _preferences(run: Run) -> pd.Series:
    return pd.read_parquet(run.directory / "evaluate" / RESPONSES).set_index("prompt_id")["preference"]


def provenance(runs: list[Run]) -> pd.DataFrame:
    """What each run came from: git commit, seed, package versions, machine and time, read from its manifest."""
    rows = []
    for run in runs:
        manifest = json.loads((run.directory / "train" / MANIFEST).read_text(encoding="utf-8"))
        git = manifest["git"]
        commit = "not in git" if git is None else git["commit"][:10] + (" + changes" if git["dirty"] else "")
        packages = manifest["packages"]
        rows.append(
            {
                "run": run.experiment.title,
                "commit": commit,
                "seed": run.experiment.seed,
                **{name: packages[name] for name in ("torch", "transformers", "trl")},
                "machine": ", ".join(manifest["gpus"]) or f"{manifest['cpus']} CPUs",
                "finished (UTC)": manifest["finished"][:16].replace("T", " "),
            }
        )
    return pd.DataFrame(rows)
