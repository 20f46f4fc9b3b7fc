"""Names that the released code (trl 0.13, transformers 4.48) and recipes of its kind use, and what they are today.

Plain data. Configs, arguments in Python and `--set` all look here before they call a name unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

_NOTHING = "no longer exists, and nothing takes its place. Remove it"
_ADAPTERS = (
    "no longer exists: the reference of a PeftModel is a frozen copy of its adapter, and with peft_config (model.lora "
    "in a config) the model without its adapter. Remove it"
)
_MIXED = "no longer exists: precision is `bf16` or `fp16`. Remove it"

# Keys of the trainer's config -> what is said of them behind "key ".
FORMER_KEYS = {
    "warmup_ratio": "is called warmup_steps, of which a number below 1 is a share of all steps: warmup_steps 0.1",
    "max_prompt_length": "is data.max_prompt_length of a config, which epsdpo.data.prepared.prepare applies; the "
    "trainer cuts no prompts. Prepare the data with it, or remove it",
    "max_completion_length": "no longer exists: max_length cuts prompt and completion together. Set that",
    "max_target_length": "no longer exists: max_length cuts prompt and completion together. Set that",
    "reference_free": "no longer exists: method simpo, cpo or orpo has no reference, and ε-DPO needs one. Remove it",
    "force_use_ref_model": "no longer exists: a ref_model that is given is used. Remove it",
    "rpo_alpha": "no longer exists: TRL has the term as loss_type ['sigmoid', 'sft'] with loss_weights, for its own "
    "DPOTrainer; ε-DPO has a single loss. Remove it",
    "ref_adapter_name": _ADAPTERS,
    "model_adapter_name": _ADAPTERS,
    "ref_model_init_kwargs": "no longer exists: the reference is loaded as the policy is, by model_init_kwargs (the "
    "section model in a config). Remove it",
    "generate_during_eval": "no longer exists: the section evaluate of a config answers prompts after training, "
    "evaluate.checkpoints during it. Remove it",
    "is_encoder_decoder": "no longer exists: models are decoders. Remove it",
    "label_pad_token_id": _NOTHING,
    "padding_value": _NOTHING,
    "use_num_logits_to_keep": "no longer exists: only logits of completions are made, in tiles. Remove it",
    "evaluation_strategy": "is called eval_strategy",
    "no_cuda": "is called use_cpu",
    "use_mps_device": _NOTHING,
    "per_gpu_train_batch_size": "is called per_device_train_batch_size",
    "per_gpu_eval_batch_size": "is called per_device_eval_batch_size",
    "logging_dir": "no longer exists: set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "no longer exists: an interrupted run continues. Remove it, and delete the folder to begin "
    "anew",
    "save_safetensors": "no longer exists: weights are always saved so. Remove it",
    "fp16_backend": _MIXED,
    "half_precision_backend": _MIXED,
    "fp16_opt_level": _MIXED,
    "adafactor": "is optim: adafactor",
    "group_by_length": "is train_sampling_strategy, which has to be 'random' or 'sequential' here. Remove it",
    "dispatch_batches": "is in accelerator_config",
    "split_batches": "is in accelerator_config",
    "include_tokens_per_second": "is called include_num_input_tokens_seen",
    "include_inputs_for_metrics": "is called include_for_metrics",
    "push_to_hub_model_id": "is called hub_model_id",
    "push_to_hub_organization": "is a part of hub_model_id",
    "push_to_hub_token": "is the environment variable HF_TOKEN",
    "fsdp_min_num_params": "is in fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "is in fsdp_config",
    "torchdynamo": "is called torch_compile_backend",
    "jit_mode_eval": _NOTHING,
    "use_ipex": _NOTHING,
    "tpu_num_cores": _NOTHING,
    "tpu_metrics_debug": _NOTHING,
    "past_index": _NOTHING,
    "use_legacy_prediction_loop": _NOTHING,
    "mp_parameters": _NOTHING,
    "ray_scope": _NOTHING,
    "tools": "no longer exists: rows bring them in a column `tools`. Remove it",
    "beta_dpo": "is method: beta_dpo",
}

# Keys of recipes in the manner of the alignment handbook, which are flat.
_RECIPE_KEYS = {
    "model_name_or_path": "is called model.name_or_path",
    "model_revision": "is called model.revision",
    "torch_dtype": "is called model.dtype",
    "attn_implementation": "is called model.attn_implementation",
    "use_flash_attention_2": "is model.attn_implementation: flash_attention_2",
    "chat_template": "is called model.chat_template",
    "tokenizer_name_or_path": "no longer exists: the tokenizer is the model's. Remove it",
    "dataset_mixer": "is called data.source, which is one data set",
    "dataset_name": "is called data.source",
    "dataset_config": "is called data.subset",
    "dataset_configs": "is called data.subset",
    "dataset_splits": "are called data.train_split and data.eval_split",
    "preprocessing_num_workers": _NOTHING,
    "use_peft": "is the section model.lora",
    "lora_r": "is called model.lora.r",
    "lora_alpha": "is called model.lora.alpha",
    "lora_dropout": "is called model.lora.dropout",
    "lora_target_modules": "is called model.lora.target_modules",
    "load_in_4bit": "no longer exists: weights are not quantised here. Remove it",
    "load_in_8bit": "no longer exists: weights are not quantised here. Remove it",
}

# Keys of this kit's own configs, by their dotted names.
_FORMER_CONFIG_KEYS = {
    "evaluate.server.timeout": "is called evaluate.server.timeout_seconds",
    "evaluate.server.attempts": "is called evaluate.server.max_retries, which leaves out the first attempt: one less",
    "evaluate.server.backoff": "is called evaluate.server.backoff_seconds",
}

# Arguments of the trainer that are no keys of its config.
_FORMER_ARGUMENTS = {
    "tokenizer": "is called processing_class",
    "model_init": "no longer exists: give the model itself, or its name",
    "preprocess_logits_for_metrics": "no longer exists: logits are made in tiles, and never whole",
    "dataset_num_proc": "is an argument of EpsilonDPOConfig",
}


def former_key(name: str) -> str:
    """What a key of another time is today, as "key is called …"; "" for a name that never was one."""
    said = FORMER_KEYS.get(name) or _RECIPE_KEYS.get(name) or _FORMER_CONFIG_KEYS.get(name)
    return f"{name} {said}" if said else ""


def refuse_former_arguments(
    of: str, names: Iterable[str], known: Iterable[str], keys: Collection[str] | None = None
) -> None:
    """Refuse arguments by names that `of` does not know, where it can be said what they are today.

    Args:
        known: the names that it takes.
        keys: of a trainer, the names that its config takes.

    Raises:
        TypeError: naming each, and what to write. Of all other names Python will say itself that it knows none.
    """
    known, problems = set(known), []
    for name in (name for name in names if name not in known):
        if keys is not None and name in _FORMER_ARGUMENTS:
            problems.append(f"{name} {_FORMER_ARGUMENTS[name]}")
        elif keys is not None and name in keys:
            problems.append(f"{name} is an argument of EpsilonDPOConfig, which is given as args")
        elif said := former_key(name):
            problems.append(said)
    if problems:
        raise TypeError(f"{of}: {'; '.join(problems)}. See docs/moving.md")
