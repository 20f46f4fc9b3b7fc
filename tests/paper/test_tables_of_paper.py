"""Tables of the paper: what is typed, which runs stand beside it, and the page and picture made of them."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from kit.claim_runs import write_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import t

from epsdpo.evaluation.scores.intervals import prediction_interval
from epsdpo.experiment import ConfigError, load_experiments
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.paper import table_page
from epsdpo.paper.drawing_table import beside_the_paper
from epsdpo.paper.published import (
    PUBLISHED_FILE,
    Published,
    leave_published,
    published_beside,
    published_in,
    read_published,
    table_5,
)
from epsdpo.paper.table_cells import MEASURED, NOT_EVALUATED, NOT_FINISHED, NOT_JUDGED, NOT_RUN, beside, in_words
from epsdpo.runs.manifest import MANIFEST

CONFIGS = REPOSITORY / "configs"
FOLDERS = sorted(folder for scale in ("paper", "small") for folder in (CONFIGS / scale).iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", [*FOLDERS, CONFIGS / "paper_mini"], ids=lambda folder: folder.name)
def test_every_folder_has_its_table_and_every_row_its_run(folder):
    tables = published_beside([folder])
    assert tables
    recipes = {recipe_and_world(experiment.name)[0] for experiment in load_experiments(folder)}
    named = {table.run_of(value) for table in tables for value in table.values}
    named |= {run for table in tables for run in table.minus.values()}
    assert named - {None} <= recipes
    assert all((table.scale == "") == (folder.parent.name == "paper") for table in tables)
    if folder.name.startswith("table1"):  # there all experiments stand in the table
        assert recipes == named - {None}


def test_the_printed_numbers_are_typed_once():
    typed = [path for path in CONFIGS.rglob("_published*.yaml") if "\nvalues:" in path.read_text(encoding="utf-8")]
    assert {path.parents[1].name for path in typed} == {"paper"}
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "epsdpo").rglob("*.py"))
    assert not any(number in code for number in ("76.4", "79.2", "46.4", "35.6"))
    assert table_5()[4] == (0.01, 0.01, 79.2, 0.25)
    assert [row[3] for row in table_5()] == [0.07, 0.07, 0.07, 0.24, 0.25, 0.24, 0.34, 0.35, 0.34]


def test_what_the_paper_prints_twice_is_the_same_here():
    first, second = (
        {value.row: value.printed for value in read_published(CONFIGS / "paper" / name / "_published.yaml").values}
        for name in ("table1_llama3", "table2_kl_relaxation")
    )
    for row in ("SFT", "DPO", "ε-DPO"):
        assert second[row].items() <= first[row].items()
    assert first["ε-DPO"] == {"length_controlled_win_rate": 46.4, "win_rate": 44.9, "arena_hard": 36.7, "mt_bench": 8.0}


def published(**changes):
    values = {
        "table": "Table 9",
        "rows": "method",
        "metrics": {
            "win_rate": {"prints": "win rate (%)", "digits": 1},
            "mean_step": {"prints": "average step", "digits": 2},
            "arena": {"prints": "Arena", "digits": 1, "not_measured": "this kit has no arena"},
        },
        "values": [
            {"row": "ours", "printed": {"win_rate": 62.0, "mean_step": 0.25, "arena": 20.0}},
            {"row": "<b>theirs</b>", "printed": {"win_rate": 40.0}},
            {"row": "start", "printed": {"win_rate": 30.0}},
        ],
        "runs": {"ours": "eps", "<b>theirs</b>": "dpo"},
        "without_run": {"start": "no run is made of it"},
        "made_with": {"train.beta": 0.1, "data.source": "their data"},
        "judge": "their judge",
        "note": "One run each.",
    }
    return Published.model_validate(values | changes)


def rewrite(folder, **numbers):
    path = folder / "evaluate" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | numbers), encoding="utf-8")


def cell(cells, row, metric="win_rate"):
    return cells[(cells["row"] == row) & (cells["metric"] == metric)].iloc[0]


def test_runs_of_several_seeds(tmp_path):
    """Win rates 58, 60, 62: mean 60, deviation 2, t(2; 0.975) = 4.3027."""
    for seed, rate in ((1, 58.0), (2, 60.0), (3, 62.0)):
        rewrite(write_run(tmp_path, "eps", seed), win_rate=rate, judge="ours")
    cells = beside(published(), tmp_path)
    found = cell(cells, "ours")
    quantile = t.ppf(0.975, 2)
    assert (found["state"], found["runs"], found["measured"], found["difference"]) == (MEASURED, 3, 60.0, -2.0)
    assert found[["low", "high"]].tolist() == pytest.approx([60 - quantile * 2 / 3**0.5, 60 + quantile * 2 / 3**0.5])
    half = quantile * 2 * (4 / 3) ** 0.5
    assert found[["prediction_low", "prediction_high"]].tolist() == pytest.approx([60 - half, 60 + half])
    assert bool(found["inside"])
    assert found["differs"].split("; ") == [
        "data world, in the paper their data",
        "judge ours, in the paper their judge",
        "3 runs, in the paper 1",
    ]
    step = cell(cells, "ours", "mean_step")
    # Three runs without any spread, whose mean step is 0.
    assert (step["measured"], step["prediction_low"], step["prediction_high"]) == (0.0, 0.0, 0.0)
    assert not step["inside"]
    assert "judge" not in step["differs"]


def test_a_single_run_has_the_error_of_two_evaluations(tmp_path):
    rewrite(write_run(tmp_path, "eps", 1), win_rate=60.0, win_rate_low=57.0, win_rate_high=64.0)
    found = cell(beside(published(), tmp_path), "ours")
    assert found[["low", "high"]].tolist() == [57.0, 64.0]
    assert found[["prediction_low", "prediction_high"]].tolist() == pytest.approx(
        [60 - 3 * math.sqrt(2), 60 + 4 * math.sqrt(2)]
    )
    values = [{"row": "ours", "printed": {"win_rate": 68.3}, "spread": {"win_rate": 4.0}}]
    wide = cell(beside(published(values=values), tmp_path), "ours")
    assert wide["prediction_high"] == pytest.approx(60 + math.hypot(4, 1.959964 * 4.0))
    assert bool(wide["inside"])
    narrow = cell(beside(published(values=[values[0] | {"spread": {}}]), tmp_path), "ours")
    assert not narrow["inside"]


def test_a_printed_number_stands_for_all_that_are_rounded_to_it(tmp_path):
    rewrite(write_run(tmp_path, "eps", 1), win_rate=60.0, win_rate_low=60.0, win_rate_high=60.0)
    for printed, inside in ((60.05, True), (60.06, False)):
        values = [{"row": "ours", "printed": {"win_rate": printed}}]
        assert bool(cell(beside(published(values=values), tmp_path), "ours")["inside"]) == inside


def test_a_mean_step_has_an_interval_over_pairs(tmp_path):
    write_run(tmp_path, "eps", 1, decide=lambda step: (1, 1, 0, -1))
    step = cell(beside(published(), tmp_path), "ours", "mean_step")
    decisions = np.tile([1, 1, 0, -1], 40)
    half = 1.959964 * decisions.std(ddof=1) / len(decisions) ** 0.5
    assert [step["measured"], step["low"], step["high"]] == pytest.approx([0.25, 0.25 - half, 0.25 + half])
    assert bool(step["inside"]) and step["difference"] == 0.0


def test_an_unfinished_batch_says_what_is_missing(tmp_path):
    assert beside(published(), tmp_path)["state"].tolist() == [
        *(NOT_RUN, NOT_RUN, "this kit has no arena"),
        NOT_RUN,
        "no run is made of it",
    ]
    folder = write_run(tmp_path, "eps", 1)
    (folder / "evaluate" / MANIFEST).unlink()
    cells = beside(published(), tmp_path)
    assert cell(cells, "ours")["state"] == NOT_EVALUATED
    assert cell(cells, "ours", "mean_step")["state"] == MEASURED
    (folder / "evaluate" / MANIFEST).write_text(json.dumps({"key": "evaluate"}), encoding="utf-8")
    (folder / "evaluate" / "summary.json").write_text("{}", encoding="utf-8")
    assert cell(beside(published(), tmp_path), "ours")["state"] == NOT_JUDGED
    (folder / "train" / MANIFEST).unlink()
    cells = beside(published(), tmp_path)
    assert cell(cells, "ours")["state"] == cell(cells, "ours", "mean_step")["state"] == NOT_FINISHED
    assert "None of the 5 printed numbers" in in_words(cells)


def test_more_time_than_another_run(tmp_path):
    table = published(
        metrics={
            "seconds_per_step": {"prints": "s", "digits": 4},
            "percent_per_step": {"prints": "%", "digits": 4},
        },
        values=[{"row": "ours", "printed": {"seconds_per_step": 0.1, "percent_per_step": 20.0}}],
        minus={"ours": "dpo"},
    )
    write_run(tmp_path, "eps", 1)
    assert beside(table, tmp_path)["state"].tolist() == [NOT_RUN, NOT_RUN]
    slower = write_run(tmp_path, "dpo", 1)
    path = slower / "train" / "steps.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"seconds": 0.5', '"seconds": 0.4'), encoding="utf-8")
    cells = beside(table, tmp_path)
    assert cells["measured"].tolist() == pytest.approx([0.1, 25.0])
    assert cells["inside"].tolist() == [None, None]


def test_the_page_has_every_number_in_the_papers_layout(tmp_path):
    rewrite(write_run(tmp_path, "eps", 1, beta=0.3), win_rate=60.0, win_rate_low=57.0, win_rate_high=63.0)
    table = published(scale="a <tiny> model")
    text = table_page.page(table, beside(table, tmp_path))
    unset = beside(published(made_with={"train.learning_rate": 1e-6}), tmp_path)
    assert cell(unset, "ours")["differs"].startswith("learning_rate not set, in the paper 1e-06")
    for said in (
        "<b>62.0</b><br>60.0 (57.0 to 63.0), -2.0<br>",
        "✓ inside</span> [55.8, 64.2]",
        "<b>0.25</b><br>0.00",
        "this kit has no arena",
        f"<b>40.0</b><br><span style='color: #333333'>{NOT_RUN}",
        "no run is made of it",
        "Another scale: a &lt;tiny&gt; model.",
        "2 of the 5 printed numbers",
        "beta 0.3, in the paper 0.1",
        "One run each.",
    ):
        assert said in text, said
    assert "<b>theirs" not in text and "&lt;b&gt;theirs" in text
    assert text.count("<th") == 4 + 3  # heads and rows
    assert "Another scale" not in table_page.page(published(), beside(published(), tmp_path))


def test_the_page_of_a_grid_and_of_a_figure_without_numbers(tmp_path):
    table = read_published(CONFIGS / "small" / "table5_two_epsilons" / "_published.yaml")
    write_run(tmp_path, "epsilon_dpo-epsilon0.02-epsilon_step0.005", 1)
    text = table_page.page(table, beside(table, tmp_path))
    assert [text.count(f"<th style='{table_page._CELL}'>ε_{name} = 0.0") for name in "sc"] == [3, 3]
    assert text.count(NOT_RUN) == 16
    assert "PairRM, win rate (%): <b>74.9</b><br>55.0, -19.9" in text
    picture = read_published(CONFIGS / "paper" / "figure4b_pareto" / "_published.yaml")
    assert "not printed as numbers" in table_page.page(picture, beside(picture, tmp_path))


def test_the_picture_shows_every_number_of_what_was_measured(tmp_path):
    rewrite(write_run(tmp_path, "eps", 1), win_rate=60.0, win_rate_low=57.0, win_rate_high=63.0)
    cells = beside(published(), tmp_path)
    figure = beside_the_paper(published(), cells)
    FigureCanvasAgg(figure).draw()
    assert [axes.get_xlabel() for axes in figure.axes] == ["win rate (%)", "average step"]
    drawn = [set(np.ravel(line.get_xdata())) for line in figure.axes[0].get_lines()]
    for number in (62.0, 40.0, 30.0, 60.0, 57.0, 63.0):
        assert any(number in xs for xs in drawn), number
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["ours", "<b>theirs</b>", "start"]
    assert (figure.axes[0].get_ylabel(), figure.get_suptitle()) == ("method", "Table 9: printed, and measured")
    assert "at another scale" in beside_the_paper(published(scale="tiny"), cells).get_suptitle()
    whole = figure.bbox
    for text in (*figure.axes[0].get_yticklabels(), *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_a_run_folder_keeps_its_tables_and_others_that_a_batch_left_there(tmp_path):
    leave_published([], tmp_path)
    assert not (tmp_path / PUBLISHED_FILE).exists() and published_in(tmp_path) == []
    leave_published([published()], tmp_path)
    leave_published([published(table="Table 8")], tmp_path)
    leave_published([published(note="Said otherwise.")], tmp_path)
    assert [(table.table, table.note) for table in published_in(tmp_path)] == [
        ("Table 8", "One run each."),
        ("Table 9", "Said otherwise."),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "ours: name its run in `runs`"),
        ({"values": [{"row": "ours", "printed": {"win": 1.0}}]}, "ours: win is none of the metrics"),
        ({"notes": "x"}, "notes: Extra inputs"),
        ({"note": ""}, "note: String should have"),
    ],
)
def test_a_table_that_does_not_hold_together_is_refused(tmp_path, changes, message):
    path = tmp_path / "_published.yaml"
    values = published().model_dump(exclude_defaults=True) | changes
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{path}: .*{message}"):
        read_published(path)


@pytest.mark.parametrize("text", ["{", "3", "- {table: 1}"])
def test_a_damaged_copy_is_refused(tmp_path, text):
    (tmp_path / PUBLISHED_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=str(tmp_path / PUBLISHED_FILE)):
        published_in(tmp_path)


def test_an_interval_of_prediction_covers_the_next_number():
    generator = np.random.default_rng(5)
    samples = generator.normal(3.0, 2.0, (4000, 6))
    inside = [
        interval.low <= row[-1] <= interval.high for row in samples for interval in [prediction_interval(row[:-1])]
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.011)  # three standard errors
    with pytest.raises(ValueError, match="two numbers at least, there is 1"):
        prediction_interval([1.0])


def test_one_config_file_has_the_table_of_its_folder():
    folder = CONFIGS / "paper" / "table1_llama3"
    (table,) = published_beside([folder / "dpo.yaml", folder / "ipo.yaml", Path(folder)])
    assert table.title == "Table 1, Llama-3-8B-Instruct"
    assert isinstance(beside(table, folder), pd.DataFrame)
