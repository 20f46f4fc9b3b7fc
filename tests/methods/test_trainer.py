"""The trainer against TRL's own, hand-computed β, and what must not matter: batching, padding, evaluation."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.methods.heads import require_separable_head
from epsdpo.methods.method_config import accumulation_steps
from epsdpo.methods.record import read_pairs, read_steps


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(one, other, rtol=0.0, atol=1e-6):
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=rtol, atol=atol, msg=name)


@pytest.fixture
def trl_trainer(make_trainer):
    """TRL's own DPOTrainer on the same models, data and arguments."""

    def make(**settings):
        class TokenisedDPOTrainer(DPOTrainer):
            def _prepare_dataset(self, dataset, *args):
                return dataset

        return make_trainer(trainer=TokenisedDPOTrainer, **settings)

    return make


# TRL averages these over micro-batches; here they are over all tokens of the step, so that batching does not matter.
PER_TOKEN = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("settings", [{"epsilon": 1e-6}, {"epsilon": 0.3, "epsilon_step": 0.0}])
def test_vanishing_steps_are_trls_dpo(make_trainer, trl_trainer, tmp_path, settings, accumulation):
    """With ε → 0, or with steps of size 0, nothing is left of ε-DPO: losses, metrics and weights are TRL's."""
    ours = make_trainer(max_steps=12, gradient_accumulation_steps=accumulation, **settings)
    theirs = trl_trainer(max_steps=12, gradient_accumulation_steps=accumulation, output_dir=str(tmp_path / "trl"))
    ours.train()
    theirs.train()
    assert_same_weights(ours, theirs, atol=2e-6)
    shared = {key for key in theirs.state.log_history[0] if key not in ("step", "epoch")}
    assert {"rewards/margins", "num_tokens", *PER_TOKEN} <= shared
    for our_log, their_log in zip(ours.state.log_history[:12], theirs.state.log_history[:12], strict=True):
        assert shared <= set(our_log)
        for key in shared - (PER_TOKEN if accumulation > 1 else set()):
            assert our_log[key] == pytest.approx(their_log[key], rel=2e-4, abs=2e-5), key


def test_epsilon_does_change_the_run(make_trainer, tmp_path):
    """The comparison above would also pass if ε were ignored."""
    runs = [
        make_trainer(max_steps=8, epsilon=epsilon, output_dir=str(tmp_path / str(epsilon))) for epsilon in (1e-6, 0.3)
    ]
    for trainer in runs:
        trainer.train()
    assert abs(runs[0].beta / 0.1 - 1) < 1e-4 < abs(runs[1].beta / 0.1 - 1)
    with pytest.raises(AssertionError):
        assert_same_weights(*runs)


@pytest.mark.parametrize("rule", ["mean_step", "mean_beta"])
def test_beta_follows_from_the_recorded_decisions(make_trainer, official_pairs, rule):
    """β recomputed by hand from each step's decisions, with a last window of 2 of 8 pairs."""
    trainer = make_trainer(
        official_pairs.select(range(18)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        epsilon=0.05,
        epsilon_step=0.2,
        beta_update=rule,
    )
    trainer.train()
    steps, pairs = read_steps(trainer.args.output_dir), read_pairs(trainer.args.output_dir)
    assert pairs.groupby("step").size().tolist() == [8, 8, 2] * 2
    beta = 0.1
    for row in steps.itertuples():
        decisions = pairs.loc[pairs["step"] == row.step, "decision"].to_numpy()
        pair_betas = beta / (1 + 0.2 * decisions)
        assert row.beta_before == pytest.approx(beta, rel=1e-12)
        np.testing.assert_allclose(pairs.loc[pairs["step"] == row.step, "beta"], pair_betas, rtol=1e-6)
        beta = beta / (1 + 0.2 * decisions.mean()) if rule == "mean_step" else pair_betas.mean()
        assert row.beta_after == pytest.approx(beta, rel=1e-6)
        margins = pairs.loc[pairs["step"] == row.step, "reward_margin"].to_numpy()
        assert row.loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert set(pairs["decision"]) == {-1, 1} or set(pairs["decision"]) == {-1, 0, 1}
    assert steps["pairs_seen"].tolist() == [8, 16, 18, 26, 34, 36]


def test_micro_batches_do_not_matter(make_trainer, tmp_path):
    """8 batches of one pair and one batch of 8 give the same decisions, β, losses and weights."""
    runs = []
    for size in (1, 8):
        trainer = make_trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=6,
            epsilon=0.1,
            output_dir=str(tmp_path / str(size)),
        )
        trainer.train()
        runs.append(trainer)
    one, eight = (read_steps(trainer.args.output_dir).drop(columns="seconds") for trainer in runs)
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5)
    assert read_pairs(runs[0].args.output_dir)["decision"].equals(read_pairs(runs[1].args.output_dir)["decision"])
    assert_same_weights(*runs, atol=5e-6)


def test_padding_does_not_matter(make_trainer, tmp_path):
    runs = []
    for multiple in (None, 64):
        trainer = make_trainer(max_steps=6, pad_to_multiple_of=multiple, output_dir=str(tmp_path / str(multiple)))
        trainer.train()
        runs.append(read_pairs(trainer.args.output_dir))
    assert runs[0]["decision"].equals(runs[1]["decision"])
    np.testing.assert_allclose(runs[0]["log_ratio_margin"], runs[1]["log_ratio_margin"], atol=1e-4)


def test_evaluation_reports_the_decisions_and_leaves_beta_alone(make_trainer, official_pairs, tmp_path):
    settings = {"max_steps": 6, "epsilon": 0.1}
    plain = make_trainer(output_dir=str(tmp_path / "plain"), **settings)
    plain.train()
    evaluated = make_trainer(
        eval_pairs=official_pairs.select(range(80, 96)), eval_strategy="steps", eval_steps=1, **settings
    )
    evaluated.train()
    assert evaluated.beta == plain.beta
    assert_same_weights(evaluated, plain, atol=0.0)
    logs = [log for log in evaluated.state.log_history if "eval_loss" in log]
    betas = read_steps(evaluated.args.output_dir)["beta_after"].tolist()
    assert [log["eval_kl/beta"] for log in logs] == betas
    for log in logs:
        assert log["eval_kl/p_epsilon_steps"] - log["eval_kl/n_epsilon_steps"] == pytest.approx(
            log["eval_kl/avg_steps"]
        )
    assert len(read_pairs(evaluated.args.output_dir)) == 6 * 4  # evaluated pairs are not part of the record


def test_equal_policy_and_reference_tie(make_trainer, official):
    trainer = make_trainer(max_steps=2)
    trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(official / "policy").state_dict())
    trainer.train()
    steps = read_steps(trainer.args.output_dir)
    assert steps["tied"][0] == 1.0 and steps["beta_after"][0] == 0.1
    assert steps["loss"][0] == pytest.approx(math.log(2))


def test_metrics_reach_every_tracker(make_trainer):
    """What `report_to` names gets its numbers through `on_log`, as this callback does."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(max_steps=4, callbacks=[Tracker()])
    trainer.train()
    steps = read_steps(trainer.args.output_dir)
    for name, column in {
        "kl/beta": "beta_before",
        "kl/p_epsilon_steps": "relaxed",
        "kl/n_epsilon_steps": "tightened",
        "kl/avg_steps": "mean_step",
        "rewards/margins": "reward_margin",
        "rewards/accuracies": "reward_accuracy",
    }.items():
        assert [log[name] for log in seen[:4]] == pytest.approx(steps[column].tolist(), abs=1e-6), name


def test_record_names_pairs_as_the_data_does(make_trainer):
    trainer = make_trainer(num_train_epochs=1, train_sampling_strategy="random")
    trainer.train()
    pairs = read_pairs(trainer.args.output_dir)
    assert sorted(pairs["pair_id"]) == sorted(f"pair-{number}" for number in range(96))
    assert pairs["pair_id"].tolist() != [f"pair-{number}" for number in range(96)]
    lengths = {row["pair_id"]: len(row["chosen_ids"]) for row in trainer.train_dataset}
    assert pairs["chosen_tokens"].tolist() == [lengths[pair_id] for pair_id in pairs["pair_id"]]


def test_lora_with_the_base_model_as_reference(official, official_tokenizer, official_pairs, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(official / "policy")
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    trainer = EpsilonDPOTrainer(
        model=base,
        args=EpsilonDPOConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            learning_rate=1e-3,
            bf16=False,
            activation_checkpointing=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=official_pairs,
        processing_class=official_tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    steps = read_steps(tmp_path)
    assert steps["tied"][0] == 1.0  # a fresh adapter is the identity
    assert steps["loss"][0] == pytest.approx(math.log(2))
    assert steps["tied"].iloc[-1] < 1.0
    for name, parameter in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert plain not in before or torch.equal(parameter, before[plain]), name
        assert "lora_B" not in name or parameter.abs().max() > 0, name


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "tell me about the soup:", "chosen": " the chef cooks", "rejected": " a robot paints the clock"},
        {"chosen": "tell me about the soup: the chef cooks", "rejected": "tell me about the soup: a robot"},
    ],
)
def test_trl_formats_are_tokenised_by_trl(make_trainer, row):
    trainer = make_trainer(Dataset.from_list([row] * 8), max_steps=2)
    trainer.train()
    assert read_pairs(trainer.args.output_dir)["pair_id"].tolist() == [str(number) for number in range(8)]


def test_streamed_data_are_numbered_as_they_come(make_trainer, official_pairs):
    trainer = make_trainer(official_pairs.to_iterable_dataset(), max_steps=3)
    trainer.train()
    assert read_pairs(trainer.args.output_dir)["pair_id"].tolist() == [str(number) for number in range(12)]


def test_nonfinite_loss_stops_with_step_beta_and_pairs(make_trainer):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data.fill_(float("nan"))

    trainer = make_trainer(max_steps=6, callbacks=[Break()])
    with pytest.raises(FloatingPointError, match=r"after optimiser step 2 \(pairs pair-8, .*β 0\.1"):
        trainer.train()
    assert len(read_steps(trainer.args.output_dir)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon=0\.0 must lie in \(0, 1\)"),
        ({"epsilon": 1.0}, r"epsilon=1\.0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"epsilon_step": -0.1}, r"epsilon_step=-0\.1"),
        ({"epsilon_step": 1.0}, r"epsilon_step=1\.0"),
        ({"beta": 0.0}, r"beta=0\.0 must be positive"),
        ({"criterion_dtype": "float8"}, "criterion_dtype='float8'"),
        ({"beta_update": "median"}, "beta_update='median'"),
        ({"loss_type": "ipo"}, r"loss_type=\['ipo'\]"),
        ({"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sigmoid', 'sft'\]"),
        ({"loss_weights": [0.5]}, r"loss_weights=\[0\.5\]"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True"),
        ({"label_smoothing": 0.1}, r"label_smoothing=0\.1"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence'"),
        ({"ld_alpha": 0.5}, r"ld_alpha=0\.5"),
        ({"use_weighting": True}, "use_weighting=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
    ],
)
def test_nonsense_is_refused_by_value_with_a_remedy(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        EpsilonDPOConfig(output_dir=str(tmp_path), bf16=False, **settings)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.float32, False), (torch.bfloat16, True)])
def test_weights_without_masters_are_warned_of(make_trainer, caplog, dtype, lost):
    make_trainer(max_steps=1, dtype=dtype)
    assert ("trained in bfloat16 without float32 masters" in caplog.text) == lost


def test_trl_config_is_refused(official, official_pairs, tmp_path):
    with pytest.raises(TypeError, match=r"args is a trl.DPOConfig; EpsilonDPOTrainer needs an epsdpo.EpsilonDPOConfig"):
        EpsilonDPOTrainer(
            str(official / "policy"), args=DPOConfig(str(tmp_path), bf16=False), train_dataset=official_pairs
        )


def test_epsilon_step_defaults_to_epsilon(tmp_path):
    assert EpsilonDPOConfig(str(tmp_path), bf16=False, epsilon=0.03).epsilon_step == 0.03


@pytest.mark.parametrize(
    ("processes", "per_device", "steps"), [(1, 8, 16), (1, 128, 1), (2, 1, 64), (16, 1, 8), (16, 8, 1)]
)
def test_accumulation_follows_from_the_global_batch(processes, per_device, steps):
    """Hand-computed, on the arithmetic alone: real processes train in tests/distributed."""
    assert accumulation_steps(128, per_device, processes) == steps


@pytest.mark.parametrize(
    ("processes", "per_device", "message"),
    [
        (1, 5, r"global_batch_size=12 cannot be split over 1 process with per_device_train_batch_size=5"),
        (1, 24, r"over 1 process with per_device_train_batch_size=24. Set .* to 1 or 2 or 3 or 4 or 6 or 12; it"),
        (4, 2, r"over 4 processes with per_device_train_batch_size=2. Set per_device_train_batch_size to 1 or 3;"),
        (5, 1, r"Start a number of processes that divides it: 1 or 2 or 3 or 4 or 6 or 12"),
        (24, 1, r"Start a number of processes that divides it"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(processes, per_device, message):
    with pytest.raises(ValueError, match=message):
        accumulation_steps(12, per_device, processes)


def test_a_padded_vocabulary_serves_and_two_different_ones_are_refused(make_trainer, official, tmp_path):
    """Rows of the head that no token has count in the softmax, as in the model's own forward."""
    for name in ("policy", "ref"):
        model = AutoModelForCausalLM.from_pretrained(official / name)
        model.resize_token_embeddings(model.config.vocab_size + 37, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
    plain, load = make_trainer(max_steps=1), AutoModelForCausalLM.from_pretrained
    settings = {"args": plain.args, "train_dataset": plain.train_dataset, "processing_class": plain.processing_class}
    with pytest.raises(
        ValueError, match=r"the policy has \d+ output tokens and the reference \d+\. Give both the same"
    ):
        EpsilonDPOTrainer(load(tmp_path / "policy"), load(official / "ref"), **settings)
    padded = EpsilonDPOTrainer(load(tmp_path / "policy"), load(tmp_path / "ref"), **settings)
    padded.train()
    batch = padded.data_collator([padded.train_dataset[0]])
    with torch.no_grad():
        logits = load(tmp_path / "ref")(batch["input_ids"]).logits[0, :-1]
    logps = logits.log_softmax(-1).gather(1, batch["input_ids"][0, 1:, None]).squeeze(1)
    expected = (logps * batch["completion_mask"][0, 1:]).sum()
    assert read_pairs(plain.args.output_dir)["ref_chosen_logps"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_models_without_a_separable_head_are_refused():
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        require_separable_head(encoder_decoder)
    with pytest.raises(ValueError, match="LlamaModel has no separate backbone and output head"):
        require_separable_head(
            LlamaModel(LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        )
