"""Policy and reference are computed in the same arithmetic: where they are equal, nothing tells them apart.

Exactly: every margin is 0, every loss log 2, every decision a tie, every divergence 0. Two processes are looked at in
`distributed` and `with_deepspeed`. float16 as mixed precision needs a GPU; float16 weights do not.
"""

import pytest
import torch
from kit.distributed_worker import lora
from kit.launching import LOG_2, assert_nothing_tells_apart
from kit.official import OFFICIAL
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.evaluation.kl import sequence_kl
from epsdpo.methods.catalogue import config_class, trainer_class
from epsdpo.methods.heads import expose_hidden_states
from epsdpo.methods.kernels import EXACT
from epsdpo.paper.frozen import decisions_at, precision_of
from epsdpo.paper.precision.decisions import criterion_sums
from epsdpo.paper.precision.rounding import decisions

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
AUTOCAST, AS_LOADED = True, False


def load(dtype, **options):
    return AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy", dtype=dtype, **options)


def own_reference(dtype):
    return {"model": load(dtype), "ref_model": load(dtype)}


def adapter_off(dtype):
    return {"model": load(dtype), "peft_config": lora()}


def adapter_copy(dtype):
    return {"model": adapted(dtype, "q_proj")}


def adapter_copy_with_embeddings(dtype):
    return {"model": adapted(dtype, "q_proj", "embed_tokens", autocast_adapter_dtype=False)}


def adapted(dtype, *targets, **options):
    torch.manual_seed(0)
    settings = lora(init_lora_weights=False)
    settings.target_modules = list(targets)
    return get_peft_model(load(dtype), settings, **options)


@pytest.fixture
def make_resting(make_trainer, official_pairs):
    """A trainer, of any method, whose learning rate of 0 leaves the policy what it is."""

    def make(models, method="epsilon_dpo", **settings):
        return make_trainer(
            official_pairs.select(range(8)),
            official_pairs.select(range(80, 86)),
            models=models,
            trainer=trainer_class(method),
            config=config_class(method),
            **{
                "learning_rate": 0.0,
                "optim": "sgd",  # Adam divides by a number that is 0 in float16
                "max_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                **settings,
            },
        )

    return make


@pytest.mark.parametrize(
    ("reference", "dtype", "bf16"),
    [
        (own_reference, FLOAT32, AUTOCAST),
        (own_reference, FLOAT32, AS_LOADED),
        (own_reference, BFLOAT16, AUTOCAST),
        (own_reference, BFLOAT16, AS_LOADED),
        (own_reference, FLOAT16, AUTOCAST),
        (own_reference, FLOAT16, AS_LOADED),
        (adapter_off, FLOAT32, AUTOCAST),
        (adapter_off, BFLOAT16, AS_LOADED),
        (adapter_off, FLOAT16, AS_LOADED),
        (adapter_copy, FLOAT32, AUTOCAST),
        (adapter_copy, BFLOAT16, AS_LOADED),
        (adapter_copy_with_embeddings, FLOAT32, AUTOCAST),
        (adapter_copy_with_embeddings, BFLOAT16, AS_LOADED),
    ],
    ids=lambda value: getattr(value, "__name__", {AUTOCAST: "autocast"}.get(value, str(value))),
)
def test_equal_models_tie(make_resting, reference, dtype, bf16):
    """Evaluated before, within and after training."""
    trainer = make_resting(reference(dtype), bf16=bf16)
    before = trainer.evaluate()
    trainer.train()
    within = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert_nothing_tells_apart(trainer.args.output_dir, [before, *within, trainer.evaluate()])


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_a_whole_evaluation_in_half_precision_casts_both_models(make_resting, option):
    """What transformers does with the policy alone, and outside training only."""
    trainer = make_resting(own_reference(FLOAT32), **{option: True})
    log = trainer.evaluate()
    assert (log["eval_loss"], log["eval_rewards/margins"]) == (LOG_2, 0.0)
    assert trainer.model.dtype == trainer.ref_model.dtype != torch.float32


@pytest.mark.parametrize("method", ["dpo", "beta_dpo", "tr_dpo", "ipo", "robust", "kto"])
def test_all_methods_share_it(make_resting, method):
    settings = {
        "dpo": {"epsilon_step": 0.0},
        "tr_dpo": {
            "epsilon_step": 0.0,
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "ref_model_mixup_alpha": 1.0,  # a mixture of equal weights is rounded
        },
        "ipo": {"loss_type": ["ipo"]},
        "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    }
    trainer = make_resting(own_reference(FLOAT32), method, bf16=True, **settings.get(method, {}))
    trainer.evaluate()
    evaluated = dict(trainer.state.log_history[-1])
    trainer.train()
    for log, prefix in [(evaluated, "eval_"), *((log, "") for log in trainer.state.log_history if "loss" in log)]:
        assert log[f"{prefix}rewards/chosen"] == log[f"{prefix}rewards/margins"] == 0.0


def test_models_that_round_differently_are_refused(make_resting):
    in_two = {"model": load(FLOAT32), "ref_model": load(BFLOAT16)}
    message = r"the policy's weights are in float32 and the reference's in bfloat16: .*\. Load both in the same dtype"
    for method in ("epsilon_dpo", "kto"):
        with pytest.raises(ValueError, match=message):
            make_resting(in_two, method)
    with pytest.raises(ValueError, match=message):  # a reference that TRL loads by the policy's name
        make_resting({"model": load(FLOAT32)}, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"attention is 'sdpa' and the reference's 'eager', .* same attn_implementation"
    ):
        make_resting({"model": load(FLOAT32), "ref_model": load(FLOAT32, attn_implementation="eager")})


def measured(policy, reference, official_pairs):
    """What each way to compare two models outside training says of a few pairs; 0 where nothing tells them apart."""
    rows = official_pairs.select(range(6)).to_list()
    batch = DataCollatorForPreference(pad_token_id=0, max_length=128)(rows)
    for model in {policy, reference}:
        expose_hidden_states(model.eval())
    (sums,) = criterion_sums(policy, reference, batch, [0.1])
    yield decisions(sums.exact)
    yield decisions_at(policy, reference, batch, [0.01, 0.1], EXACT)
    yield sequence_kl(policy, reference, [(row["prompt_ids"], row["chosen_ids"]) for row in rows], batch_size=3).nats


@pytest.mark.parametrize("bf16", [AUTOCAST, AS_LOADED])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_equal_models_tie_outside_training(make_trainer, official_pairs, tmp_path, dtype, bf16):
    arguments = config_class("epsilon_dpo")(str(tmp_path), bf16=bf16, use_cpu=True)
    with precision_of(arguments):
        for values in measured(load(dtype), load(dtype), official_pairs):
            assert (values == 0).all()


def test_models_that_round_differently_are_refused_outside_training(official_pairs):
    policy, reference = load(FLOAT32), load(BFLOAT16)
    for model in (policy, reference):
        expose_hidden_states(model)
    batch = DataCollatorForPreference(pad_token_id=0, max_length=128)(official_pairs.select(range(2)).to_list())
    for compare in (
        lambda: criterion_sums(policy, reference, batch, [0.1]),
        lambda: decisions_at(policy, reference, batch, [0.1], EXACT),
        lambda: sequence_kl(policy, reference, [([1], [2, 3])], batch_size=1),
    ):
        with pytest.raises(ValueError, match="Load both in the same dtype"):
            compare()
