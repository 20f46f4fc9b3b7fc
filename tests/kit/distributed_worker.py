"""Training runs by name, in as many processes as started this file; `test_distributed.py` compares what they leave.

    accelerate launch --config_file FILE tests/kit/distributed_worker.py FOLDER NAME...

It knows how each run is set up. Every run leaves in FOLDER/NAME its record, `model/` and its log as `log.json`, and
those of `EQUAL` an evaluation from before training as `before.json`, where the launch permits one; some start from what
`write_models` wrote to the folder `models` beside FOLDER. A name that ends in `-resumed` is that run stopped in its
second epoch and continued by another trainer. Runs follow one another in one process because importing TRL takes longer
than any of them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTConfig, TrainerCallback

from epsdpo import EpsilonDPOTrainer
from epsdpo.methods.catalogue import config_class, trainer_class
from epsdpo.train.checkpoints import whole_checkpoints
from kit.official import OFFICIAL, tokenised_pairs

RESUMED, MODELS = "-resumed", "models"
LAST_STEP = 7  # of a run that is stopped; its newest checkpoint is of step 6, the first of the second epoch

# 35 pairs by 8 make five windows in an epoch. The last has 3 pairs, one less than two processes take at a time.
TRAIN_PAIRS, EVAL_PAIRS = range(35), range(80, 91)
SETTINGS = {
    "beta": 0.1,
    "epsilon": 0.05,
    "learning_rate": 1e-3,
    # Adam's default of 1e-8 makes whole steps of the rounding errors in a gradient near 0.
    "adam_epsilon": 1e-5,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1,
    "max_length": 128,
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def write_models(folder: Path) -> None:
    """Policies and references that are not among the test data. All processes load them, as no two draw alike."""
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    configs = {
        "tied": AutoConfig.from_pretrained(OFFICIAL / "policy", tie_word_embeddings=True),
        # accelerate does not find the last norm of this one, so that under FSDP2 the head is a shard by itself.
        "lone_head": OPTConfig(vocab_size=355, **size, num_attention_heads=2, dropout=0.0, tie_word_embeddings=False),
    }
    for name, config in configs.items():
        for seed, role in enumerate(("policy", "ref")):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name / role)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype),
        "ref_model": AutoModelForCausalLM.from_pretrained(folder / "ref", dtype=dtype),
    }


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **options)


def fresh_adapter() -> dict[str, Any]:
    return {"model": loaded(OFFICIAL)["model"], "peft_config": lora()}


def existing_adapter() -> dict[str, Any]:
    """An adapter that is no identity; TRL keeps a frozen copy of it as the reference."""
    torch.manual_seed(0)
    return {"model": get_peft_model(loaded(OFFICIAL)["model"], lora(init_lora_weights=False))}


# Name (a method, or a run of ε-DPO) -> models, made from the folder of `write_models`, and what differs from SETTINGS.
RUNS = {
    "plain": (lambda folder: loaded(OFFICIAL), {"num_train_epochs": 2, "eval_strategy": "epoch"}),
    "recomputed": (lambda folder: loaded(OFFICIAL), {"activation_checkpointing": True}),
    "tied": (lambda folder: loaded(folder / "tied"), {}),
    "lone_head": (lambda folder: loaded(folder / "lone_head"), {}),
    "fresh_adapter": (lambda folder: fresh_adapter(), {"num_train_epochs": 2}),
    "existing_adapter": (lambda folder: existing_adapter(), {}),
    "bfloat16": (lambda folder: loaded(OFFICIAL, torch.bfloat16), {"bf16": True}),
    "tr_dpo": (
        lambda folder: loaded(OFFICIAL),
        {"epsilon_step": 0.0, "sync_ref_model": True, "ref_model_sync_steps": 2, "num_train_epochs": 2},
    ),
    "beta_dpo": (lambda folder: loaded(OFFICIAL), {"num_train_epochs": 2}),
    "ipo": (lambda folder: loaded(OFFICIAL), {"loss_type": ["ipo"]}),
}
OTHER_METHODS = ("tr_dpo", "beta_dpo", "ipo")


def equal(dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy", dtype=dtype) for key in ("model", "ref_model")
    }


# Likewise, of a policy that is equal to its reference and stays so.
EQUAL = {
    "equal_autocast": (lambda folder: equal(torch.float32), {"bf16": True}),
    "equal_bfloat16": (lambda folder: equal(torch.bfloat16), {"bf16": True}),
    "equal_float32": (lambda folder: equal(torch.float32), {}),
    "equal_as_loaded": (lambda folder: equal(torch.bfloat16), {}),
    "equal_adapter_off": (lambda folder: fresh_adapter(), {"bf16": True}),
    "equal_adapter_copy": (lambda folder: existing_adapter(), {"bf16": True}),
}
RESTING = {"learning_rate": 0.0, "eval_strategy": "epoch"}


class BetasAgree(TrainerCallback):
    """Fails at the first step after which two processes hold a β that differs in any bit."""

    trainer: EpsilonDPOTrainer

    def on_step_end(self, args, state, control, **kwargs):
        accelerator, beta = self.trainer.accelerator, self.trainer.beta
        betas = accelerator.gather(torch.tensor([beta], dtype=torch.float64)).tolist()
        assert betas == [beta] * accelerator.num_processes, f"step {state.global_step}: {betas}"


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == LAST_STEP


def make_trainer(folder: Path, name: str, *callbacks: TrainerCallback) -> EpsilonDPOTrainer:
    models, settings = (RUNS | EQUAL)[name.removesuffix(RESUMED)]
    if name in EQUAL:
        settings = {**settings, **RESTING}
    if name.endswith(RESUMED):
        settings = {**settings, "save_strategy": "steps", "save_steps": 3}
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    pairs = tokenised_pairs(tokenizer)
    method = name.removesuffix(RESUMED)
    method = method if method in OTHER_METHODS else "epsilon_dpo"
    check = BetasAgree()
    check.trainer = trainer_class(method)(
        **models(folder.parent / MODELS),
        args=config_class(method)(output_dir=str(folder / name), **{**SETTINGS, **settings}),
        train_dataset=pairs.select(TRAIN_PAIRS),
        eval_dataset=pairs.select(EVAL_PAIRS),
        processing_class=tokenizer,
        callbacks=[check, *callbacks],
    )
    return check.trainer


def begin(folder: Path, name: str) -> None:
    make_trainer(folder, name, Stop()).train()


def finish(folder: Path, name: str) -> None:
    trainer = make_trainer(folder, name)
    checkpoint = next(reversed(whole_checkpoints(folder / name).values()), None)
    before = None
    # FSDP2 and DeepSpeed shard a policy together with its optimiser.
    if name in EQUAL and trainer.accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(folder / name / "model"))
    if trainer.is_world_process_zero():
        (folder / name / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
        if before is not None:
            (folder / name / "before.json").write_text(json.dumps([before]), encoding="utf-8")


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        # A run that another number of processes has begun is only continued here.
        if name.endswith(RESUMED) and not (folder / name).exists():
            begin(folder, name)
        finish(folder, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
