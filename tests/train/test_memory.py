"""The memory estimate against what torch allocates and against hand-counted sizes; advice when memory runs out."""

import dataclasses
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.train.memory import (
    MemoryOutlook,
    ModelShape,
    Setting,
    Sharding,
    estimate_memory,
    is_out_of_memory,
    longest_pair,
)

REPOSITORY = Path(__file__).parents[2]
SMALL = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4000,
    tie_word_embeddings=False,
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
PARAMETERS_8B = 8_030_261_248  # as its model card counts them
PAPER = Setting(
    model=ModelShape.of(LLAMA_3_8B),
    weight_bytes=2,
    mixed_precision=True,
    optim="adamw_torch",
    pairs=1,
    accumulation=8,
    tokens=2048,
    completion_tokens=1024,
    checkpointing=True,
    attention="sdpa",
)


def allocated(train):
    """Bytes that `train` had allocated at most, and at its end, above what there was before it."""
    gc.collect()  # models of earlier tests must not be freed in the middle of this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


@pytest.mark.parametrize(
    ("tokens", "dtype", "lora", "attention", "settings"),
    [
        (256, "float32", None, "sdpa", {}),
        (64, "float32", None, "sdpa", {"gradient_accumulation_steps": 2}),
        (512, "float32", None, "sdpa", {"activation_checkpointing": True, "gradient_accumulation_steps": 2}),
        (256, "float32", None, "eager", {}),
        (256, "bfloat16", None, "sdpa", {"bf16": True, "per_device_train_batch_size": 2}),
        (256, "float32", None, "sdpa", {"bf16": True}),
        (256, "float32", LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), "sdpa", {}),
    ],
)
def test_estimate_is_what_torch_allocates(
    tokens, dtype, lora, attention, settings, official_tokenizer, tmp_path, config=SMALL
):
    """Above the weights, within a fifth, over two optimiser steps; and the optimiser's state, which stays."""
    config = LlamaConfig(**config.to_diff_dict())
    config._attn_implementation = attention
    models = [LlamaForCausalLM(config).to(getattr(torch, dtype)) for _ in range(2 if lora is None else 1)]
    args = EpsilonDPOConfig(
        str(tmp_path),
        **{"per_device_train_batch_size": 1, "bf16": False, "activation_checkpointing": False, **settings},
        max_steps=2,
        max_length=tokens,
        optim="adamw_torch",
        model_init_kwargs={"dtype": dtype, "attn_implementation": attention},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    half = tokens // 2
    row = {"prompt_ids": [5] * half, "chosen_ids": [7] * half, "rejected_ids": [8, 9] * (half // 2 - 2)}
    pairs = Dataset.from_list([row] * 8)
    setting = Setting.of_run(ModelShape.of(config, lora), args, pairs)
    args.model_init_kwargs = None  # the models are given
    trainer = EpsilonDPOTrainer(
        *models, args=args, train_dataset=pairs, processing_class=official_tokenizer, peft_config=lora
    )
    estimate = estimate_memory(setting)
    peak, left = allocated(trainer.train)
    weights = sum(parameter.nbytes for model in models for parameter in model.parameters())
    assert estimate.policy + estimate.reference == pytest.approx(weights, rel=1e-3)
    assert estimate.optimiser == pytest.approx(left, rel=0.02, abs=2**16)
    assert 0.8 * peak < estimate.peak - weights < 1.2 * peak


def test_estimate_knows_the_second_gradient_of_a_tied_embedding(official_tokenizer, tmp_path):
    """Which is alive beside that of the head at the end of the backward pass: seen on a GPU with a small Llama."""
    config = LlamaConfig(**{**SMALL.to_diff_dict(), "tie_word_embeddings": True, "vocab_size": 20_000})
    config.num_hidden_layers = 1
    shape = ModelShape.of(config)
    assert shape.tied and not ModelShape.of(SMALL).tied
    test_estimate_is_what_torch_allocates(64, "float32", None, "sdpa", {}, official_tokenizer, tmp_path, config)


def test_counts_are_those_of_the_models():
    shape = ModelShape.of(LLAMA_3_8B)
    assert shape.parameters == shape.trainable == PARAMETERS_8B
    # q and o, k and v, the three matrices of the MLP, two norms.
    assert shape.layer == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert shape.outside_layers == 2 * 128256 * 4096 + 4096
    adapted = ModelShape.of(LLAMA_3_8B, LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert adapted.trainable == 32 * 8 * (4096 + 4096) and not adapted.trains_head
    assert ModelShape.of(GPT2Config()).parameters == 124_439_808  # tied: the head is the embedding


@pytest.mark.parametrize(
    ("sharding", "bytes_per_parameter"),
    [
        # policy, reference, gradients, optimiser: AdamW in the dtype of the weights
        (Sharding(), (2, 2, 2, 4)),
        (Sharding("DDP", 8), (2, 2, 2, 4)),
        # DeepSpeed's optimiser holds the weights and two moments in float32
        (Sharding("ZeRO-2", 8), (2, 2, 2 / 8, 12 / 8)),
        (Sharding("ZeRO-3", 16), (2 / 16, 2 / 16, 2 / 16, 12 / 16)),
        # accelerate has FSDP train in float32
        (Sharding("FSDP", 8), (4 / 8, 2 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_shares_of_llama_3_8b(sharding, bytes_per_parameter):
    estimate = estimate_memory(dataclasses.replace(PAPER, sharding=sharding))
    parts = (estimate.policy, estimate.reference, estimate.gradients, estimate.optimiser)
    assert parts == pytest.approx([share * PARAMETERS_8B for share in bytes_per_parameter])


def test_paper_run_fits_where_the_paper_ran_it():
    """16 A100 of 40 GB under ZeRO-3; not on one GPU of 80 GB, where 16 bytes a parameter alone are 128 GB."""
    sharded = estimate_memory(dataclasses.replace(PAPER, sharding=Sharding("ZeRO-3", 16))).peak
    assert sharded < 40e9
    assert estimate_memory(PAPER).peak > 80e9


@pytest.mark.parametrize(
    ("optim", "dtype", "bytes_per_parameter"),
    [("adamw_torch", 4, 8), ("adamw_torch_fused", 2, 4), ("adamw_8bit", 4, 2), ("sgd", 4, 0), ("lion_32bit", 2, 4)],
)
def test_optimiser_state(optim, dtype, bytes_per_parameter):
    setting = dataclasses.replace(PAPER, optim=optim, weight_bytes=dtype, mixed_precision=False)
    assert estimate_memory(setting).optimiser == bytes_per_parameter * PARAMETERS_8B


def test_longest_pair_counts_sides_apart_and_is_cut():
    rows = [
        {"prompt_ids": [0] * 9, "chosen_ids": [0] * 2, "rejected_ids": [0] * 3},
        {"prompt_ids": [0] * 1, "chosen_ids": [0] * 8, "rejected_ids": [0] * 1},
        {"prompt_ids": [0] * 99, "chosen_ids": [0], "rejected_ids": [0]},
    ]
    data = Dataset.from_list(rows)
    assert longest_pair(data.select([0, 1]), None) == (12, 8)
    assert longest_pair(data.select([0, 1]), 5) == (5, 5)
    assert longest_pair(data, 64) == (64, 8)


def outlook(available, **changes):
    return MemoryOutlook(dataclasses.replace(PAPER, **changes), LLAMA_3_8B, available, "free on cuda:0")


def test_warning_names_what_is_not_in_force_and_the_harmless_first():
    run = outlook(int(80e9), pairs=4, checkpointing=False, attention="eager", weight_bytes=4, mixed_precision=False)
    assert not run.fits
    assert "but there are 74.5 GiB free on cuda:0" in run.warning()
    advice = [line for line in run.warning().splitlines() if line.startswith("  - ")]
    for line, start in zip(
        advice,
        [
            "train.per_device_train_batch_size: 2 in place of 4",
            "model.attn_implementation: sdpa",
            "train.activation_checkpointing: true",
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml (or zero3.yaml) --num_processes 2",
            "model.dtype: bfloat16 with train.bf16: true",
            "adapters in place of all weights",
            "train.max_length: 1024 (the longest pair has 2048)",
        ],
        strict=True,
    ):
        assert line.startswith(f"  - {start}") and "(saves about " in line


def test_advice_is_silent_on_what_is_in_force_or_saves_nothing():
    run = outlook(int(80e9), sharding=Sharding("ZeRO-3", 16))
    assert run.fits
    assert "--num_processes 32" in run.advice()
    for key in ("batch_size", "attn_implementation", "checkpointing", "bfloat16"):
        assert key not in run.advice()
    assert not outlook(int(30e9), sharding=Sharding("ZeRO-3", 4)).fits
    assert outlook(None).fits  # nothing is known of the device, so nothing is warned of


def test_saving_is_what_the_estimate_changes_by():
    run = outlook(int(80e9), checkpointing=False)
    saved = run.estimate.peak - estimate_memory(PAPER).peak
    line = next(line for line in run.advice().splitlines() if "activation_checkpointing" in line)
    assert f"(saves about {saved / 2**30:.1f} GiB)" in line


def test_only_failed_allocations_are_taken_for_them():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


CONFINED = """
import resource, sys
from pathlib import Path
from epsdpo.train.preferences import main
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, to confine a process to its memory")
def test_out_of_memory_ends_with_settings_that_need_less(official, official_tokenizer, tmp_path):
    """Real allocations fail: activations take about 1.3 GiB, and the process may take 0.8 GiB more."""
    model = tmp_path / "model"
    shape = LlamaConfig.from_pretrained(official / "policy", intermediate_size=32768)
    LlamaForCausalLM(shape).save_pretrained(model)
    official_tokenizer.save_pretrained(model)
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(official / "pairs.jsonl")},
        "model": {"name_or_path": str(model)},
        "train": {
            "global_batch_size": 16,
            "per_device_train_batch_size": 16,
            "max_length": 128,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
        },
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", CONFINED, str(800 * 2**20), "--config", str(config), "--output", str(tmp_path / "out")],
        cwd=REPOSITORY,
        # Each arena of glibc reserves address space, which is what is confined.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 3, ended.stderr
    assert "Estimated memory of this process: 32 sequences of up to 41 tokens" in ended.stderr
    message = ended.stderr[ended.stderr.index("out of memory in optimiser step 1 of 18") :]
    assert "DefaultCPUAllocator" in message and "Traceback" not in ended.stderr
    places = [
        message.index(text)
        for text in (
            "train.per_device_train_batch_size: 8 in place of 16",
            "train.activation_checkpointing: true",
            "train.max_length: 20 (the longest pair has 41)",
        )
    ]
    assert places == sorted(places)
    assert "accelerate launch" not in message  # processes on one CPU share its memory
