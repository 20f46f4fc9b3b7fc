"""Every notebook, executed for real: a whole batch through the runner that users call, and the live chart."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from kit.claim_runs import FIGURES, as_two_worlds
from kit.official import OFFICIAL
from nbclient import NotebookClient

from epsdpo.__main__ import main
from epsdpo.batch.runner import run_batch
from epsdpo.batch.stage import run_stage
from epsdpo.data.prepared import load_prepared
from epsdpo.experiment import load_experiment, load_experiments
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.report.collect import collect
from epsdpo.report.head_to_head import head_to_head
from epsdpo.report.shown import links_table
from epsdpo.runs.layout import NOTEBOOKS, VERDICTS
from epsdpo.trajectory.same_run.verdict import SAME_BITS, WITHIN
from epsdpo.world.language import gold_score

DEMO = Path(__file__).parents[2] / "configs" / "demo"
RUNS = ("dpo", "epsilon_dpo_bf16")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Two runs of the demo as they are, but for hostile titles, from data to report. Builds the world if need be."""
    folder = tmp_path_factory.mktemp("batch")
    configs = folder / "configs"
    configs.mkdir()
    for name in RUNS:
        values = load_experiment(DEMO / f"{name}.yaml").model_dump()
        values["title"] += " <script>alert('title')</script>"
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    outcome = run_batch(load_experiments(configs), folder / "runs")
    assert not outcome.failed and not outcome.not_run
    return folder / "runs", folder / "runs" / "report" / "notebook.html"


def test_every_stage_is_finished_and_readable(batch):
    run_dir, page = batch
    stages = [path.parent for path in run_dir.glob("**/manifest.json")]
    assert len(stages) == 1 + 2 * 3 + 1
    for folder in stages:
        html = (folder / "notebook.html").read_text(encoding="utf-8")
        assert "Traceback" not in html and "Warning" not in html
        assert not re.search(r'(?:src|href)="https?:', html)  # reads offline
    assert page == run_dir / "report" / "notebook.html" and page.exists()


def test_text_of_configs_and_models_is_escaped(batch):
    run_dir, _ = batch
    for page in run_dir.glob("**/notebook.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text, page
        assert "<bos>" not in text and "<user>" not in text, page
    assert "&lt;script&gt;alert" in (run_dir / "report" / "notebook.html").read_text(encoding="utf-8")


def test_training_saw_each_pair_once_and_moved_beta(batch):
    run_dir, _ = batch
    (data_dir,) = run_dir.glob("data-*")
    ids = sorted(load_prepared(data_dir).train["pair_id"])
    for name in ("dpo", "epsilon_dpo_bf16"):
        steps, pairs = read_steps(run_dir / name / "train"), read_pairs(run_dir / name / "train")
        assert sorted(pairs["pair_id"]) == ids and len(ids) == 3840
        assert len(steps) == 120
    dpo, epsilon = (read_steps(run_dir / name / "train") for name in ("dpo", "epsilon_dpo_bf16"))
    assert set(dpo["beta_after"]) == {0.3}
    assert dpo["relaxed"].max() > 0  # the criterion is recorded for DPO too
    assert epsilon["beta_after"].nunique() > 1


def test_both_methods_beat_the_model_they_started_from(batch):
    """The world is learnable: the 95 % intervals of both win rates lie above 50 %."""
    run_dir, _ = batch
    for run in collect(run_dir)[0]:
        assert run.evaluation["n_scored"] == 512
        assert run.evaluation["win_rate_low"] > 50.0, run.experiment.name
        assert run.evaluation["policy_correct"] > run.evaluation["reference_correct"]


def test_figures_stand_beside_their_numbers(batch):
    run_dir, _ = batch
    pictures = list(run_dir.glob("**/*.png"))
    assert len(pictures) >= 1 + 2 * (1 + 6 + 3) + 5
    for picture in pictures:
        assert len(pd.read_csv(picture.with_suffix(".csv"))) > 0, picture
        assert picture.with_suffix(".pdf").exists() and picture.with_suffix(".txt").read_text(encoding="utf-8")
    for folder in run_dir.glob("*/trajectory"):
        steps = [pd.read_csv(folder / f"{name}.csv") for name in ("beta", "training")]
        pd.testing.assert_frame_equal(*steps)
        assert len(pd.read_csv(folder / "beta_steps.csv")) > 0 and (folder / "beta_steps.html").exists()
        # Its own page and the report say the same of a run, over the same prompts.
        apart, joined = pd.read_csv(folder / "apart.csv"), pd.read_csv(run_dir / "report" / "apart.csv")
        title = load_experiment(folder.parent / "experiment.yaml").title
        pd.testing.assert_frame_equal(joined[joined["run"] == title].drop(columns="run").reset_index(drop=True), apart)


def test_report_joins_what_the_stages_wrote(batch):
    run_dir, page = batch
    runs, unfinished = collect(run_dir)
    assert [run.experiment.method for run in runs] == ["dpo", "epsilon_dpo"] and not unfinished
    text = page.read_text(encoding="utf-8")
    for run in runs:
        assert f"{run.evaluation['win_rate']:.1f} [{run.evaluation['win_rate_low']:.1f}" in text
        responses = pd.read_parquet(run.directory / "evaluate" / "responses.parquet")
        assert responses["preference"].mean() - 1 == pytest.approx(run.evaluation["win_rate"] / 100)
        rewards = [gold_score(row.instruction, row.policy_response) for row in responses.itertuples()]
        assert rewards == pytest.approx(responses["policy_gold"].tolist())
    gain = head_to_head(runs).iloc[0]
    assert gain["difference"] == pytest.approx(runs[1].evaluation["win_rate"] - runs[0].evaluation["win_rate"])
    for link in re.findall(r'href="(\.\./[^"]+)"', text):
        assert (page.parent / link).exists(), link


def test_these_are_the_published_runs(batch, capsys):
    """On a processor of another kind, which makes its own world, within wider intervals. Titles are no matter."""
    run_dir, page = batch
    assert main(["verify", str(run_dir), "--against", str(DEMO / "gold")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith((SAME_BITS, WITHIN))
    marks = json.loads((page.parent / VERDICTS).read_text(encoding="utf-8"))
    assert list(marks) == list(RUNS) and set(marks.values()) <= {SAME_BITS, WITHIN}
    assert 'id="The-published-run"' in page.read_text(encoding="utf-8")
    index = (run_dir / "index.html").read_text(encoding="utf-8")
    for says in marks.values():
        assert f'<a class="interval" href="report/notebook.html#The-published-run">{says}</a>' in index


def test_links_work_from_a_page_anywhere(batch, tmp_path, monkeypatch):
    """05_report opened in JupyterLab writes elsewhere, by a relative path."""
    run_dir, _ = batch
    monkeypatch.chdir(tmp_path)
    links = re.findall(r'href="([^"]+)"', links_table(collect(run_dir)[0], "pages/report"))
    assert len(links) == 6
    for link in links:
        assert Path("pages/report", link).resolve() == (tmp_path / "pages" / "report" / link).resolve()
        assert (tmp_path / "pages" / "report" / link).resolve().is_relative_to(run_dir)


def test_unfinished_experiment_is_named_not_dropped(batch, tmp_path):
    run_dir, _ = batch
    for name in ("dpo", "epsilon_dpo_bf16"):
        (tmp_path / name).symlink_to(run_dir / name)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "experiment.yaml").write_text((run_dir / "dpo" / "experiment.yaml").read_text(encoding="utf-8"))
    runs, unfinished = collect(tmp_path)
    assert len(runs) == 2 and unfinished == ["killed"]


def test_precision_study_of_a_batch(batch, tmp_path):
    """Its three sentences, its figures and, of what this batch cannot show, that it says so."""
    run_dir, _ = batch
    reference_dir = str(OFFICIAL.parent)
    manifest = run_stage("precision", {"run_dir": str(run_dir), "reference_dir": reference_dir}, tmp_path / "precision")
    text = manifest.with_name("notebook.html").read_text(encoding="utf-8")
    assert "Warning" not in text and "<script>alert" not in text
    assert "it holds no two ε-DPO runs that differ" in text
    assert "DeepSpeed ZeRO-3, bf16 (published)" in text and "89% [81, 93]" in text
    pictures = {path.stem for path in manifest.parent.glob("*.png")}
    assert pictures == {"chances", "shares_by_epsilon", "shares_by_length", "table_5"}
    shares = pd.read_csv(manifest.with_name("shares_by_epsilon.csv"))
    of_batch = shares[shares["what"].str.startswith("this folder") & (shares["decision"] == "tied")]
    ties = of_batch.pivot(index="epsilon", columns="arithmetic", values="share")
    assert (ties["float32"] < 0.05).all() and ties.loc[0.005, "bfloat16"] > 0.2
    coarse = shares[shares["arithmetic"] == "sums_rounded"]
    assert (coarse["share"] - coarse["predicted"]).abs().max() < 0.08


def test_claims_on_a_batch(batch, tmp_path):
    """Verdicts that follow from the runs, a figure each, and of what was not run, that it was not."""
    run_dir, _ = batch
    claimed = tmp_path / "runs"
    as_two_worlds(run_dir, {"dpo": "dpo", "epsilon_dpo_bf16": "eps"}, claimed)
    manifest = run_stage("claims", {"run_dir": str(claimed)}, claimed / "claims")
    text = manifest.with_name("notebook.html").read_text(encoding="utf-8")
    assert "Traceback" not in text and "Warning" not in text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    verdicts = pd.read_csv(manifest.with_name("verdicts.csv")).set_index("name")
    assert verdicts["verdict"].to_dict() == {
        "wins": "holds",
        "wins_far_more": "does not hold",
        "costs_less": "cannot be told",
    }
    rates = [json.loads((run_dir / name / "evaluate" / "summary.json").read_text())["win_rate"] for name in RUNS]
    assert verdicts.loc["wins", "effect"] == pytest.approx(rates[1])
    assert verdicts.loc["wins_far_more", "effect"] == pytest.approx(rates[1] - rates[0])
    assert verdicts.loc["costs_less", "why"] == "0 of 2 rounds of the benchmark have an effect"
    pictures = sorted(manifest.parent.glob("*.png"))
    assert {path.stem for path in pictures} == {*FIGURES, "bound", "step_cost", "verdicts"}
    for picture in pictures:
        assert picture.with_suffix(".pdf").exists() and picture.with_suffix(".csv").exists()
        intervals = "Intervals are 95%, Student's t over 2 worlds." in picture.with_suffix(".txt").read_text("utf-8")
        assert intervals == (picture.stem not in ("step_cost", "verdicts")), picture
    # The bounds of ε are measured in both precisions and kept.
    kept = sorted(path.relative_to(manifest.parents[1]).as_posix() for path in manifest.parents[1].glob("*/bounds/*"))
    assert kept == [f"eps-seed{world}/bounds/{dtype}.csv" for world in (1, 2) for dtype in ("bfloat16", "float32")]


def test_live_chart_is_redrawn_in_place(batch, tmp_path):
    """02_train as JupyterLab runs it: one picture, which the cell updates while training goes on."""
    run_dir, _ = batch
    (data_dir,) = run_dir.glob("data-*")
    notebook = nbformat.read(NOTEBOOKS / "02_train.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    config = tmp_path / "config.yaml"
    config.write_text((run_dir / "epsilon_dpo_bf16" / "experiment.yaml").read_text(encoding="utf-8"))
    values = {"config": str(config), "overrides": ["train.max_steps=12"], "live": True}
    values |= {"data_dir": str(data_dir), "output_dir": str(tmp_path / "train")}
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=300).execute()
    (cell,) = [cell for cell in notebook.cells if "LiveChart(" in cell.source]
    pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert "Step 12 of 12, done" in pictures[0]["metadata"]["image/png"]["alt"]
    assert not [output for output in cell.outputs if "s/step" in output.get("text", "")]
    assert json.loads((tmp_path / "train" / "steps.jsonl").read_text().splitlines()[-1])["step"] == 12


def test_every_page_has_a_title_and_leads_back(batch):
    """Also the data's, which several experiments share: index and report lead to it."""
    run_dir, report = batch
    pages = [*run_dir.glob("*/notebook.html"), *run_dir.glob("*/*/notebook.html"), *run_dir.glob("*/*/beta_steps.html")]
    titles = [re.search("<title>(.*?)</title>", page.read_text(encoding="utf-8"))[1] for page in pages]
    assert len(pages) == 10 and len(set(titles)) == 10 and "notebook" not in titles
    assert any(title.startswith("DPO &lt;script&gt;") and title.endswith("· train") for title in titles)
    for page in pages:
        (link,) = re.findall(r'<nav><a href="([^"]+)">', page.read_text(encoding="utf-8"))
        assert (page.parent / link).resolve() == (run_dir / "index.html").resolve(), page
    (data,) = run_dir.glob("data-*/notebook.html")
    for page in (run_dir / "index.html", report):
        links = re.findall(r'href="([^"]+)"', page.read_text(encoding="utf-8"))
        assert data.resolve() in [(page.parent / link).resolve() for link in links], page


def test_tables_are_headed_in_words(batch):
    run_dir, _ = batch
    config_keys = {key for experiment in load_experiments(DEMO) for key in experiment.training_arguments()}
    for page in run_dir.glob("**/notebook.html"):
        heads = re.findall(r"<th[^>]*>([^<]*)</th>", page.read_text(encoding="utf-8"))
        heads = {head for head in heads if re.fullmatch("[a-z]+(_[a-z]+)+", head)} - config_keys
        assert heads <= {"count_down", "count_up", "name_sorted"}, page  # tasks of the world, by their names


def test_one_experiment_alone_is_a_batch_of_one(batch):
    """As `epsdpo.train.preferences` leaves it, launched by hand."""
    run_dir, _ = batch
    runs, unfinished = collect(run_dir / "dpo")
    assert [run.directory for run in runs] == [run_dir / "dpo"] and not unfinished
