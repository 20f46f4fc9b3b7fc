"""Every method through one trainer path and one record, and the losses of TRL against TRL's own trainers."""

import ast
import inspect
import itertools
import json
import math
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from kit.official import save_official_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer
from trl import KTOConfig as TrlKTOConfig
from trl import KTOTrainer as TrlKTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from epsdpo.data.prepared import prepare
from epsdpo.experiment import check_experiment
from epsdpo.methods.catalogue import METHODS, SHARED_PASS, TRL_LOSSES, config_class, trainer_class
from epsdpo.methods.kto import KTOTrainer, unpaired
from epsdpo.methods.kto_config import KTOConfig
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.methods.saved_reference import FILE as REFERENCE_FILE
from epsdpo.methods.trl_losses import TrlLossTrainer, _Scored, _TrlLoss
from epsdpo.methods.trl_losses_config import TrlLossConfig
from epsdpo.models.start import load_tokenizer
from epsdpo.plots.trajectory import beta_trajectory, training_curves
from epsdpo.train.preferences import memory_outlook, train, trainer_arguments
from epsdpo.trajectory.displacement import of_run
from epsdpo.trajectory.summary import compare, in_words, summarise
from epsdpo.trajectory.trl_logs import read_log

REFERENCE_FREE = [method for method in METHODS if not config_class(method).has_reference]
NEEDS = {"exo_pair": {"label_smoothing": 1e-3}, "tr_dpo": {"ref_model_sync_steps": 2}}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one, other, atol):
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=0.0, atol=atol, msg=name)


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's own, on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def assert_same_logs(ours, theirs, steps):
    """Every metric of TRL's, step by step."""
    for our_log, their_log in zip(ours.state.log_history[:steps], theirs.state.log_history[:steps], strict=True):
        shared = {key for key in their_log if key not in ("step", "epoch")}
        assert {"loss", "rewards/margins"} <= shared <= set(our_log)
        for key in shared:
            assert our_log[key] == pytest.approx(their_log[key], rel=2e-4, abs=2e-5), key


# ------------------------------------------------------------------------------------------- losses of TRL's DPOTrainer


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_trl_losses_are_trls(make_trainer, tmp_path, loss):
    settings = {"max_steps": 4, "loss_type": loss, "config": TrlLossConfig, **NEEDS.get(loss, {"label_smoothing": 0.0})}
    if loss in ("robust", "aot"):
        settings["label_smoothing"] = 0.2
    ours = make_trainer(trainer=TrlLossTrainer, **settings)
    theirs = make_trainer(trainer=TokenisedDPOTrainer, output_dir=str(tmp_path / "trl"), **settings)
    ours.train()
    theirs.train()
    assert_same_logs(ours, theirs, 4)
    assert_same(ours.model, theirs.model, atol=5e-6)
    steps = read_steps(ours.args.output_dir)
    assert steps["loss"].tolist() == pytest.approx([log["loss"] for log in ours.state.log_history[:4]], abs=1e-4)
    assert (steps[["beta_before", "beta_after"]] == 0.1).all(axis=None)


def test_all_that_trls_loss_reads_of_its_trainer_is_there(tmp_path):
    """And nothing else: a release of TRL whose loss reads more, or less, is noticed before a loss is wrong."""
    loss = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss)))
    attributes = [node for node in ast.walk(loss) if isinstance(node, ast.Attribute)]

    def read_of(owner):
        return {node.attr for node in attributes if ast.unparse(node.value) == owner}

    args = TrlLossConfig(output_dir=str(tmp_path), loss_type="ipo", bf16=False, use_cpu=True)
    given = _TrlLoss(args, torch.device("cpu"))
    # The models come with each batch; the coefficient is of a loss that is switched off.
    assert read_of("self") == {*vars(given), "model", "ref_model", "router_aux_loss_coef"}
    # The last is of PEFT without a reference model, which is always given here.
    assert read_of("self.accelerator") == {*vars(given.accelerator), "unwrap_model"}
    assert read_of("outputs") <= {*vars(_Scored(torch.zeros(1)).output), "aux_loss", "log_sum_sq_probs"}


def test_the_losses_differ_from_each_other(make_trainer, tmp_path):
    """The comparison above would also pass if `loss_type` were ignored by both."""
    first_losses = set()
    for loss in ("hinge", "ipo", "sppo_hard", "bco_pair", "discopop"):
        trainer = make_trainer(
            trainer=TrlLossTrainer, config=TrlLossConfig, max_steps=1, loss_type=loss, output_dir=str(tmp_path / loss)
        )
        trainer.train()
        first_losses.add(round(read_steps(tmp_path / loss)["loss"][0], 3))
    assert len(first_losses) == 5


def test_micro_batches_do_not_matter_to_a_loss_of_pairs(make_trainer, tmp_path):
    runs = []
    for size in (1, 8):
        trainer = make_trainer(
            trainer=TrlLossTrainer,
            config=TrlLossConfig,
            loss_type="ipo",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=4,
            output_dir=str(tmp_path / str(size)),
        )
        trainer.train()
        runs.append(read_steps(tmp_path / str(size)).drop(columns="seconds"))
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoid"}, r"loss_type=\['sigmoid'\] is not one of hinge, ipo"),
        ({"loss_type": ["ipo", "sft"]}, r"loss_type=\['ipo', 'sft'\] is not one of"),
        ({"loss_type": "ipo", "epsilon_step": 0.1}, "cannot be combined with the losses of TRL: they keep β constant"),
        ({"loss_type": "ipo", "use_weighting": True}, "use_weighting=True"),
    ],
)
def test_nonsense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TrlLossConfig(output_dir=str(tmp_path), bf16=False, **settings)


# ------------------------------------------------------------------------------------------------------------- TR-DPO


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_reference_moves_as_trls_and_survives_a_checkpoint(make_trainer, tmp_path, alpha):
    settings = {
        "max_steps": 8,
        "epsilon_step": 0.0,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": alpha,
        "ref_model_sync_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    ours = make_trainer(**settings)
    theirs = make_trainer(trainer=TokenisedDPOTrainer, output_dir=str(tmp_path / "trl"), **settings)
    ours.train()
    theirs.train()
    assert_same_logs(ours, theirs, 8)
    assert_same(ours.ref_model, theirs.ref_model, atol=5e-6)
    if alpha == 1.0:
        assert_same(ours.ref_model, ours.model, atol=0.0)  # the last synchronisation was in the last step

    checkpoint = tmp_path / "run" / "checkpoint-3"
    resumed = make_trainer(**{**settings, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = read_steps(tmp_path / "run").drop(columns="seconds").iloc[3:]
    np.testing.assert_array_equal(read_steps(tmp_path / "resumed").drop(columns="seconds"), expected)
    assert_same(resumed.ref_model, ours.ref_model, atol=0.0)
    (checkpoint / REFERENCE_FILE).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-3 holds no {REFERENCE_FILE}"):
        make_trainer(**settings).train(resume_from_checkpoint=str(checkpoint))


# ------------------------------------------------------------------------------------------------- TRL's other trainers


@pytest.fixture
def texts(official):
    lines = (official / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    return Dataset.from_list([json.loads(line) for line in lines])


def common(tmp_path, **settings):
    return {
        "output_dir": str(tmp_path),
        "beta": 0.1,
        "max_length": 24,  # cuts some completions
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "optim": "adamw_torch",
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }


def as_prepared(rows):
    """TRL's own tokenisation of its trainer's rows, as our prepared pairs have it; uncut, with an end token."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_input_ids"],
                "chosen_ids": [token for token in row["chosen_labels"] if token != -100],
                "rejected_ids": [token for token in row["rejected_labels"] if token != -100],
            }
            for row in rows
        ]
    )


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.3}),
        ("cpo", {"cpo_alpha": 0.5}),
        ("orpo", {}),
    ],
)
def test_reference_free_methods_are_trls(official, official_tokenizer, texts, tmp_path, method, settings):
    """TRL's trainer tokenises the texts; ours gets those ids, makes the same rows of them, and trains alike."""
    trl_trainer, trl_config = (ORPOTrainer, ORPOConfig) if method == "orpo" else (CPOTrainer, CPOConfig)
    uncut = trl_trainer(
        model=AutoModelForCausalLM.from_pretrained(official / "policy"),
        args=trl_config(**common(tmp_path / "uncut", **{**settings, "max_length": 512})),
        train_dataset=texts,
        processing_class=official_tokenizer,
    )
    theirs = trl_trainer(
        model=AutoModelForCausalLM.from_pretrained(official / "policy"),
        args=trl_config(**common(tmp_path / "trl", **settings)),
        train_dataset=texts,
        processing_class=official_tokenizer,
    )
    ours = trainer_class(method)(
        model=str(official / "policy"),
        args=config_class(method)(**common(tmp_path / "ours", model_init_kwargs={"dtype": "float32"}, **settings)),
        train_dataset=as_prepared(uncut.train_dataset),
        eval_dataset=None,
        processing_class=official_tokenizer,
    )
    for our_row, their_row in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        for side, part in itertools.product(("chosen", "rejected"), ("input_ids", "attention_mask", "labels")):
            assert our_row[f"{side}_{part}"] == their_row[f"{side}_{part}"]
        assert our_row["prompt_input_ids"] == their_row["prompt_input_ids"]
    lengths = [len(row["chosen_input_ids"]) for row in theirs.train_dataset]
    assert max(lengths) == 24 > min(lengths)
    ours.train()
    theirs.train()
    assert_same_logs(ours, theirs, 6)
    assert_same(ours.model, theirs.model, atol=1e-6)
    steps = read_steps(tmp_path / "ours")
    assert steps["loss"].tolist() == pytest.approx([log["loss"] for log in theirs.state.log_history[:6]], abs=1e-4)
    for column, name in {"reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies"}.items():
        assert steps[column].tolist() == pytest.approx([log[name] for log in theirs.state.log_history[:6]], abs=1e-5)
    assert steps["pairs_seen"].tolist() == [8, 16, 24, 32, 40, 48]
    assert not hasattr(ours, "ref_model")
    # There is no reference, in the record as little as in TRL's own log, whose rewards are β log π.
    theirs.state.save_to_json(str(tmp_path / "trainer_state.json"))
    log = read_log(tmp_path / "trainer_state.json", beta=theirs.beta).steps
    for table in (steps, log):
        assert table["reward_margin"].notna().any() and table["chosen_log_ratio"].isna().all()
    assert of_run(tmp_path / "ours", steps).empty


def test_kto_is_trls(official, official_tokenizer, texts, tmp_path):
    """TRL unpairs texts; for a micro-batch of all pairs that gives our rows, and training is alike."""
    pairs = texts.select(range(6))
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_train_epochs": 4}
    numbered = pairs.add_column("number", list(range(6))).shuffle(seed=42)  # as our trainer shuffles
    theirs = TrlKTOTrainer(
        model=str(official / "policy"),
        args=TrlKTOConfig(**common(tmp_path / "trl", **{**settings, "per_device_train_batch_size": 12})),
        train_dataset=numbered,
        processing_class=official_tokenizer,
    )
    rows = list(theirs.train_dataset)
    halves = sorted(zip(rows[:6], rows[6:], strict=True), key=lambda half: half[0]["number"])
    prepared = Dataset.from_list(
        [
            {
                "prompt_ids": good["prompt_ids"],
                "chosen_ids": good["completion_ids"],
                "rejected_ids": bad["completion_ids"],
            }
            for good, bad in halves
        ]
    )
    ours = KTOTrainer(
        model=str(official / "policy"),
        args=KTOConfig(**common(tmp_path / "ours", **settings)),
        train_dataset=prepared,
        processing_class=official_tokenizer,
    )
    for our_row, their_row in zip(ours.train_dataset, rows, strict=True):
        assert our_row == {key: their_row[key] for key in our_row}
    ours.train()
    theirs.train()
    assert_same_logs(ours, theirs, 4)
    assert_same(ours.model, theirs.model, atol=1e-6)
    steps = read_steps(tmp_path / "ours")
    assert steps["pairs_seen"].tolist() == [6, 12, 18, 24]
    assert steps["reward_margin"].tolist() == pytest.approx(
        [log["rewards/margins"] for log in ours.state.log_history[:4]]
    )
    for side in ("chosen", "rejected"):
        rewards = [log[f"rewards/{side}"] for log in theirs.state.log_history[:4]]
        assert (steps[f"{side}_log_ratio"] * theirs.beta).tolist() == pytest.approx(rewards, abs=1e-5)
    apart = of_run(tmp_path / "ours", steps)  # from the steps, as rows of KTO are no pairs
    assert apart["measure"].value_counts().to_dict() == {"chosen": 4, "rejected": 4} and apart["low"].isna().all()
    with pytest.raises(ValueError, match="per_device_train_batch_size=1: KTO estimates its KL term"):
        KTOConfig(**common(tmp_path, per_device_train_batch_size=1))


def test_both_halves_of_a_pair_are_in_one_micro_batch_by_hand():
    pairs = Dataset.from_list([{"prompt_ids": [n], "chosen_ids": [n, 1], "rejected_ids": [n, 0]} for n in (5, 6, 7)])
    rows = list(unpaired(pairs, 2))
    assert [row["prompt_ids"] for row in rows] == [[5], [6], [5], [6], [7], [7]]
    assert [row["label"] for row in rows] == [True, True, False, False, True, False]
    assert [row["KL_completion_ids"] for row in rows[:4]] == [[6, 0], [5, 1], [6, 1], [5, 0]]  # of other prompts


# ------------------------------------------------------------------------------------------- one path and one record


@pytest.fixture(scope="module")
def experiment(official, tmp_path_factory):
    """Make an experiment of a method on local files, 6 steps of 8 pairs unless said otherwise."""
    model = save_official_model(tmp_path_factory.mktemp("models") / "model")

    def make(method, **settings):
        train_section = {
            "beta": 0.1,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "max_length": 128,
            "max_steps": 6,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            **NEEDS.get(method, {}),
            **settings,
        }
        data, model_section = {"source": str(official / "pairs.jsonl")}, {"name_or_path": str(model)}
        values = {"name": method, "method": method, "data": data, "model": model_section, "train": train_section}
        return check_experiment(values, "test")

    return make


@pytest.fixture(scope="module")
def prepared(experiment, tmp_path_factory):
    start = experiment("dpo")
    tokenizer = load_tokenizer(start)
    return prepare(start.data, tokenizer, tmp_path_factory.mktemp("data") / "data", max_length=128)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_record(experiment, prepared, tmp_path, capsys, method):
    model_dir = train(experiment(method, max_steps=3, logging_steps=1), prepared, tmp_path)
    AutoModelForCausalLM.from_pretrained(model_dir)
    assert capsys.readouterr().out.count("· β 0.") == 3  # a line of progress for each step
    steps, pairs, summary = read_steps(tmp_path), read_pairs(tmp_path), summarise(tmp_path)
    assert steps["step"].tolist() == [1, 2, 3] and steps["pairs_seen"].tolist() == [8, 16, 24]
    assert steps[["beta_before", "beta_after", "loss", "seconds"]].notna().all(axis=None)
    assert (steps["beta_after"].nunique() > 1) == (method in ("epsilon_dpo", "beta_dpo"))
    assert summary["pairs"] == 24
    if method in SHARED_PASS:
        assert len(pairs) == 24 and pairs["pair_id"].nunique() == 24
        assert steps[["relaxed", "tied", "tightened"]].sum(axis=1).tolist() == pytest.approx([1.0] * 3)
    else:
        assert pairs.empty and steps["relaxed"].isna().all() and math.isnan(summary["relaxed"])
        assert '"relaxed": null' in (tmp_path / "steps.jsonl").read_text()


class Stop(TrainerCallback):
    """Ends a run in the middle of its fifth step, as an interrupt does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["beta_dpo", "tr_dpo", "ipo", "simpo", "orpo", "kto"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(experiment, prepared, tmp_path, method):
    run = experiment(method, save_strategy="steps", save_steps=3, num_train_epochs=1)
    train(run, prepared, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, prepared, tmp_path / "cut", callbacks=[Stop()])
    assert len(read_steps(tmp_path / "cut")) == 4
    train(run, prepared, tmp_path / "cut")
    cut, whole = (read_steps(tmp_path / name).drop(columns="seconds") for name in ("cut", "whole"))
    pd.testing.assert_frame_equal(cut, whole, check_exact=True)
    pd.testing.assert_frame_equal(read_pairs(tmp_path / "cut"), read_pairs(tmp_path / "whole"), check_exact=True)
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, weight in load_file(tmp_path / "cut" / "model" / "model.safetensors").items():
        assert weight.equal(expected[name]), name


def test_methods_with_and_without_decisions_are_compared(experiment, prepared, tmp_path):
    methods = ("dpo", "beta_dpo", "simpo")
    for method in methods:
        train(experiment(method, max_steps=3), prepared, tmp_path / method)
    folders = [tmp_path / method for method in methods]
    table = in_words(compare(folders, methods).set_index("title").T)
    assert table.loc["relaxed", "simpo"] == "–" != table.loc["relaxed", "dpo"]
    runs = {method: read_steps(folder) for method, folder in zip(methods, folders, strict=True)}
    families = dict(zip(methods, methods, strict=True))
    assert len(beta_trajectory(runs, families, "title").axes[0].lines) == 3
    _, margin, accuracy = training_curves(runs, families).axes
    assert [text.get_text() for text in margin.texts] == ["not defined for simpo"] and len(margin.lines) == 4
    assert not accuracy.texts and len(accuracy.lines) == 6


@pytest.mark.parametrize("method", ["dpo", "kto", *REFERENCE_FREE])
def test_memory_is_estimated_without_a_reference_where_there_is_none(experiment, prepared, tmp_path, method):
    run = experiment(method)
    outlook = memory_outlook(run, trainer_arguments(run, prepared, tmp_path), prepared)
    assert (outlook.estimate.reference == 0) == (method in REFERENCE_FREE)
    assert outlook.setting.pairs == 4 and outlook.setting.sequences == 8
