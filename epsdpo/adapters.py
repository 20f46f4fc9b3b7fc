"""LoRA adapters: from the config's section to PEFT's, and from a trained adapter to a model that needs no PEFT.

Training with them is the business of the trainers; that nobody behind training has to know of them is this module's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from epsdpo.experiment import Experiment, LoraSection
from epsdpo.loading import load_causal_lm
from epsdpo.models import load_tokenizer, reference_source


def lora_config(section: LoraSection | None) -> LoraConfig | None:
    """The settings of the adapters as PEFT takes them; None where all weights are trained."""
    if section is None:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )


def merge_adapter(experiment: Experiment, adapter_dir: Path, output_dir: Path) -> None:
    """Write the starting model with a trained adapter added to its weights, and the tokenizer, into `output_dir`.

    The sum is rounded to `model.dtype`, on the CPU of one process.
    """
    unset_hf_deepspeed_config()  # training is over; under ZeRO-3 the model would be loaded in shares
    source, revision = reference_source(experiment.model, experiment.data)
    base = load_causal_lm(source, revision, dtype=getattr(torch, experiment.model.dtype))
    model = PeftModel.from_pretrained(base, adapter_dir, trust_remote_code=False)
    model.merge_and_unload().save_pretrained(output_dir)
    load_tokenizer(experiment.model, experiment.data).save_pretrained(output_dir)
