"""The ε bound of Figure 5: decisions against full logits, bounds by hand, and the command over a run's checkpoints."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from kit.official import save_official_model
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.experiment import ConfigError, load_experiments, save_experiment
from epsdpo.methods.heads import expose_hidden_states
from epsdpo.methods.kernels import EXACT
from epsdpo.paper import epsilon_bound
from epsdpo.paper.claims import bounds as claim_bounds
from epsdpo.paper.claims.settings import has_fixed_reference
from epsdpo.paper.drawing_bound import epsilon_bounds
from epsdpo.paper.epsilon_bound import mean_bounds, upper_bounds, with_limit
from epsdpo.paper.frozen import decisions_at
from epsdpo.runs.layout import data_folder, sft_folder
from epsdpo.train import preferences as training
from epsdpo.trajectory.summary import DECISIONS

GRID = (0.01, 0.3, 1.0, 3.0, 10.0)


def load(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    expose_hidden_states(model)
    return model


@pytest.fixture(scope="module")
def batch(official_pairs):
    return DataCollatorForPreference(pad_token_id=0, max_length=128)(official_pairs.select(range(32)).to_list())


@torch.no_grad()
def brute_force(policy, reference, batch, epsilon):
    """Eqs. 1 to 5 as written: three softmaxes over full logits, and sums over completion tokens."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    z, r = policy(**inputs).logits[:, :-1], reference(**inputs).logits[:, :-1]
    log_ratios = []
    for logits in (z, (1 + epsilon) * z - epsilon * r, (1 - epsilon) * z + epsilon * r):
        label_logps = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        chosen, rejected = (label_logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
        log_ratios.append(chosen - rejected)
    current, lowered, raised = log_ratios
    return ((lowered > current) & (current > raised)).long() - ((lowered < current) & (current < raised)).long()


def test_decisions_are_those_of_full_logits(official, batch):
    policy, reference = load(official / "policy"), load(official / "ref")
    expected = torch.stack([brute_force(policy, reference, batch, epsilon) for epsilon in GRID]).numpy()
    decisions = decisions_at(policy, reference, batch, GRID, EXACT)
    assert {-1, 1} <= set(expected[0]) and (expected != expected[0]).any(axis=0).sum() > 3  # something changes
    np.testing.assert_array_equal(decisions, expected)


def test_a_policy_that_is_the_reference_decides_nothing(official, batch):
    """In bfloat16 it may at such large ε: there (1 + ε) z - ε z is rounded twice, and is not z."""
    model = load(official / "policy", torch.float32)
    decisions = decisions_at(model, model, batch, GRID, EXACT)
    assert not decisions.any()
    assert np.isnan(upper_bounds(decisions, GRID)).all()


def test_bounds_by_hand():
    """Holds throughout; changes at once; changes and comes back; tightens up to the third; tied first."""
    decisions = np.array([[1, 1, 1, -1, 0], [1, 0, 1, -1, 1], [1, 1, -1, -1, 1], [1, 1, 1, 0, 1]])
    bounds = upper_bounds(decisions, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(bounds, [0.4, 0.1, 0.2, 0.3, np.nan])


def test_a_grid_that_does_not_increase_is_refused():
    with pytest.raises(ValueError, match="must increase"):
        upper_bounds(np.ones((2, 1)), [0.02, 0.01])


def test_means_by_hand():
    """Relaxed and tightened pairs apart; no interval for one pair; nothing for none."""
    bounds = pd.DataFrame(
        {
            "step": [2, 2, 2, 2, 4, 4],
            "decision": ["relaxed", "relaxed", "tightened", "tied", "relaxed", "relaxed"],
            "bound": [0.01, 0.02, 0.015, np.nan, 0.02, 0.02],
        }
    )
    table = mean_bounds(bounds, (0.01, 0.015, 0.02), seed=0).set_index(["step", "decision"])
    relaxed = table.loc[(2, "relaxed")]
    assert relaxed[["pairs", "of_pairs", "share_at_largest", "largest_epsilon"]].tolist() == [2, 4, 0.5, 0.02]
    # A resample of two has both alike, low or high, in a quarter of the cases each.
    assert relaxed[["bound", "low", "high"]].tolist() == pytest.approx([0.015, 0.01, 0.02])
    tightened = table.loc[(2, "tightened")]
    assert tightened["bound"] == 0.015 and np.isnan(tightened["low"])
    assert table.loc[(4, "relaxed"), ["low", "high"]].tolist() == pytest.approx([0.02, 0.02])
    assert table.loc[(4, "tightened"), "pairs"] == 0 and np.isnan(table.loc[(4, "tightened"), "bound"])


def test_a_mean_with_pairs_at_the_largest_epsilon_is_called_a_lower_limit():
    assert with_limit("0.015", 0.0, 0.02) == with_limit("0.015", np.nan, 0.02) == "0.015"
    assert with_limit("0.015", 0.5, 0.02) == "≥ 0.015 (50.0% of pairs at 0.02, the largest ε tried)"
    assert with_limit("0.02", 1.0, 0.02) == "≥ 0.02 (largest ε tried)"


def test_lower_limits_are_hollow_points():
    bounds = pd.DataFrame(
        {"step": [2, 2, 4, 4], "decision": ["relaxed", "tightened"] * 2, "bound": [0.01, 0.02, 0.015, np.nan]}
        | {"low": np.nan, "high": np.nan, "share_at_largest": [0.0, 1.0, 0.2, np.nan], "largest_epsilon": 0.02}
    )
    (axes,) = epsilon_bounds(bounds, "title").axes
    drawn = {}
    for line in axes.lines:
        if line.get_marker() == "o" and len(line.get_xdata()):
            hollow = line.get_markerfacecolor() == "white"
            drawn |= {(x, y): hollow for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if y == y}
    assert drawn == {(2, 0.01): False, (2, 0.02): True, (4, 0.015): True}
    labels = axes.get_legend_handles_labels()[1]
    assert "largest ε tried: 0.02" in labels and any(label.startswith("lower limit") for label in labels)


@pytest.fixture(scope="module")
def run(tmp_path_factory, official):
    """A DPO run of ten steps with a checkpoint after every fourth: at 4, 8 and, as the last, 10."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "method": "dpo",
        "data": {"source": str(official / "pairs.jsonl")},
        "model": {"name_or_path": str(save_official_model(folder / "start"))},
        "train": {
            "beta": 0.05,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_length": 128,
            "max_steps": 10,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 4,
            "use_cpu": True,
        },
    }
    config = folder / "dpo.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert training.main(["--config", str(config), "--output", str(folder)]) == 0
    return folder


def measured(run, output, pairs):
    options = ["--train-dir", run / "train", "--data", run / "data", "--pairs", pairs, "--output", output]
    assert epsilon_bound.main([str(option) for option in options]) == 0
    return pd.read_csv(output / "epsilon_bound.csv"), pd.read_csv(output / "pairs.csv")


def test_the_command_over_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(epsilon_bound, "EPSILONS", GRID)
    table, pairs = measured(run, tmp_path / "out", 12)
    assert table["step"].tolist() == [4, 4, 8, 8, 10, 10]
    assert table["decision"].tolist() == ["relaxed", "tightened"] * 3
    assert pairs.groupby("step")["pair_id"].nunique().tolist() == [12, 12, 12]
    assert (tmp_path / "out" / "epsilon_bound.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "model 1/3 (step 4): 12/12 pairs" in out and "model 3/3 (step 10): 12/12 pairs" in out
    held = table["share_at_largest"] > 0.0
    assert held.any() and out.count("largest ε tried") == held.sum()
    assert "10, the largest ε tried" in (tmp_path / "out" / "epsilon_bound.txt").read_text(encoding="utf-8")

    # The last rows are the final model's, against the model that training started from.
    policy, reference = load(run / "train" / "model"), load(run / "start")
    data = training.load_prepared(run / "data").train.to_list()
    at_end = pairs[pairs["step"] == 10]
    rows = [next(row for row in data if row["pair_id"] == pair_id) for pair_id in at_end["pair_id"]]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=128)(rows)
    first = brute_force(policy, reference, batch, GRID[0]).tolist()
    assert at_end["decision"].map(DECISIONS).tolist() == first


def test_a_checkpoint_in_shards_is_read_as_a_whole_one(run):
    """As accelerate's FSDP2 leaves it: the state under "model", in torch's format for distributed checkpoints."""
    experiment = load_experiments(run / "dpo.yaml")[0]
    folder = run / "sharded"
    trained = AutoModelForCausalLM.from_pretrained(run / "train" / "model")
    sharded.save({"model": get_model_state_dict(trained)}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    policy = epsilon_bound._load_policy(experiment, folder, torch.device("cpu"))
    start = AutoModelForCausalLM.from_pretrained(run / "start").state_dict()
    for name, weight in trained.state_dict().items():
        assert policy.state_dict()[name].equal(weight), name
    assert any(not policy.state_dict()[name].equal(weight) for name, weight in start.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "simpo"}, "has no reference"),
        ({"method": "tr_dpo"}, "moves"),
        ({"model.lora": {"r": 4, "alpha": 8}}, "adapters"),
    ],
)
def test_runs_whose_checkpoints_have_no_fixed_reference_are_refused(changes, reason, run, tmp_path):
    experiment = load_experiments(run / "dpo.yaml", changes)[0]
    data = training.load_prepared(run / "data")
    arguments = training.trainer_arguments(experiment, data, tmp_path)
    with pytest.raises(ConfigError, match=reason):
        epsilon_bound._require_fixed_reference(experiment, arguments)
    assert not has_fixed_reference(experiment) and has_fixed_reference(load_experiments(run / "dpo.yaml")[0])


@pytest.fixture
def batch_of_one(run, tmp_path):
    """A batch with the run as `dpo-seed1`; keys of the experiment's sections can be changed."""

    def make(**changes):
        experiment = load_experiments(run / "dpo.yaml", {"name": "dpo-seed1", **changes})[0]
        folder = tmp_path / experiment.name
        folder.mkdir()
        shutil.copytree(run / "train", folder / "train", ignore=shutil.ignore_patterns("experiment.yaml"))
        shutil.copytree(run / "data", tmp_path / data_folder(experiment))
        save_experiment(experiment, folder / "experiment.yaml")
        (folder / "train" / "manifest.json").write_text(json.dumps({"key": "first"}), encoding="utf-8")
        return {experiment.name: (folder, experiment)}

    return make


def by_command(runs, tmp_path, pairs, *options):
    """What the command measures of the only run."""
    ((folder, experiment),) = runs.values()
    options = ["--train-dir", folder / "train", "--data", tmp_path / data_folder(experiment), *options]
    options += ["--pairs", pairs, "--output", tmp_path / "command"]
    assert epsilon_bound.main([str(option) for option in options]) == 0
    return pd.read_csv(tmp_path / "command" / "pairs.csv"), pd.read_csv(tmp_path / "command" / "epsilon_bound.csv")


def test_claims_are_about_the_bounds_that_the_command_measures(batch_of_one, tmp_path, monkeypatch):
    """The same pairs, spread over the data; kept for as long as they are of this training."""
    for module in (epsilon_bound, claim_bounds):
        monkeypatch.setattr(module, "EPSILONS", GRID)
    monkeypatch.setattr(claim_bounds, "PAIRS", 12)
    runs, told = batch_of_one(), []
    file = tmp_path / "dpo-seed1" / "bounds" / "float32.csv"
    table = claim_bounds.bounds_of(runs, ["dpo"], tell=told.append)
    pairs, means = by_command(runs, tmp_path, 12)
    kept = pd.read_csv(file)
    pd.testing.assert_frame_equal(kept[pairs.columns.tolist()], pairs)
    exact = table[table["criterion_dtype"] == "float32"].reset_index(drop=True)
    pd.testing.assert_frame_equal(exact[means.columns.tolist()], means)
    assert exact["of_pairs"].unique().tolist() == [12] and exact["share_of_epoch"].unique().tolist() == [0.4, 0.8, 1.0]
    assert len(told) == 2

    claim_bounds.bounds_of(runs, ["dpo"], tell=told.append)
    assert len(told) == 2
    # Bounds of other pairs, or of a training that came before, are not this run's.
    kept.assign(pair_id=kept["pair_id"].where(kept["pair_id"] != kept["pair_id"][0], "another")).to_csv(
        file, index=False
    )
    claim_bounds.bounds_of(runs, ["dpo"], tell=told.append)
    assert len(told) == 3 and told[-1].endswith("float32")
    (tmp_path / "dpo-seed1" / "train" / "manifest.json").write_text('{"key": "second"}', encoding="utf-8")
    claim_bounds.bounds_of(runs, ["dpo"], tell=told.append)
    assert len(told) == 5


def test_the_bounds_of_claims_start_from_the_sft_model(batch_of_one, official, tmp_path, monkeypatch):
    """A reference other than the model of the config: what the command does with --sft-dir."""
    for module in (epsilon_bound, claim_bounds):
        monkeypatch.setattr(module, "EPSILONS", GRID)
    monkeypatch.setattr(claim_bounds, "PAIRS", 12)
    monkeypatch.setattr(claim_bounds, "PRECISIONS", ("float32",))
    runs = batch_of_one(**{"model.sft": {"learning_rate": 1e-3}})
    sft = tmp_path / sft_folder(runs["dpo-seed1"][1])
    shutil.copytree(official / "ref", sft / "model")
    table = claim_bounds.bounds_of(runs, ["dpo"], tell=lambda _: None)
    _, means = by_command(runs, tmp_path, 12, "--sft-dir", sft)
    pd.testing.assert_frame_equal(table[means.columns.tolist()], means)


def test_an_unfinished_run_is_refused(run, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "experiment.yaml").write_bytes((run / "train" / "experiment.yaml").read_bytes())
    assert epsilon_bound.main(["--train-dir", str(tmp_path / "train"), "--data", str(run / "data")]) == 2
    assert "no trained policy" in capsys.readouterr().err
