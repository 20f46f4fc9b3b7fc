"""β-DPO by hand-computed numbers: running statistics, β of a batch, the draw of pairs, and a run of the trainer."""

import numpy as np
import pytest

from epsdpo.methods.beta_dpo import BetaDPOTrainer, MarginStatistics, batch_beta, keep_pairs
from epsdpo.methods.beta_dpo_config import BetaDPOConfig
from epsdpo.methods.record import read_pairs, read_steps


def test_statistics_take_in_a_batch_by_hand():
    """E[M] = 3, V[M] = ((-2)² + 0 + 2²)/3 = 8/3; then E[M] = 1, V[M] = 0."""
    first = MarginStatistics().after(np.array([1.0, 3.0, 5.0]), momentum=0.9)
    assert first.mean == pytest.approx(0.3)
    assert first.std == pytest.approx(0.1 * (8 / 3) ** 0.5)
    second = first.after(np.array([1.0, 1.0]), momentum=0.5)
    assert second.mean == pytest.approx(0.5 * 0.3 + 0.5 * 1.0)
    assert second.std == pytest.approx(0.05 * (8 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("margins", "mean", "beta"),
    [
        ([2.0, 4.0], 1.0, 0.1 * (1 + 0.6 * 2.0)),  # above the running mean: a larger penalty
        ([1.0, 1.0], 1.0, 0.1),
        ([0.0, 1.0], 1.0, 0.1 * (1 - 0.6 * 0.5)),
        ([-9.0, -9.0], 1.0, 1e-3),  # 0.1·(1 - 6) is no penalty
    ],
)
def test_beta_of_a_batch_by_hand(margins, mean, beta):
    statistics = MarginStatistics(mean=mean, std=1.0)
    assert batch_beta(0.1, np.array(margins), statistics, alpha=0.6) == pytest.approx(beta)


def test_pairs_are_drawn_with_the_gaussian_weights():
    """Of two pairs one is kept: the one at the mean with probability 1/(1 + exp(-d²/2)), d in units of σ."""
    statistics = MarginStatistics(mean=2.0, std=0.5)
    draws = [keep_pairs(np.array([2.0, 2.6]), statistics, 0.5, np.random.default_rng(seed)) for seed in range(4000)]
    share = 1 / (1 + np.exp(-((0.6 / 0.5) ** 2) / 2))
    assert {tuple(draw) for draw in draws} == {(True, False), (False, True)}
    assert np.mean([draw[0] for draw in draws]) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))


def test_draw_counts_and_limits():
    random = np.random.default_rng(0)
    spread = MarginStatistics(mean=0.0, std=1e-3)
    margins = np.array([0.0, 1000.0, -1000.0, 0.0, 500.0])  # weights that underflow, but for two
    assert keep_pairs(margins, spread, 0.4, random).tolist() == [True, False, False, True, False]
    assert keep_pairs(margins, spread, 0.8, random).sum() == 4
    assert keep_pairs(margins, spread, 1.0, random).all()
    assert keep_pairs(margins, spread, 0.01, random).sum() == 1
    equal = [keep_pairs(np.zeros(4), MarginStatistics(), 0.5, np.random.default_rng(seed)) for seed in range(400)]
    np.testing.assert_allclose(np.mean(equal, axis=0), 0.5, atol=0.1)  # σ = 0: any pair as likely as another


SETTINGS = {"max_steps": 6, "keep_ratio": 0.75, "margin_alpha": 0.5, "margin_momentum": 0.8, "seed": 3}


@pytest.fixture
def make_beta_trainer(make_trainer):
    def make(**settings):
        return make_trainer(trainer=BetaDPOTrainer, config=BetaDPOConfig, **{**SETTINGS, **settings})

    return make


def test_a_run_follows_the_equations_on_its_own_record(make_beta_trainer):
    """β, statistics and loss of every step, recomputed from the recorded margins and from which pairs have a β."""
    trainer = make_beta_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    steps, pairs = read_steps(trainer.args.output_dir), read_pairs(trainer.args.output_dir)
    mean = std = 0.0
    for row in steps.itertuples():
        inside = pairs[pairs["step"] == row.step]
        margins, kept = inside["log_ratio_margin"].to_numpy(), inside["beta"].notna().to_numpy()
        assert len(inside) == 8 and kept.sum() == 6
        mean, std = 0.8 * mean + 0.2 * margins.mean(), 0.8 * std + 0.2 * margins.std()
        beta = max(1e-3, 0.1 * (1 + 0.5 * (margins[kept].mean() - mean)))
        assert row.beta_before == row.beta_after == pytest.approx(beta, rel=1e-4)
        np.testing.assert_allclose(inside["beta"][kept], beta, rtol=1e-4)
        assert row.loss == pytest.approx(np.log1p(np.exp(-beta * margins[kept])).mean(), rel=1e-4)
    assert steps["beta_before"].nunique() == 6
    assert [log["kl/beta"] for log in trainer.state.log_history[:6]] == steps["beta_before"].tolist()


def test_micro_batches_do_not_matter(make_beta_trainer, tmp_path):
    runs = []
    for size in (1, 2, 8):
        trainer = make_beta_trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            output_dir=str(tmp_path / str(size)),
        )
        trainer.train()
        runs.append((read_steps(tmp_path / str(size)).drop(columns="seconds"), read_pairs(tmp_path / str(size))))
    for steps, pairs in runs[1:]:
        np.testing.assert_allclose(steps, runs[0][0], rtol=1e-4, atol=1e-4)
        assert pairs["beta"].isna().equals(runs[0][1]["beta"].isna())


def test_evaluation_changes_nothing_and_a_resumed_run_is_the_same(make_beta_trainer, official_pairs, tmp_path):
    whole = make_beta_trainer(output_dir=str(tmp_path / "whole"), save_strategy="steps", save_steps=3)
    whole.train()
    held_out = official_pairs.select(range(80, 96))
    settings = {"eval_pairs": held_out, "eval_strategy": "steps", "eval_steps": 1, "output_dir": str(tmp_path / "run")}
    resumed = make_beta_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = read_steps(tmp_path / "whole").drop(columns="seconds").iloc[3:].reset_index(drop=True)
    np.testing.assert_array_equal(read_steps(tmp_path / "run").drop(columns="seconds"), expected)
    assert resumed._margins == whole._margins
    with pytest.raises(ValueError, match=r"keep_ratio: 0\.75 → 0\.5"):
        make_beta_trainer(keep_ratio=0.5).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin_alpha": -0.1}, r"margin_alpha=-0\.1 must be at least 0"),
        ({"margin_momentum": 1.0}, r"margin_momentum=1\.0 must lie in \[0, 1\)"),
        ({"keep_ratio": 0.0}, r"keep_ratio=0\.0 must lie in \(0, 1\]"),
        ({"keep_ratio": 1.1}, r"keep_ratio=1\.1"),
        ({"epsilon_step": 0.1}, r"epsilon_step=0\.1 cannot be combined with β-DPO: its β has a rule of its own"),
    ],
)
def test_nonsense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        BetaDPOConfig(output_dir=str(tmp_path), bf16=False, **settings)
