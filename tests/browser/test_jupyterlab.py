"""Every notebook opened in JupyterLab in a real browser: its defaults run on the demo, and give what papermill gave."""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from kit.hostile import HOSTILE_TITLE
from kit.lab import make_lab, run_all_cells, scroll_to

from epsdpo.batch.specs import STAGES
from epsdpo.methods.record import read_pairs, read_steps

FIGURES = {
    "sample": 1,
    "prepare": 1,
    "sft": 2,
    "train": 2,
    "trajectory": 6,
    "evaluate": 5,
    "report": 5,
    "claims": 10,
    "precision": 4,
    "real_text": 4,
    "compare": 4,
}
TAKES_LONG = "measure(folder)"  # and is kept: only whoever comes first tells how far it is
LIVE_CHART = "LiveChart("  # in the cell that by default shows training as it goes, and headless as lines of text


@dataclass(frozen=True)
class LabSession:
    """What came of running all notebooks in JupyterLab, in their order.

    Attributes:
        notebooks: stage -> the notebook, as JupyterLab saved it after all cells had run.
        widths: stage -> widths in pixels of the figures that the browser showed.
        hacked: what a hostile text that ran as code in the report would have left behind.
        shown: the text at the top of the report, as the browser showed it.
    """

    notebooks: dict[str, Path]
    widths: dict[str, list[int]]
    hacked: str | None
    shown: str


@pytest.fixture(scope="module")
def lab(checkout, chromium, tmp_path_factory):
    home = tmp_path_factory.mktemp("jupyter")
    widths = {}
    with (
        make_lab(checkout.folder, home, checkout.environment) as address,
        chromium.tab(address, screenshots=home) as tab,
    ):
        for stage, spec in STAGES.items():
            widths[stage] = run_all_cells(tab, f"notebooks/{spec.notebook}")
            if stage == "report":
                scroll_to(tab, 0)
                hacked = tab.evaluate("window.hacked ?? null")
                shown = tab.evaluate("document.body.innerText")
    notebooks = {stage: checkout.folder / "notebooks" / spec.notebook for stage, spec in STAGES.items()}
    return LabSession(notebooks, widths, hacked, shown)


@pytest.fixture(scope="module")
def headless(checkout):
    """Stage -> the notebook that papermill executed with the same experiment."""
    folders = {stage: checkout.demo / stage for stage in ("train", "trajectory", "evaluate")}
    run_dir = checkout.demo.parent
    folders["compare"] = checkout.folder / "runs" / "compare"
    folders |= {stage: checkout.claimed / stage for stage in ("claims", "precision")}
    folders["real_text"] = checkout.real / "real_text"
    folders |= {"prepare": checkout.data_of(checkout.demo), "report": run_dir / "report"}
    folders |= {stage: next(run_dir.glob(f"{shared}-*")) for stage, shared in (("sample", "pairs"), ("sft", "sft"))}
    return {stage: folder / "notebook.ipynb" for stage, folder in folders.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_figure_appears(lab, stage):
    """`run_all_cells` has seen each in the browser's view; here, that there are as many as there should be."""
    assert len(lab.widths[stage]) == FIGURES[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_every_cell_gives_what_papermill_gave(lab, headless, stage):
    """Streams, tables and figures, to the byte, but for where files lie and the seconds that steps took."""
    by_hand, by_papermill = code_cells(lab.notebooks[stage]), code_cells(headless[stage])
    assert [cell.source for cell in by_hand] == [cell.source for cell in by_papermill]
    folders = folder_names(headless[stage])
    for seen, expected in zip(by_hand, by_papermill, strict=True):
        if LIVE_CHART not in seen.source and TAKES_LONG not in seen.source:
            assert outputs(seen, {}) == outputs(expected, folders), seen.source


def test_training_in_jupyterlab_is_the_training_of_the_batch(lab, checkout):
    by_hand = checkout.folder / "runs" / "notebooks" / "epsilon_dpo_fp32" / "train"
    by_papermill = checkout.demo / "train"
    for read, rows in ((read_steps, 4), (read_pairs, 64)):
        seen, expected = (read(folder).drop(columns="seconds", errors="ignore") for folder in (by_hand, by_papermill))
        assert len(seen) == rows
        pd.testing.assert_frame_equal(seen, expected, check_exact=True)


def test_hostile_titles_do_not_run_in_jupyterlab(lab):
    """The report joins the hostile run too."""
    assert lab.hacked is None
    assert HOSTILE_TITLE in lab.shown


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a saved notebook, less the one that papermill adds for its parameters."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [
        cell
        for cell in cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def folder_names(executed: Path) -> dict[str, str]:
    """What papermill gave as each path -> the default in the notebook's `parameters` cell, where it has one."""
    notebook = nbformat.read(executed, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    exec(cell.source, defaults)
    given = notebook.metadata.papermill.parameters
    return {value: defaults[name] for name, value in given.items() if isinstance(value, str) and defaults[name]}


def outputs(cell: nbformat.NotebookNode, folders: dict[str, str]) -> list[tuple[str, str]]:
    """What a cell shows as (kind, content) in order, with `folders` renamed and whatever differs each time left out."""
    contents: list[tuple[str, str]] = []
    for output in cell.outputs:
        if output.output_type != "stream":
            contents += sorted(output.data.items())
        elif contents and contents[-1][0] == output.name:
            contents[-1] = (output.name, contents[-1][1] + output.text)  # how a stream was cut into messages is chance
        else:
            contents.append((output.name, output.text))
    return [(kind, lasting(content, folders)) for kind, content in contents]


def lasting(content: str, folders: dict[str, str]) -> str:
    for given, default in folders.items():
        content = content.replace(given, default)
    content = " ".join(content.split())
    # By hand paths begin at the root of the checkout, and a folder that a batch shares has no key in its name.
    content = re.sub(r"(?:/[^\s\"<>]*?/)?runs/(?:demo|notebooks)/", "runs/", content)
    content = re.sub(r"runs/(data|pairs|sft)-[0-9a-f]{8}", r"runs/\1", content)
    content = re.sub(r"0x[0-9a-f]+|T_[0-9a-f]{5}", "ID", content)  # addresses, and the ids of styled tables
    content = re.sub(r'href="(\.\./)+(runs/)?', 'href="', content)  # links from a page to those of the batch
    content = re.sub(r'href="(data|pairs|sft)-[0-9a-f]{8}', r'href="\1', content)
    content = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "TIME", content)
    content = re.sub(r"about [\d.]+ \w+ left", "about SECONDS left", content)
    return re.sub(r"(time per step \(s, median\)\D+)[\d.e-]+", r"\1SECONDS", content)
