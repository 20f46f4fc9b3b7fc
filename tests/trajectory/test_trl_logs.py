"""Logs of runs made without this kit: real ones of TRL's trainer, and exports of trackers written by hand."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from trl import DPOConfig, DPOTrainer

from epsdpo.batch.stage import run_stage
from epsdpo.experiment import ConfigError
from epsdpo.methods.beta_dpo import BetaDPOTrainer
from epsdpo.methods.beta_dpo_config import BetaDPOConfig
from epsdpo.methods.record import STEP_COLUMNS, read_steps
from epsdpo.plots.trajectory import beta_trajectory, logged_curves, relative_trajectory
from epsdpo.train.checkpoints import whole_checkpoints
from epsdpo.trajectory.side_by_side import find_runs, sources
from epsdpo.trajectory.summary import WINDOW_COLUMNS, relative_steps, summarise_steps
from epsdpo.trajectory.trl_logs import find_log, read_log


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's own, on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


class DPOTrainerThatLogsBeta(TokenisedDPOTrainer):
    """What a user of TRL adds in order to see β."""

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "beta": self.beta} if "loss" in logs else logs, *args, **kwargs)


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file


def test_trls_own_trainer(make_trainer, tmp_path):
    """Its trainer_state.json, found below its output folder; the rows without β are those of its end."""
    trainer = make_trainer(
        trainer=DPOTrainerThatLogsBeta,
        config=DPOConfig,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        logging_steps=2,
    )
    trainer.train()
    assert find_log(tmp_path / "run") == tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    log = read_log(find_log(tmp_path / "run" / "checkpoint-2"))
    assert log.steps["step"].tolist() == [1.5]
    log = read_log(find_log(tmp_path / "run"))
    logged = trainer.state.log_history
    assert log.steps["step"].tolist() == [1.5, 3.5] and log.steps["last_step"].tolist() == [2, 4]
    assert log.steps["beta_before"].tolist() == [0.1, 0.1]
    assert log.steps["loss"].tolist() == [row["loss"] for row in logged[:2]]
    assert log.steps["reward_margin"].tolist() == [row["rewards/margins"] for row in logged[:2]]
    assert log.steps["relaxed"].isna().all() and (log.left_out, log.repeated) == (0, 0)

    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert read_log(tmp_path / "trainer_state.json").left_out == 1  # the line with the training time


def test_a_log_of_plain_dpo_is_taken_with_its_stated_beta(make_trainer, tmp_path):
    """Without it the refusal says what the log has, and what to state of which run."""
    trainer = make_trainer(trainer=TokenisedDPOTrainer, config=DPOConfig, max_steps=5, logging_steps=2)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    missing = r"no column holds β; looked for kl/beta or beta.*rewards/margins.*β of 'theirs', such as betas=\[0\.1\]"
    with pytest.raises(ConfigError, match=missing):
        find_runs([str(tmp_path)], ["theirs"])
    (run,) = find_runs([str(tmp_path)], ["theirs"], [0.1])
    assert run.steps["beta_before"].tolist() == run.steps["beta_after"].tolist() == [0.1] * 3
    assert run.steps["step"].tolist() == [1.5, 3.5, 5.0]  # the last is the line with the training time
    logged = trainer.state.log_history
    assert run.steps["reward_margin"].tolist() == [row["rewards/margins"] for row in logged]
    assert run.steps["loss"].tolist()[:2] == [row["loss"] for row in logged[:2]] and math.isnan(run.steps["loss"][2])
    assert relative_steps(run.steps)["beta_ratio"].tolist() == [1.0] * 3
    assert relative_steps(run.steps)["share_of_run"].tolist() == [0.125, 0.625, 1.0]


@pytest.mark.parametrize(
    ("logging", "windows"),
    [
        ({"logging_steps": 1}, [(step, step) for step in range(1, 9)]),
        ({"logging_steps": 3}, [(1, 3), (4, 6), (7, 8)]),
        ({"logging_steps": 5}, [(1, 5), (6, 8)]),
        ({"logging_steps": 3, "logging_first_step": True}, [(1, 1), (2, 3), (4, 6), (7, 8)]),
        ({"logging_steps": 0.25}, [(1, 2), (3, 4), (5, 6), (7, 8)]),
        ({"logging_strategy": "epoch"}, [(1, 3), (4, 6), (7, 8)]),
    ],
)
def test_one_run_as_folder_and_as_log_is_one_curve(make_trainer, official_pairs, tmp_path, logging, windows):
    """Each row of the log is the mean of the record over its steps, at their middle, over the β of the config."""
    trainer = make_trainer(pairs=official_pairs.select(range(12)), max_steps=8, epsilon=0.3, **logging)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    folder, log = find_runs([str(tmp_path / "run"), str(tmp_path / "trainer_state.json")])
    assert log.steps[["first_step", "last_step"]].to_numpy().tolist() == [list(window) for window in windows]
    assert log.steps["step"].tolist() == [sum(window) / 2 for window in windows]
    record, drawn = relative_steps(folder.steps), relative_steps(log.steps)
    assert record["beta_ratio"].min() < 0.9  # it moves
    means = pd.DataFrame([record[record["step"].between(*window)].mean() for window in windows])
    exact = (
        "beta_before",
        "beta_ratio",
        "share_of_run",
        "relaxed",
        "tied",
        "tightened",
        "mean_step",
        "reward_accuracy",
    )
    for column in (*exact, "loss", "reward_margin"):
        there = drawn[column].notna()
        assert there.sum() >= len(windows) - (column == "loss")  # of the last, shorter window no loss is logged
        bound = {"rtol": 1e-9, "atol": 1e-12} if column in exact else {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(drawn[column][there], means[column][there], err_msg=column, **bound)
    np.testing.assert_allclose(drawn["epoch"], np.interp(drawn["step"], record["step"], record["epoch"]))
    (figure,) = relative_trajectory({"log": drawn}, {"log": "other"}, "title").axes
    np.testing.assert_array_equal(figure.lines[0].get_xydata(), drawn[["share_of_run", "beta_ratio"]])
    by_steps, by_log = summarise_steps(folder.steps), summarise_steps(log.steps)
    for name in ("last_step", "beta_initial", "relaxed", "tied", "tightened", "mean_step"):
        assert by_log[name] == pytest.approx(by_steps[name], rel=1e-9), name


def test_beta_dpo_logs_what_it_records(make_trainer, tmp_path):
    """β of each batch, and accuracies of the pairs that are in the loss, whatever is left out."""
    trainer = make_trainer(trainer=BetaDPOTrainer, config=BetaDPOConfig, max_steps=6, keep_ratio=0.5, logging_steps=2)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    record, log = read_steps(tmp_path / "run"), read_log(tmp_path / "trainer_state.json").steps
    means = record.groupby((record["step"] - 1) // 2).mean()
    for column in ("beta_before", "reward_accuracy", "mean_step"):
        np.testing.assert_allclose(log[column], means[column], rtol=1e-9, err_msg=column)
    assert log["beta_initial"].tolist() == [0.1] * 3


def test_a_checkpoint_says_the_beta_that_its_run_began_with(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5, epsilon=0.3, logging_steps=2, save_strategy="steps", save_steps=3)
    trainer.train()
    (folder,) = find_runs([str(tmp_path / "run")])
    for step in (3, 5):
        (log,) = find_runs([str(tmp_path / "run" / f"checkpoint-{step}")])
        assert log.steps["beta_initial"].unique().tolist() == [0.1] and log.steps["total_steps"].iloc[0] == step
        middle = folder.steps["beta_before"][:2].mean() / 0.1
        assert relative_steps(log.steps)["beta_ratio"].iloc[0] == pytest.approx(middle, rel=1e-9)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    (log,) = find_runs([str(tmp_path / "trainer_state.json")])
    assert log.steps["last_step"].tolist() == [2, 4, 5] and log.steps["beta_initial"].iloc[0] == 0.1


def test_the_beta_of_the_config_where_a_log_does_not_say_it(write):
    """Of a mean over several steps nobody knows what β was before; a β that stayed, or a first step alone, says it."""
    moving = write("moving.csv", "step,kl/beta\n10,0.08\n20,0.06\n30,0.04\n")
    stayed = write("stayed.csv", "step,kl/beta\n10,0.08\n20,0.08\n")
    first = write("first.csv", "step,kl/beta\n1,0.1\n10,0.08\n")
    unknown, known, one = find_runs([str(moving), str(stayed), str(first)])
    assert relative_steps(unknown.steps)["beta_ratio"].isna().all()
    assert relative_steps(known.steps)["beta_ratio"].tolist() == [1.0, 1.0]
    assert relative_steps(one.steps)["beta_ratio"].tolist() == pytest.approx([1.0, 0.8])
    assert sources([unknown, known])["β of its config"].tolist() == ["not known", "0.08"]
    assert sources([unknown, one])["steps per row"].tolist() == ["10", "1 to 9"]
    frames = {"moving": relative_steps(unknown.steps), "stayed": relative_steps(known.steps)}
    (axes,) = relative_trajectory(frames, {"moving": "other", "stayed": "other"}, "title").axes
    assert [line.get_label() for line in axes.lines] == ["stayed"]
    assert axes.texts[0].get_text() == "β of the config not known: moving"
    relative_trajectory({"moving": frames["moving"]}, {"moving": "other"}, "title")
    (stated,) = find_runs([str(moving)], betas=[0.1])
    assert relative_steps(stated.steps)["beta_ratio"].tolist() == pytest.approx([0.8, 0.6, 0.4])
    assert relative_steps(stated.steps)["share_of_run"].tolist() == pytest.approx([4.5 / 29, 14.5 / 29, 24.5 / 29])
    for path, betas, message in (
        (stayed, [0.1], r"stayed\.csv: its β is stated as 0\.1, and its log says 0\.08"),
        (moving, [0.1, 0.1], "2 betas for 1 runs; give one for each of: moving"),
        (moving, ["0.1"], "moving has '0.1', which is no β"),
        (moving, [-1.0], "moving has -1.0, which is no β"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_runs([str(path)], betas=betas)


def test_the_record_of_a_run_knows_its_beta_and_means_count_by_their_steps(make_trainer, write, tmp_path):
    make_trainer(max_steps=2).train()
    with pytest.raises(ConfigError, match=r"run has 0\.2, and its own record says 0\.1; leave it out"):
        find_runs([str(tmp_path / "run")], betas=[0.2])
    log = read_log(write("a.csv", "step,kl/beta,kl/avg_steps\n3,0.1,1.0\n4,0.1,0.0\n"), beta=0.1)
    assert summarise_steps(log.steps)["mean_step"] == pytest.approx(0.5)  # the table may begin at step 3
    state = write(
        "trainer_state.json",
        json.dumps(
            {
                "log_history": [
                    {"step": 3, "kl/beta": 0.1, "kl/avg_steps": 1.0},
                    {"step": 4, "kl/beta": 0.1, "kl/avg_steps": 0.0},
                ]
            }
        ),
    )
    assert summarise_steps(read_log(state).steps)["mean_step"] == pytest.approx(0.75)


def test_the_log_of_epsilon_dpo_is_its_record(make_trainer, tmp_path):
    """Read twice: as the record of this kit, and from what the trainer logged, as the released code does."""
    trainer = make_trainer(max_steps=6, epsilon=0.2)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    record, log = read_steps(tmp_path / "run"), read_log(tmp_path / "trainer_state.json").steps
    for column in ("step", "beta_before", "relaxed", "tied", "tightened", "mean_step", "loss", "reward_margin"):
        np.testing.assert_allclose(log[column], record[column], rtol=1e-4, atol=1e-5, err_msg=column)
    np.testing.assert_allclose(log["beta_after"][:5], record["beta_after"][:5], rtol=1e-6)
    assert math.isnan(log["beta_after"][5])  # the log ends before that update shows
    assert summarise_steps(log)["beta_first"] == pytest.approx(summarise_steps(record)["beta_first"], rel=1e-6)


def test_an_export_of_a_tracker_by_hand(write):
    """Evaluation rows, a resumed run, steps out of order and left out, numbers as strings, and NaN."""
    path = write(
        "wandb.csv",
        "_step,train/global_step,train/kl/beta,train/kl/p_epsilon_steps,train/kl/n_epsilon_steps,train/loss,eval/loss\n"
        "0,10,0.1,0.75,0.25,0.69,\n"
        "1,20,0.09,0.5,0.25,0.68,\n"
        "2,20,,,,,0.7\n"
        "3,30,0.5,1.0,0.0,0.1,NaN\n"
        "4,21,0.08,0.25,0.5,NaN,\n"
        '5,30,"0.07",,,0.66,\n',
    )
    log = read_log(path)
    assert (log.left_out, log.repeated) == (1, 1)
    steps = log.steps
    assert list(steps.columns) == [*STEP_COLUMNS, *WINDOW_COLUMNS]
    assert steps["first_step"].tolist() == [1, 11, 21, 22] and steps["last_step"].tolist() == [10, 20, 21, 30]
    assert steps["step"].tolist() == [5.5, 15.5, 21, 26]
    assert steps["beta_before"].tolist() == [0.1, 0.09, 0.08, 0.07]
    assert steps["beta_after"].fillna(-1).tolist() == [-1, 0.08, -1, -1]  # only 21 follows on 20
    assert steps["tied"].fillna(-1).tolist() == [0.0, 0.25, 0.25, -1]
    assert steps["mean_step"].fillna(-9).tolist() == [0.5, 0.25, -0.25, -9]
    assert steps["loss"].fillna(-1).tolist() == [0.69, 0.68, -1, 0.66]
    summary = summarise_steps(steps)
    assert (summary["rows"], summary["last_step"], summary["beta_last"]) == (4, 30, 0.07)
    assert summary["mean_step"] == pytest.approx((10 * 0.5 + 10 * 0.25 - 0.25) / 21)  # the last row has none
    relative = relative_steps(read_log(path, beta=0.125).steps)
    assert relative["share_of_run"].tolist() == [4.5 / 29, 0.5, 20 / 29, 25 / 29]
    assert relative["beta_ratio"].tolist() == pytest.approx([0.8, 0.72, 0.64, 0.56])


def test_a_log_of_nothing_from_training_is_refused_with_any_beta(write):
    path = write("eval.csv", "step,eval_loss\n10,0.7\n")
    with pytest.raises(ConfigError, match="no row holds a loss, or what else is logged in training"):
        read_log(path, beta=0.1)


def test_a_table_that_begins_in_the_middle_of_a_run(write):
    """Its first row is no mean over all the steps before."""
    steps = read_log(write("later.csv", "step,kl/beta\n100,0.1\n110,0.09\n115,0.08\n"), beta=0.2).steps
    assert steps["first_step"].tolist() == [91, 101, 111] and steps["step"].tolist() == [95.5, 105.5, 113]
    assert relative_steps(steps)["share_of_run"].tolist() == [4.5 / 24, 14.5 / 24, 22 / 24]


def test_a_chart_exported_by_its_run_name(write):
    path = write("chart.csv", '"Step","a - b - kl/beta","a - b - kl/beta__MIN","a - b - kl/beta__MAX"\n1,0.1,0.1,0.1\n')
    assert read_log(path).steps["beta_before"].tolist() == [0.1]
    two = write("two.csv", '"Step","a - kl/beta","b - kl/beta"\n1,0.1,0.2\n')
    with pytest.raises(ConfigError, match=r"β of several runs \('b - kl/beta' is the second\)"):
        read_log(two)


def test_the_best_checkpoint_does_not_stand_in_for_the_latest(write, tmp_path):
    for name in ("checkpoint-best", "checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
        write(f"{name}/trainer_state.json", '{"log_history": [{"step": 1, "beta": 0.1}], "global_step": 1}')
    assert find_log(tmp_path).parent.name == "checkpoint-10"
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.rmtree(tmp_path / name)
    assert find_log(tmp_path).parent.name == "checkpoint-best"
    assert whole_checkpoints(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "run,step,beta\none,1,0.1\none,2,0.09\ntwo,3,0.2\n",
            "line 4: the rows are of several runs, 'one' and",
        ),
        (
            "a.csv",
            "Name,train/global_step,beta\na,5,0.1\nb,5,0.1\n",
            "several runs, 'a' and 'b'. Give a file for each run",
        ),
        ("a.jsonl", '{"run_id": 1, "step": 1, "beta": 1}\n{"run_id": 2, "step": 2, "beta": 1}', "'1' and '2'"),
        (
            "a.csv",
            "step,beta\n10,0.1\n20,0.09\n10,0.2\n20,0.1\n",
            r"line 4: step falls back to 10, .*\(at 10\): several runs",
        ),
        ("a.csv", "step,beta\n10,0.1\n20,0.09\n5,0.2\n", "step falls back to 5"),
        ("a.csv", "step,beta\n20,0.1\n10,0.1\n20,0.2\n10,0.2\n", "step falls back|begins"),
    ],
)
def test_runs_that_are_stacked_in_one_file_are_asked_for_apart(write, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_log(write(name, text))


def test_one_run_resumed_or_newest_first_is_no_stack(write):
    assert read_log(write("a.csv", "run,step,beta\nx,3,1\nx,2,2\nx,1,3\n")).steps["step"].tolist() == [1, 2, 3]
    assert read_log(write("b.csv", "step,beta\n1,1\n1,2\n2,3\n3,4\n2,5\n")).repeated == 2


def test_lines_of_json(write):
    rows = [{"step": 1, "beta": 0.1, "loss": "0.5"}, {"step": 1, "eval_loss": 0.6}, {"step": 2, "beta": "NaN"}]
    path = write("log.jsonl", "\n".join([*map(json.dumps, rows), '{"step": 3, "beta": 0.05, "loss": NaN}', ""]))
    log = read_log(path)
    assert log.steps["last_step"].tolist() == [1, 3] and log.left_out == 2
    assert log.steps["loss"].iloc[0] == 0.5 and math.isnan(log.steps["loss"].iloc[1])
    assert read_log(write("log.json", json.dumps(rows))).steps["step"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "step,beta\n1,0.1\n2,high\n", r"a\.csv, line 3: beta is 'high', which is no number"),
        ("a.csv", "step,beta\n1,0.1\n,0.1\n", r"a\.csv, line 3: β was logged without a whole optimiser step"),
        ("a.csv", "epoch,beta\n1,0.1\n", r"no column holds the optimiser step; looked for global_step or step"),
        ("a.csv", "step,beta\n1,\n", "no row holds a value of beta"),
        ("a.csv", "", "no column holds β.*found none"),
        ("a.jsonl", '{"step": 1, "beta": 0.1}\n{"step": 2, "be', r"a\.jsonl, line 2: is no JSON.*half written"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: is list, and not a row"),
        ("a.json", '{"loss": 1}', "holds neither log_history nor a list of rows"),
        ("a.tfevents", "", "no log that is known here"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_and_line(write, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_log(write(name, text))


def test_runs_of_any_origin_side_by_side(write, tmp_path):
    log = write("theirs.csv", "step,beta\n10,0.2\n20,0.1\n")
    other = write("again.jsonl", '{"step": 1, "beta": 0.1}\n')
    runs = find_runs([str(log), str(other)])
    assert [(run.title, run.family) for run in runs] == [("theirs", "other"), ("again", "other")]
    assert [run.title for run in find_runs([str(log), str(log)], ["one", "two"])] == ["one", "two"]
    for paths, titles, message in (
        ([str(log), str(log)], [], "several runs are called theirs"),
        ([str(log)], ["one", "two"], "2 titles for 1 runs; give one for each of: theirs"),
        ([], [], "no runs to compare"),
        ([str(tmp_path)], [], "holds no run"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_runs(paths, titles)


def test_rows_that_were_not_logged_each_step_all_have_markers():
    often = pd.DataFrame({"step": range(1, 121), "beta_before": 0.1})
    seldom = pd.DataFrame({"step": range(10, 121, 10), "beta_before": 0.2})
    figure = beta_trajectory({"a": often, "b": seldom}, {"a": "dpo", "b": "other"}, "title")
    marked = {line.get_label(): line.get_markevery() for line in figure.axes[0].lines}
    assert marked["a"][1] == 10 and marked["b"] == (0, 1)


def test_a_log_of_nothing_but_beta_is_drawn_as_far_as_it_goes(write):
    """Alone and beside a log that has a loss; nothing fails, and each panel says what it lacks."""
    bare, fuller = (
        read_log(write(name, text)).steps
        for name, text in (("bare.csv", "step,beta\n1,0.1\n"), ("fuller.csv", "step,beta,loss\n1,0.1,0.5\n"))
    )
    alone = logged_curves({"bare": bare}, {"bare": "other"})
    assert [axes.texts[0].get_text() for axes in alone.axes] == ["not defined for bare"] * 3
    loss, margin, _ = logged_curves({"bare": bare, "fuller": fuller}, {"bare": "other", "fuller": "dpo"}).axes
    assert loss.texts[0].get_text() == "not defined for bare" and len(loss.lines) == 2 and not margin.lines


def test_levels_that_lie_far_apart_are_drawn_on_a_logarithmic_axis():
    steps = {name: pd.DataFrame({"step": [1, 2], "beta_before": beta}) for name, beta in (("a", 0.1), ("b", 2.5))}
    families = {"a": "dpo", "b": "simpo"}
    (axes,) = beta_trajectory(steps, families, "title").axes
    assert axes.get_yscale() == "log" and 0.01 < axes.get_ylim()[0] < 0.1
    (axes,) = beta_trajectory({"a": steps["a"]}, {"a": "dpo"}, "title").axes
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0.0


def test_the_stage_compares_a_run_of_this_kit_with_a_log(make_trainer, write, tmp_path):
    make_trainer(max_steps=4, epsilon=0.2).train()
    log = write("theirs <b>.csv", "step,kl/beta,kl/avg_steps,loss\n2,0.1,0.5,0.7\n4,0.08,0.5,0.6\n")
    plain = write("plain.csv", "step,loss\n2,0.7\n4,0.6\n")
    output = tmp_path / "compare"
    runs = [str(tmp_path / "run"), str(log), str(plain)]
    run_stage("compare", {"runs": runs, "betas": [None, None, 0.2], "publication": True}, output)
    pdfs = {path.name for path in output.glob("*.pdf")}
    assert pdfs == {"beta.pdf", "beta_relative.pdf", "training.pdf", "apart.pdf"}
    assert set(pd.read_csv(output / "apart.csv")["run"]) == {"run"}  # the logs have no rewards of either side
    summary = pd.read_csv(output / "summary.csv").set_index("run")
    assert summary.loc["theirs <b>", ["rows", "beta_first", "beta_last", "mean_step"]].tolist() == [2, 0.1, 0.08, 0.5]
    assert summary.loc["run", "rows"] == 4 and summary.loc["plain", "beta_initial"] == 0.2
    relative = pd.read_csv(output / "beta_relative.csv").set_index("run")
    assert relative.loc["plain", "beta_ratio"].tolist() == [1.0, 1.0]
    assert relative.loc["plain", "step"].tolist() == [1.5, 3.5]
    caption = (output / "beta_relative.txt").read_text(encoding="utf-8")
    assert "Left out, since nothing says the β of their config: theirs <b>." in caption
    page = (output / "notebook.html").read_text(encoding="utf-8")
    assert "theirs &lt;b&gt;" in page and "theirs <b>" not in page
    inputs = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["inputs"]
    assert str(log) in inputs
