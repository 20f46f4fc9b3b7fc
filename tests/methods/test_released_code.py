"""Agreement with the released ε-DPO code (trl 0.13.0), step by step, on runs stored in tests/data/official."""

import json

import numpy as np
import pytest
import torch

from epsdpo.methods.record import read_pairs, read_steps


def stored_run(official, name):
    return json.loads((official / f"{name}.json").read_text(encoding="utf-8"))


def train(make_trainer, run, **settings):
    arguments = run["args"]
    trainer = make_trainer(
        per_device_train_batch_size=arguments["bs"],
        gradient_accumulation_steps=arguments["ga"],
        epsilon=arguments["epsilon"],
        beta=arguments["beta"],
        max_steps=arguments["max_steps"],
        learning_rate=arguments["learning_rate"],
        seed=42,
        **settings,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["fp32_accum1", "fp32_accum2"])
def test_float32_training_matches_the_released_code(official, make_trainer, name):
    run = stored_run(official, name)
    rows, accumulation = run["rows"], run["args"]["ga"]
    trainer = train(make_trainer, run)
    steps, pairs = read_steps(trainer.args.output_dir), read_pairs(trainer.args.output_dir)

    assert pairs["decision"].tolist() == [step for row in rows for step in row["steps"]]
    for column in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(pairs[column], [value for row in rows for value in row[column]], rtol=1e-5)

    windows = [rows[start : start + accumulation] for start in range(0, len(rows), accumulation)]
    losses = [np.mean([row["loss"] for row in window]) for window in windows]
    np.testing.assert_allclose(steps["loss"], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(steps["beta_before"], [window[0]["beta_before"] for window in windows], rtol=1e-5)
    np.testing.assert_allclose(steps["beta_after"], [window[-1]["beta_after"] for window in windows], rtol=1e-5)

    weights = trainer.model.state_dict()
    for tensor, (total, norm) in run["final"].items():
        value = weights[tensor].double()
        assert value.norm().item() == pytest.approx(norm, rel=1e-6), tensor
        # A sum of weights that nearly cancel has no relative accuracy of its own; it is measured against the norm.
        assert value.sum().item() == pytest.approx(total, rel=1e-6, abs=1e-6 * norm * value.numel() ** 0.5), tensor


@pytest.mark.parametrize("name", ["bf16_frozen_eps0.05", "bf16_frozen_eps0.2"])
def test_bfloat16_decisions_match_the_released_code(official, make_trainer, name):
    run = stored_run(official, name)
    trainer = train(make_trainer, run, dtype=torch.bfloat16, criterion_dtype="bfloat16")
    decisions = read_pairs(trainer.args.output_dir)["decision"].to_numpy()
    released = np.array([step for row in run["rows"] for step in row["steps"]])
    assert np.mean(decisions == released) >= 0.98
    assert 0 < np.count_nonzero(released) < len(released)  # the run has ties and steps to tell apart


@pytest.mark.parametrize("name", ["bf16_frozen_eps0.05", "bf16_frozen_eps0.2"])
def test_exact_criterion_steps_where_bfloat16_ties(official, make_trainer, name):
    """What `criterion_dtype` is for: on the very same weights the exact criterion leaves almost no ties."""
    run = stored_run(official, name)
    trainer = train(make_trainer, run, dtype=torch.bfloat16, criterion_dtype="float32")
    exact_ties = (read_pairs(trainer.args.output_dir)["decision"] == 0).mean()
    released_ties = np.mean([step == 0 for row in run["rows"] for step in row["steps"]])
    assert exact_ties < 0.1 < released_ties


def test_criterion_dtype_gives_the_released_decisions_and_not_the_released_loss(official, make_trainer, tmp_path):
    """The released loss is made of bfloat16 sums. Here it is of exact ones, and the same bits under either."""
    run = stored_run(official, "bf16_frozen_eps0.05")
    pairs, steps = {}, {}
    for criterion in ("float32", "bfloat16"):
        folder = tmp_path / criterion
        train(
            make_trainer,
            run,
            dtype=torch.bfloat16,
            criterion_dtype=criterion,
            epsilon_step=0.0,  # decisions would move β, and β the loss
            output_dir=str(folder),
        )
        pairs[criterion], steps[criterion] = read_pairs(folder), read_steps(folder)
    exact, rounded = pairs["float32"], pairs["bfloat16"]
    assert (exact["decision"] != rounded["decision"]).mean() > 0.5
    assert steps["bfloat16"]["loss"].tolist() == steps["float32"]["loss"].tolist()
    for column in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "log_ratio_margin"):
        assert rounded[column].tolist() == exact[column].tolist(), column

    sums = {
        name: np.concatenate([row[f"{name}_logps"] for row in run["rows"]])
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    }
    released = (sums["chosen"] - sums["rejected"]) - (sums["ref_chosen"] - sums["ref_rejected"])
    assert 0.2 < np.abs(released - exact["log_ratio_margin"]).mean() < 1.5
    assert (np.sign(released) == -np.sign(exact["log_ratio_margin"])).any()


def test_weights_do_not_depend_on_criterion_dtype(make_trainer, tmp_path):
    weights = []
    for criterion in ("float32", "bfloat16"):
        trainer = make_trainer(
            criterion_dtype=criterion,
            epsilon_step=0.0,
            max_steps=4,
            output_dir=str(tmp_path / criterion),
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
