"""Moving from the released code: each name of trl 0.13 that is gone says what it is today, wherever it is written."""

import copy
import pickle

import pytest
from trl import DPOTrainer

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.experiment.keys import train_fields
from epsdpo.experiment.sweep import parse_overrides
from epsdpo.methods.catalogue import config_class
from epsdpo.methods.errors import ConfigError
from epsdpo.methods.former_names import FORMER_KEYS

CONFIGS = [config_class(method) for method in ("epsilon_dpo", "ipo", "beta_dpo", "kto", "simpo", "orpo")]


def test_no_key_that_epsilon_dpo_takes_is_called_a_former_one():
    assert not set(FORMER_KEYS) & set(train_fields("epsilon_dpo"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_configs_name_todays_key(config, tmp_path):
    with pytest.raises(TypeError, match=f"{config.__name__}: warmup_ratio is called warmup_steps.*docs/moving.md"):
        config(str(tmp_path), warmup_ratio=0.1)
    with pytest.raises(TypeError, match="reference_free no longer exists.*; rpo_alpha no longer exists"):
        config(str(tmp_path), reference_free=True, rpo_alpha=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'quux'"):
        config(str(tmp_path), quux=1)


def test_configs_can_still_be_copied(tmp_path):
    config = EpsilonDPOConfig(str(tmp_path), bf16=False, beta=0.3)
    assert copy.copy(config).beta == pickle.loads(pickle.dumps(config)).beta == 0.3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer", "EpsilonDPOTrainer: tokenizer is called processing_class"),
        ("beta", "beta is an argument of EpsilonDPOConfig, which is given as args"),
        ("max_prompt_length", "max_prompt_length is data.max_prompt_length of a config"),
        ("ref_adapter_name", "frozen copy of its adapter"),
        ("generate_during_eval", "the section evaluate of a config"),
        ("model_init", "give the model itself"),
        ("quux", "unexpected keyword argument 'quux'"),
    ],
)
def test_the_trainer_names_todays_argument(name, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        EpsilonDPOTrainer("model", args=EpsilonDPOConfig(str(tmp_path), bf16=False), **{name: None})
    assert issubclass(EpsilonDPOTrainer, DPOTrainer)


def test_overrides_name_todays_key():
    with pytest.raises(ConfigError, match="--set train.warmup_ratio=0.1: train.warmup_ratio is called warmup_steps"):
        parse_overrides(["train.warmup_ratio=0.1"])
    with pytest.raises(ConfigError, match="--set torch_dtype=x: torch_dtype is called model.dtype"):
        parse_overrides(["torch_dtype=x"])
