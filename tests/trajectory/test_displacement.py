"""Chosen and rejected responses apart: synthetic runs of known displacement, real ones, older records, logs of TRL."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from trl import DPOConfig, DPOTrainer

from epsdpo.files import written_whole
from epsdpo.methods.record import STEPS_FILE, read_pairs, read_steps
from epsdpo.trajectory import displacement
from epsdpo.trajectory.side_by_side import find_runs
from epsdpo.trajectory.trl_logs import read_log

RUNS, STEPS, PAIRS, PROMPTS = 200, 128, 8, 400
SPREAD, PROMPT_SPREAD = 1.0, 1.0  # nats; of pairs of one prompt, and of prompts


def synthetic(generator, mean):
    """A run whose chosen log-ratios have the mean `mean(step)`: two to three pairs of each prompt, in any order."""
    steps = np.repeat(np.arange(1, STEPS + 1), PAIRS)
    prompts = generator.integers(PROMPTS, size=steps.size)
    log_ratios = mean(steps) + PROMPT_SPREAD * generator.normal(size=PROMPTS)[prompts]
    log_ratios = log_ratios + SPREAD * generator.normal(size=steps.size)
    return pd.DataFrame(
        {"step": steps, "pair_id": [f"pair {number}" for number in range(steps.size)], "decision": 1}
        | {"prompt": [f"prompt {number}" for number in prompts], "chosen_logps": log_ratios - 50.0}
        | {"rejected_logps": -60.0, "ref_chosen_logps": -50.0, "ref_rejected_logps": -60.0}
    )


def rise_and_fall(crossing):
    """Up from 0, and down again through 0 at the step `crossing` for good."""
    return lambda steps: 1.2 * np.sin(np.pi * np.minimum(steps / crossing, 1.5))


def test_known_displacement_is_recovered():
    """In 200 runs: the share in the last stretch, and where it begins, which the bracket tells to a part of the run."""
    generator = np.random.default_rng(0)
    shares, onsets, widths = [], [], []
    for number in range(RUNS):
        crossing = 40 + 40 * number / RUNS
        mean = rise_and_fall(crossing)
        table = displacement.over_training(synthetic(generator, mean))
        (row,) = table[table["measure"] == "displaced"].tail(1).itertuples()
        steps = np.arange(row.first_step, row.last_step + 1)
        truth = norm.cdf(-mean(steps) / np.hypot(SPREAD, PROMPT_SPREAD)).mean()
        shares.append(row.low <= truth <= row.high)
        first, last = displacement.onset(table)
        onsets.append(first <= crossing <= last)
        widths.append(last - first + 1)
    assert np.mean(shares) >= 0.95 and np.mean(onsets) >= 0.95
    assert np.median(widths) <= STEPS / 4


def test_a_run_that_displaces_nothing_is_not_said_to():
    generator = np.random.default_rng(1)
    told = [
        displacement.onset(displacement.over_training(synthetic(generator, lambda steps: 0.0 * steps))) is not None
        for _ in range(RUNS)
    ]
    assert np.mean(told) <= 0.05
    risen = displacement.over_training(synthetic(generator, lambda steps: steps / 50))
    assert displacement.begins(risen) == "cannot be told"


def test_the_beginning_by_hand():
    """It stays below 0 from steps 7–9 on; a stretch below 0 that was no lasting one does not count."""
    table = pd.DataFrame({"measure": "chosen", "first_step": [1, 4, 7, 10], "last_step": [3, 6, 9, 12]})

    def onset(low, high):
        return displacement.onset(table.assign(low=low, high=high))

    assert onset([-2, -1, -2, -2], [-1, 1, -1, -1]) == (1, 9)
    assert onset([1, -1, -2, -2], [2, 1, -1, -1]) == (1, 9)
    assert onset([-1, 1, -2, -2], [1, 2, -1, -1]) == (4, 9)
    assert onset([-2, -2, -2, -1], [-1, -1, -1, 1]) is None
    assert onset([-2, -2, -2, np.nan], [-1, -1, -1, np.nan]) is None  # one prompt tells nothing
    assert onset([-2] * 4, [-1] * 4) == (1, 3)


def test_pairs_of_one_prompt_are_one_observation():
    """Pairs that are met four times say no more than once, and those of one prompt alone nothing of another."""
    once = synthetic(np.random.default_rng(2), lambda steps: 0.0 * steps).iloc[:10].assign(step=1)
    once["prompt"] = once["pair_id"]
    one, four = (
        displacement.over_training(pairs).set_index("measure")
        for pairs in (once, pd.concat([once] * 4, ignore_index=True))
    )
    assert four["pairs"].tolist() == [40] * 3 and four["distinct"].tolist() == [10] * 3
    assert four.loc["chosen", ["low", "high"]].tolist() == pytest.approx(one.loc["chosen", ["low", "high"]].tolist())
    assert four.loc["displaced", "high"] - four.loc["displaced", "low"] > 0.4  # over pairs it would be 0.3 at most
    alone = displacement.over_training(once.assign(prompt="one")).set_index("measure")
    assert np.isnan(alone.loc["chosen", "low"]) and displacement.onset(alone.reset_index()) is None


def longest_common(one, other):
    """By the usual table."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_likeness_is_that_of_the_usual_table():
    generator = np.random.default_rng(3)
    pairs = [[generator.integers(6, size=generator.integers(0, 90)).tolist() for _ in range(2)] for _ in range(40)]
    pairs += [[[1, 2, 3], [1, 2, 3]], [[1, 2], [3, 4]], [[], []], [[1, 2, 3, 4], [2, 4]]]
    tokens = pd.DataFrame(pairs, columns=["chosen_ids", "rejected_ids"])
    found = displacement.likeness(tokens.assign(pair_id=tokens.index.astype(str)))
    expected = [2 * longest_common(one, other) / max(1, len(one) + len(other)) for one, other in pairs]
    assert found.tolist() == expected
    assert found.iloc[-4:].tolist() == [1.0, 0.0, 0.0, 2 * 2 / 6]


def test_groups_of_the_last_quarter():
    """By hand: eight steps of three pairs, of which the last two count; a pair that the data lack is in no third."""
    steps, places = np.repeat(np.arange(1, 9), 3), np.tile(np.arange(3), 8)
    pairs = pd.DataFrame(
        {"step": steps, "pair_id": [f"{step}-{place}" for step, place in zip(steps, places, strict=True)]}
        | {"decision": 1 - places, "chosen_logps": np.where(steps < 7, 5.0, places - 1.0), "rejected_logps": -1.0}
        | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    )
    table = displacement.by_decision(pairs).set_index(["group", "measure"])
    assert table.index.get_level_values(0).unique().tolist() == ["relaxed", "tied", "tightened"]
    assert (table["pairs"] == 2).all()
    assert table.loc[("relaxed", "chosen"), ["value", "low", "high"]].tolist() == [-1.0, -1.0, -1.0]
    assert table.loc[("relaxed", "displaced"), "value"] == 1.0 and table.loc[("tied", "displaced"), "value"] == 0.0
    alike = pd.Series({"7-0": 0.1, "8-0": 0.2, "7-1": 0.5, "8-1": 0.5, "7-2": 0.9, "1-0": 0.0})
    thirds = displacement.by_likeness(pairs, alike).set_index(["group", "measure"])
    assert thirds["pairs"].xs("chosen", level=1).to_dict() == {"0.10 to 0.20": 2, "0.50 to 0.50": 2, "0.90 to 0.90": 1}
    assert thirds.loc[("0.90 to 0.90", "chosen"), "value"] == 1.0
    assert displacement.by_likeness(pairs, pd.Series({"other": 0.5})).empty
    equal = displacement.by_likeness(pairs, pd.Series(0.5, index=pairs["pair_id"]))
    assert equal["group"].unique().tolist() == ["0.50 to 0.50"]


def without_log_ratios(directory):
    """Its steps.jsonl as records had it before it said log-ratios."""
    path = directory / STEPS_FILE
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert row.pop("chosen_log_ratio") is not None and row.pop("rejected_log_ratio") is not None
    with written_whole(path) as partial:
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (directory / "progress.json").write_text(json.dumps({"total_steps": len(rows)}), encoding="utf-8")


def test_a_real_run_its_older_record_and_its_log_say_the_same(make_trainer, tmp_path):
    """At step 1 policy and reference differ already, as the reference models do."""
    trainer = make_trainer(max_steps=6, epsilon=0.01)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    folder = tmp_path / "run"
    steps, pairs = read_steps(folder), read_pairs(folder)
    run, log = find_runs([str(folder), str(tmp_path / "trainer_state.json")])
    assert len(run.apart) == 6 * 3 and len(log.apart) == 6 * 2
    for side in displacement.SIDES:
        ratios = (pairs[f"{side}_logps"] - pairs[f"ref_{side}_logps"]).groupby(pairs["step"])
        assert steps[f"{side}_log_ratio"].tolist() == pytest.approx(ratios.mean().tolist(), abs=1e-9)
        from_pairs, from_log = (
            table.loc[table["measure"] == side, "value"].to_numpy() for table in (run.apart, log.apart)
        )
        assert from_pairs.tolist() == pytest.approx(ratios.mean().tolist(), abs=1e-9)
        # Each pair's reward has its own β̃, within ε of the logged β, which has four digits.
        off = 0.011 * ratios.agg(lambda values: values.abs().mean()).to_numpy() + 1e-3
        assert (np.abs(from_log - from_pairs) <= off).all() and np.abs(from_log - from_pairs).max() > 0
    margin = steps["chosen_log_ratio"] - steps["rejected_log_ratio"]
    assert margin.tolist() == pytest.approx(steps["log_ratio_margin"].tolist(), abs=1e-9)
    table = displacement.at_the_end({"run": run.apart, "log": log.apart}).set_index("run")
    assert table.loc["log", "displaced (share of pairs)"] == "needs pairs"
    assert table.loc["log", "displacement begins"] == "cannot be told from means of steps"
    assert table.loc["run", "steps"] == "6 to 6" and "[" in table.loc["run", "chosen (nats)"]

    without_log_ratios(folder)
    old = read_steps(folder)
    assert old["chosen_log_ratio"].isna().all()
    pd.testing.assert_frame_equal(displacement.of_run(folder, old), run.apart)


class Tokenised(DPOTrainer):
    """TRL's own, on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def test_rewards_of_trls_own_log(make_trainer, tmp_path):
    """β is stated; ours on the same pairs has the log-ratios of the same steps, to the digits of the log."""
    make_trainer(max_steps=4, epsilon_step=0.0).train()
    theirs = make_trainer(
        trainer=Tokenised, config=DPOConfig, max_steps=4, logging_steps=2, output_dir=str(tmp_path / "trl")
    )
    theirs.train()
    theirs.state.save_to_json(str(tmp_path / "trainer_state.json"))
    log, ours = read_log(tmp_path / "trainer_state.json", beta=0.1).steps, read_steps(tmp_path / "run")
    assert log["last_step"].tolist()[:2] == [2, 4]
    for column in ("chosen_log_ratio", "rejected_log_ratio"):
        means = ours[column].to_numpy().reshape(2, 2).mean(axis=1)
        np.testing.assert_allclose(log[column][:2], means, rtol=1e-3, atol=1e-3)


def test_rewards_without_a_reference_are_no_log_ratios(tmp_path):
    """Those of CPO, SimPO and ORPO are β log π, which `logps/*` tell; without logps rewards are taken at their word."""
    rows = [
        {"step": step, "loss": 0.5, "logps/chosen": -2.0 - step, "logps/rejected": -3.0 - step}
        | {"rewards/chosen": 0.1 * (-2.0 - step), "rewards/rejected": 0.1 * (-3.0 - step)}
        for step in range(1, 4)
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    alone = read_log(path, beta=0.1).steps
    assert alone[["chosen_log_ratio", "rejected_log_ratio"]].isna().all(axis=None)
    table = displacement.over_steps(alone)
    assert table.empty and displacement.at_the_end({"alone": table}).empty
    path.write_text(json.dumps([row | {"rewards/chosen": -0.1} for row in rows]), encoding="utf-8")
    assert read_log(path, beta=0.1).steps["chosen_log_ratio"].tolist() == pytest.approx([-1.0] * 3)
