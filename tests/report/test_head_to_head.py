"""Runs beside each other: which may be compared, what the difference is, and seeds joined; on files written by hand."""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from kit.claim_runs import write_run

from epsdpo.batch.index import write_index
from epsdpo.batch.progress import PLAN
from epsdpo.evaluation.scores.annotations import write_annotations
from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, check_experiment, load_saved, save_experiment
from epsdpo.methods.record import STEPS_FILE
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.paper.claims.run_table import measure_runs
from epsdpo.report.collect import collect, results_table
from epsdpo.report.head_to_head import head_to_head, seeds_joined
from epsdpo.report.shown import headline, overview
from epsdpo.trajectory.side_by_side import find_runs


@dataclass
class Evaluated:
    directory: Path
    experiment: object
    evaluation: dict | None


@pytest.fixture
def evaluated(tmp_path):
    """A function that writes an evaluation as the stage does, and returns its run."""

    def write(name, preferences, opponents="abcd", judge="judge (chat)", epsilon=0.01, seed=1):
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        instructions = [f"do {letter}" for letter in "wxyz"[: len(preferences)]]
        table = {"instruction": instructions, "reference_response": list(opponents), "preference": preferences}
        table = pd.DataFrame(table | {"prompt_id": instructions})
        table.to_parquet(folder / "responses.parquet")
        rows = [
            {
                "instruction": row.instruction,
                "output_1": row.reference_response,
                "generator_1": "reference",
                "output_2": "out",
                "generator_2": name,
                "annotator": "judge",
                "preference": row.preference,
            }
            for row in table.itertuples()
        ]
        write_annotations(folder / "annotations.json", rows)
        values = {"name": name, "method": "epsilon_dpo", "seed": seed, "train": {"epsilon": epsilon}}
        experiment = check_experiment(values, where="test")
        return Evaluated(folder.parent, experiment, {"win_rate": 0.0, "judge": judge, "against": "reference"})

    return write


def test_head_to_head_by_hand(evaluated):
    runs = [evaluated("a", [1.2, 1.4, 1.5, 2.0]), evaluated("b", [1.3, 1.4, 1.2, None])]
    (row,) = head_to_head(runs).to_dict("records")
    assert (row["title"], row["baseline"], row["prompts"]) == ("b", "a", 3)
    assert row["difference"] == pytest.approx(100.0 * (0.1 + 0.0 - 0.3) / 3.0)
    assert row["better_share"] == pytest.approx(100.0 * 1.5 / 3.0)
    assert row["low"] <= row["difference"] <= row["high"]


def test_only_runs_with_one_judge_and_the_same_opponents_are_compared(evaluated):
    runs = [
        evaluated("a", [1.2, 1.4, 1.5, 2.0]),
        evaluated("other_judge", [1.2, 1.4, 1.5, 2.0], judge="another (chat)"),
        evaluated("other_draw", [1.2, 1.4, 1.5, 2.0], opponents="aXYZ"),
        evaluated("partly", [1.2, 1.4, 1.5, 2.0], opponents="abYZ"),
    ]
    runs.append(Evaluated(runs[0].directory, runs[0].experiment, {"judge": None}))
    runs.append(Evaluated(runs[0].directory, runs[0].experiment, None))
    # "partly" was shown the first two opponents of "a", and three of "other_draw".
    pairs = {(row["baseline"], row["title"], row["prompts"]) for row in head_to_head(runs).to_dict("records")}
    assert pairs == {("a", "partly", 2), ("other_draw", "partly", 3)}


def test_seeds_of_one_recipe_are_joined_whatever_the_reference_said(evaluated):
    runs = [
        evaluated("a1", [1.2, 1.4, 1.6, 1.8], seed=1),
        evaluated("a2", [1.4, 1.6, 1.8, 2.0], opponents=["other", "draws", "of", "it"], seed=2),
        evaluated("b1", [1.0, 1.0, 1.0, 1.0], epsilon=0.02, seed=1),
    ]
    (row,) = seeds_joined(runs).to_dict("records")
    assert (row["runs"], row["seeds"], row["prompts"]) == ("a1, a2", "1, 2", 4)
    assert row["win_rate"] == pytest.approx(60.0)
    assert row["deviation"] == pytest.approx(20.0 / 2.0**0.5)
    assert row["low"] < 50.0 and row["high"] > 70.0  # wider than the two rates
    assert seeds_joined(runs[1:]).empty
    again = evaluated("a1_again", [1.2, 1.4, 1.6, 1.8], seed=1)
    assert seeds_joined([runs[0], again]).empty  # one seed twice says nothing of others
    (row,) = seeds_joined([*runs[:2], again]).to_dict("records")
    assert row["seeds"] == "1, 2"


def write_trained(batch, name, title, betas, method="dpo", **train):
    """A finished training whose β takes these values after its steps, beginning at the first."""
    folder = batch / name
    record = BetaRecord(folder / "train")
    record.rewind(0)
    for step, (before, after) in enumerate(itertools.pairwise(betas), start=1):
        row = {"step": step, "beta_before": before, "beta_after": after, "loss": 0.7}
        record.append(row | {"pairs_seen": step, "seconds": 1.0})
    record.close()
    (folder / "train" / "manifest.json").write_text('{"key": "train"}', encoding="utf-8")
    experiment = check_experiment({"name": name, "title": title, "method": method, "train": train}, where="test")
    save_experiment(experiment, folder / "experiment.yaml")


def test_runs_of_one_title_keep_their_own_lines(tmp_path):
    """Of two batches in one folder, say: tables and figures go by title, and would lose one."""
    write_trained(tmp_path, "first", "DPO", [0.1, 0.1])
    write_trained(tmp_path, "second", "DPO", [0.3, 0.3])
    write_trained(tmp_path, "third", "IPO", [0.3, 0.3], method="ipo")
    (tmp_path / "first" / "evaluate").mkdir()
    summary = {"title": "DPO", "win_rate": 55.0}  # as it was when this was evaluated
    (tmp_path / "first" / "evaluate" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    runs, _ = collect(tmp_path)
    assert [run.experiment.title for run in runs] == ["DPO (first)", "DPO (second)", "IPO"]
    assert results_table(runs)["title"].tolist() == ["DPO (first)", "DPO (second)", "IPO"]


def test_beta_that_comes_back_did_not_stay(tmp_path):
    write_trained(tmp_path, "a", "moved", [0.1, 0.05, 0.2, 0.1], method="epsilon_dpo")
    write_trained(tmp_path, "b", "kept", [0.1, 0.1])
    write_trained(tmp_path, "c", "fell", [0.1, 0.05], method="epsilon_dpo")
    text = headline(collect(tmp_path)[0])
    assert "<b>moved</b>: β went from 0.1 to 0.1 by way of 0.05 and 0.2." in text
    assert "<b>kept</b>: β stayed at 0.1." in text and "<b>fell</b>: β went from 0.1 to 0.05." in text


def test_settings_that_a_config_leaves_to_the_trainer_are_shown(tmp_path):
    """A dash says that a method does not have them."""
    write_trained(tmp_path, "eps", "eps", [0.1, 0.1], method="epsilon_dpo")
    write_trained(tmp_path, "stated", "stated", [0.1, 0.1], "epsilon_dpo", epsilon=0.02, criterion_dtype="bfloat16")
    write_trained(tmp_path, "simpo", "simpo", [0.1, 0.1], method="simpo")
    record = BetaRecord(tmp_path / "stated" / "train")  # the others' are of before this was recorded
    record.criterion = {"arithmetic": "bfloat16", "released_launch": "bfloat16_logits"}
    record.announce(total_steps=1)
    record.close()
    table = overview(results_table(collect(tmp_path)[0]))
    released = table.loc[["eps", "stated", "simpo"], "released code under this launch"]
    assert released.tolist() == ["–", "bfloat16 logits", "–"]
    assert table.loc[["eps", "stated", "simpo"], "ε"].tolist() == ["0.01", "0.02", "–"]
    assert table.loc[["eps", "stated", "simpo"], "criterion"].tolist() == ["exact", "all bfloat16", "–"]


def test_a_report_begins_with_what_its_runs_owe_to_quantised_weights(tmp_path):
    write_trained(tmp_path, "a", "whole", [0.1, 0.1])
    write_trained(tmp_path, "b", "cut <down>", [0.1, 0.1])
    assert "dequantised" not in headline(collect(tmp_path)[0])
    facts = {"file": "a&b.gguf", "content": "sha256:0", "weights": "4-bit weights (Q4_1 100 %), dequantised"}
    manifest = {"key": "train", "gguf": {"model.name_or_path": facts}}
    (tmp_path / "b" / "train" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert headline(collect(tmp_path)[0]).startswith(
        "<p>model.name_or_path is a&amp;b.gguf, 4-bit weights (Q4_1 100 %), dequantised: cut &lt;down&gt;.</p>"
    )


def test_the_index_counts_what_was_not_judged_beside_the_rate(tmp_path):
    folder = tmp_path / "run" / "evaluate"
    folder.mkdir(parents=True)
    experiment = check_experiment({"name": "run", "method": "dpo", "train": {}, "evaluate": {}}, where="test")
    save_experiment(experiment, folder.parent / "experiment.yaml")
    (folder / "manifest.json").write_text("{}")
    (tmp_path / PLAN).parent.mkdir()
    (tmp_path / PLAN).write_text('{"stages": {}}')
    rates = {"win_rate": 61.0, "win_rate_low": 55.0, "win_rate_high": 66.0, "n_total": 512}
    for failed, shown in ((3, True), (0, False)):
        (folder / "summary.json").write_text(json.dumps(rates | {"n_failed": failed}))
        page = write_index(tmp_path).read_text(encoding="utf-8")
        assert "61.0" in page and ("3 of 512 not judged" in page) == shown


def test_the_index_says_that_no_judge_was_asked_for(tmp_path):
    values = {"name": "run", "method": "epsilon_dpo", "train": {}, "evaluate": {"judge": None}}
    (tmp_path / "run").mkdir()
    save_experiment(check_experiment(values, where="test"), tmp_path / "run" / "experiment.yaml")
    (tmp_path / PLAN).parent.mkdir()
    (tmp_path / PLAN).write_text('{"stages": {}}')
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert "no judge asked for" in page and '<td class="number" data-head="ε">0.01</td>' in page


def test_a_record_that_was_begun_anew_is_marked_in_report_index_and_comparison(tmp_path):
    folder = write_run(tmp_path, "eps", 1, decide=lambda step: (1, -1))
    (folder / "evaluate" / "summary.json").unlink()
    record = BetaRecord(folder / "train")
    (tmp_path / PLAN).parent.mkdir()
    (tmp_path / PLAN).write_text('{"stages": {}}')
    problem = "INCOMPLETE: the record begins at step 13"

    def shown():
        runs, _ = collect(tmp_path)
        (compared,) = find_runs([str(folder)])
        texts = (headline(runs), write_index(tmp_path).read_text(encoding="utf-8"), compared.left_out)
        return [problem in text for text in texts]

    record.rewind(40)
    record.announce(40)
    assert shown() == [False, False, False]
    last_rows = (folder / "train" / STEPS_FILE).read_bytes().splitlines(keepends=True)[12:]
    (folder / "train" / STEPS_FILE).write_bytes(b"".join(last_rows))
    record.rewind(40)
    record.announce(40)
    assert shown() == [True, True, True]
    with pytest.raises(ConfigError, match=f"eps-seed1/train: {problem}.*train it again"):
        measure_runs({folder.name: (folder, load_saved(folder / EXPERIMENT_FILE))}, print)
    (folder / "train" / STEPS_FILE).write_bytes(b"\0\n")
    assert "–" in write_index(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["epsdpo.batch.index", "epsdpo.report.collect", "epsdpo.report.shown"])
def test_what_shows_finished_runs_loads_no_torch(module):
    """The index is written again whenever a stage begins or ends, and a report depends on no trainer."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
