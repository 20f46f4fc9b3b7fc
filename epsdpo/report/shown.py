"""How a report shows the runs that were collected: tables as text for people, and HTML with all text escaped."""

import html
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.evaluation.judges.counts import completeness
from epsdpo.methods.record import incompleteness
from epsdpo.report.collect import Run, quantised_weights
from epsdpo.report.head_to_head import head_to_head, with_win_rate
from epsdpo.runs.layout import PAGE, link_to
from epsdpo.runs.manifest import read_manifest
from epsdpo.trajectory.same_run.verdict import Verdict

STAGE_FOLDERS = ("train", "trajectory", "evaluate")
NO_JUDGE = "no judge was asked for"


def overview(results: pd.DataFrame) -> pd.DataFrame:
    """The settings and the β of each run, as text for people; "–" for what its method does not have."""
    return pd.DataFrame(
        {
            "run": results["title"],
            "method": results["method"],
            "ε": results["epsilon"].map("{:g}".format, na_action="ignore").fillna("–"),
            "criterion": results["criterion"].fillna("–"),
            "released code under this launch": results["released_launch"].fillna("–"),
            "steps": results["steps"],
            "β at start": results["beta_initial"].map("{:.4g}".format),
            "β at end": results["beta_final"].map("{:.4g}".format),
            "mean step": results["mean_step"].map("{:+.3f}".format, na_action="ignore").fillna("–"),
            "s per step": results["seconds_per_step"].map("{:.2f}".format),
        }
    ).set_index("run")


def win_rates_and_kl(results: pd.DataFrame) -> pd.DataFrame:
    """Of the runs that were judged, what the figure of win rate over KL shows."""
    if "win_rate" not in results:
        return results.iloc[:0]
    return results.dropna(subset=["win_rate"]).filter(regex="^(title|win_rate.*|(reverse|forward)_kl_per_response.*)$")


def evaluation_overview(results: pd.DataFrame) -> pd.DataFrame:
    """Win rates, divergences, gold reward and length of each evaluated run, with 95 % intervals, as text for people.

    A dash stands for what was not measured: without a judge there is no win rate, off the world no gold reward.
    """
    results = results.dropna(subset=["reverse_kl_per_response"])

    def measure(name: str, form: str) -> pd.Series:
        columns = results.reindex(columns=[name, f"{name}_low", f"{name}_high"])
        return columns.apply(
            lambda row: "–" if row.isna().any() else "{:{f}} [{:{f}}, {:{f}}]".format(*row, f=form), axis=1
        )

    judged = results.reindex(columns=["judge", "n_scored", "n_total", "n_distinct"])
    return pd.DataFrame(
        {
            "run": results["title"],
            "win rate (%)": measure("win_rate", ".1f"),
            "length-controlled (%)": measure("length_controlled_win_rate", ".1f"),
            "KL(π‖π_ref) (nats)": measure("reverse_kl_per_response", ".2f"),
            "KL(π_ref‖π) (nats)": measure("forward_kl_per_response", ".2f"),
            "gold reward": measure("policy_gold", ".3f"),
            "characters": results["policy_avg_length"],
            "judged": [
                NO_JUDGE
                if pd.isna(judge) and pd.isna(scored)
                else f"{0 if pd.isna(scored) else scored:.0f} of {total:.0f}"
                + (f", {different:.0f} distinct" if different < total else "")
                for judge, scored, total, different in judged.itertuples(index=False)
            ],
        }
    ).set_index("run")


def headline(runs: list[Run]) -> str:
    """HTML: what each run came to, a sentence each with intervals; a difference that may be chance is called so.

    First come the runs of which not every comparison was judged, or not every step is recorded, and what GGUF files
    their numbers are of.
    """
    judged = with_win_rate(runs)
    baseline = judged[0].experiment.title if judged else None
    pairs = head_to_head(judged)
    gains = pairs[pairs["baseline"] == baseline].set_index("title")
    sentences = []
    for run in runs:
        title = run.experiment.title
        first, last, low, high = (
            f"{run.trajectory[f'beta_{what}']:.4g}" for what in ("initial", "final", "min", "max")
        )
        text = f"β stayed at {first}" if low == high else f"β went from {first} to {last}"
        if low != high and first == last:
            text += f" by way of {low} and {high}"
        if run.evaluation is not None:
            text += _evaluation_in_words(run.evaluation)
        if title in gains.index:
            gain = gains.loc[title]
            certain = gain["low"] > 0 or gain["high"] < 0
            text += (
                f"; {gain['difference']:+.1f} points [{gain['low']:+.1f}, {gain['high']:+.1f}] to "
                f"{gain['baseline']}{'' if certain else ', which may be chance'}"
            )
        sentences.append(f"<li><b>{html.escape(title)}</b>: {html.escape(text)}.</li>")
    return f"{_incomplete(runs)}{_quantised(runs)}<ul>{''.join(sentences)}</ul>"


def _evaluation_in_words(summary: dict[str, Any]) -> str:
    text = f"; {NO_JUDGE}" if summary.get("judge", "") is None else ""
    if "win_rate" in summary:
        opponent = "its reference" if summary["against"] == "reference" else "the given responses"
        text += (
            f"; win rate over {opponent} {summary['win_rate']:.1f} % "
            f"[{summary['win_rate_low']:.1f}, {summary['win_rate_high']:.1f}]"
        )
    return f"{text} at a divergence of {summary['reverse_kl_per_response']:.2f} nats per response"


def _incomplete(runs: list[Run]) -> str:
    """HTML: a paragraph for each run whose judge left comparisons out, or whose record has not all its steps."""
    problems = []
    for run in runs:
        problems.append((run, incompleteness(run.directory / "train")))
        if run.evaluation is not None and run.evaluation.get("n_failed"):
            problems.append((run, completeness(run.evaluation)))
    return "".join(
        f"<p style='color: #D55E00'><b>{html.escape(run.experiment.title)}: {html.escape(problem)}</b></p>"
        for run, problem in problems
        if problem
    )


def _quantised(runs: list[Run]) -> str:
    """HTML: a paragraph for each GGUF file, with the runs whose numbers are those of its weights."""
    users: dict[str, list[str]] = {}
    for run in runs:
        for weights in quantised_weights(run):
            users.setdefault(weights, []).append(run.experiment.title)
    lines = [f"{weights}: {', '.join(titles)}" for weights, titles in users.items()]
    return "".join(f"<p>{html.escape(line)}.</p>" for line in lines)


def links_table(runs: list[Run], page_dir: str | Path) -> str:
    """HTML: each run's pages, as links that work from a page in `page_dir`, with the stages' times."""
    rows = []
    for run in runs:
        cells = [f"<td>{html.escape(run.experiment.title)}</td>"]
        for stage in STAGE_FOLDERS:
            page, manifest = run.directory / stage / PAGE, read_manifest(run.directory / stage)
            if manifest is None:
                cells.append("<td>–</td>")
                continue
            link = html.escape(link_to(page, page_dir))
            cells.append(f'<td><a href="{link}">{stage}</a> ({manifest["seconds"]:.0f} s)</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("run", *STAGE_FOLDERS))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def shared_links(runs: list[Run], page_dir: str | Path) -> str:
    """HTML: the pages of what runs were made from, such as prepared data, each with the runs that share it."""
    users: dict[Path, list[str]] = {}
    for run in runs:
        parameters = (read_manifest(run.directory / "train") or {}).get("parameters", {})
        for name in ("data_dir", "sft_dir"):
            if parameters.get(name):
                # A batch folder may have been moved as a whole since.
                users.setdefault(run.directory.parent / Path(parameters[name]).name, []).append(run.experiment.title)
    items = []
    for folder, titles in users.items():
        if (folder / PAGE).exists():
            link = html.escape(link_to(folder / PAGE, page_dir))
            items.append(f'<li><a href="{link}">{html.escape(folder.name)}</a>: {html.escape(", ".join(titles))}</li>')
    return f"<ul>{''.join(items)}</ul>"


def published_runs(verdicts: list[Verdict]) -> str:
    """HTML: whether each run is the published one, and what speaks against it."""
    if not verdicts:
        return "<p>Of these runs nothing is published.</p>"
    lines = [
        f"<li><b>{html.escape(verdict.experiment)}</b>: {html.escape(f'{verdict.says}: {verdict.why}')}.</li>"
        for verdict in verdicts
    ]
    return f"<ul>{''.join(lines)}</ul>"


def no_win_rates(results: pd.DataFrame) -> str:
    """Why no run of a table of results has a win rate, in a sentence."""
    asked = "judge" in results and results["judge"].notna().any()
    return "No run of this folder was judged." if asked or "judge" not in results else "No judge was asked for."
