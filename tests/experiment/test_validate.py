"""Configs: every mistake is refused with key, value and remedy before anything runs, and what is saved reads back."""

import re
from pathlib import Path

import pytest
import yaml

from epsdpo.experiment import (
    ConfigError,
    ModelSection,
    check_experiment,
    load_experiment,
    load_experiments,
    save_experiment,
)
from epsdpo.experiment.values import number_advice
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.models.start import pin_revision

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for folder in ("demo", "paper", "small") for path in (CONFIGS / folder).rglob("*.yaml"))
FILES = [path for path in FILES if not path.name.startswith("_published")]  # what the paper prints, and no config

MINIMAL = {"name": "run", "method": "epsilon_dpo", "train": {"beta": 0.1}}


def check(**changes):
    return check_experiment({**MINIMAL, **changes}, where="run.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # unknown keys, at each level, with the nearest known one
        ({"metod": "dpo"}, "run.yaml: metod is unknown; did you mean 'method'?"),
        ({"data": {"sorce": "world"}}, "run.yaml: data.sorce is unknown; did you mean 'source'?"),
        ({"data": {"world": {"sead": 1}}}, "run.yaml: data.world.sead is unknown; did you mean 'seed'?"),
        ({"model": {"name_or_pth": "world"}}, "run.yaml: model.name_or_pth is unknown; did you mean 'name_or_path'?"),
        ({"evaluate": {"temprature": 1.0}}, "run.yaml: evaluate.temprature is unknown; did you mean 'temperature'?"),
        ({"train": {"epsilonn": 0.01}}, "run.yaml: train.epsilonn is unknown; did you mean 'epsilon'?"),
        (
            {"evaluate": {"quux": 1}},
            "run.yaml: evaluate.quux is unknown; known keys: against, batch_size",
        ),
        # keys of the released code and of recipes like its own
        (
            {"train": {"warmup_ratio": 0.1}},
            "run.yaml: train.warmup_ratio is called warmup_steps, of which a number below",
        ),
        ({"train": {"max_prompt_length": 512}}, "train.max_prompt_length is data.max_prompt_length of a config"),
        ({"train": {"reference_free": True}}, "train.reference_free no longer exists: method simpo, cpo or orpo"),
        ({"train": {"rpo_alpha": 1.0}}, "train.rpo_alpha no longer exists"),
        ({"train": {"ref_adapter_name": "ref"}}, "frozen copy of its adapter, and with peft_config (model.lora"),
        ({"train": {"evaluation_strategy": "no"}}, "train.evaluation_strategy is called eval_strategy"),
        ({"warmup_ratio": 0.1}, "run.yaml: warmup_ratio is called warmup_steps"),
        ({"torch_dtype": "bfloat16"}, "run.yaml: torch_dtype is called model.dtype"),
        ({"model": {"torch_dtype": "bfloat16"}}, "run.yaml: model.torch_dtype is called model.dtype"),
        ({"dataset_mixer": {"a/b": 1.0}}, "run.yaml: dataset_mixer is called data.source"),
        ({"learning_rate": 1.0e-6}, "run.yaml: learning_rate belongs elsewhere: the section `train`"),
        # numbers that arrive as text
        ({"train": {"learning_rate": "7e-7"}}, "train.learning_rate is the text '7e-7', not a number: YAML reads an"),
        ({"train": {"learning_rate": "7e-7"}}, "Write 7.0e-7"),
        ({"evaluate": {"temperature": "1e-1"}}, "evaluate.temperature is the text '1e-1', not a number"),
        ({"train": {"max_grad_norm": "1e9"}}, "Write 1.0e+9"),
        ({"train": {"max_grad_norm": "1.0e9"}}, "Write 1.0e+9"),
        ({"train": {"adam_epsilon": "-.5e-7"}}, "Write -5.0e-08"),
        ({"train": {"max_steps": "2e3"}}, "Write 2000"),
        ({"data": {"max_train_pairs": "1e3"}}, "Write 1000"),
        ({"seed": "42"}, "seed is '42' (str): input should be a valid integer"),
        # a name that annotations give to the other side
        ({"name": "reference", "evaluate": {}}, "name is 'reference', which is what annotations.json calls the other"),
        # wrong types and values out of range
        ({"seed": True}, "seed is True (bool)"),
        ({"seed": 4.0}, "seed is 4.0 (float)"),
        ({"seed": -1}, "seed is -1 (int): input should be greater than or equal to 0"),
        ({"data": {"max_prompt_length": 0}}, "data.max_prompt_length is 0 (int): input should be greater than 0"),
        ({"data": {"max_train_pairs": True}}, "data.max_train_pairs is True (bool)"),
        ({"data": {"world": {"responses_per_prompt": 1}}}, "data.world.responses_per_prompt is 1 (int)"),
        ({"data": {"columns": {"promt": "text"}}}, "data.columns"),
        ({"model": {"dtype": "fp32"}}, "model.dtype is 'fp32' (str): input should be 'float32', 'bfloat16'"),
        ({"evaluate": {"top_p": 1.5}}, "evaluate.top_p is 1.5 (float): input should be less than or equal to 1"),
        ({"evaluate": {"batch_size": True}}, "evaluate.batch_size is True (bool)"),
        ({"train": {"bf16": 1}}, "train.bf16 is 1 (int)"),
        ({"train": {"beta": "a lot"}}, "train.beta is 'a lot' (str)"),
        ({"train": {"max_steps": True}}, "train.max_steps is True (bool)"),
        ({"method": "simpox"}, "method is 'simpox' (str): input should be 'dpo', 'epsilon_dpo', 'tr_dpo'"),
        ({"method": "sigmoid"}, "method: there is no method 'sigmoid': TRL's sigmoid loss is method dpo. Methods are"),
        ({"method": "rrhf"}, "there is no method 'rrhf': TRL 1.16 does not have it"),
        ({"name": "../elsewhere"}, "name is '../elsewhere' (str)"),
        # keys that are said elsewhere
        ({"train": {"seed": 1}}, "train.seed belongs elsewhere: the top-level `seed`"),
        ({"train": {"output_dir": "x"}}, "train.output_dir belongs elsewhere: the --output option of the command"),
        ({"train": {"trust_remote_code": True}}, "train.trust_remote_code belongs elsewhere: nowhere"),
        # sections that do not fit together
        ({"data": {"source": "pairs.jsonl"}}, "the world's model knows only the world's words. Name a model"),
        (
            {"data": {"source": "pairs.jsonl"}, "model": {"name_or_path": "m"}, "evaluate": {}},
            "evaluate.prompts.source is 'world', but data.source is 'pairs.jsonl'",
        ),
        ({"evaluate": {"prompts": {"source": "p.json"}}}, "the gold judge knows the world's instructions only. Name"),
        ({"evaluate": {"against": "given"}}, "the world's prompts bring no responses along. Use 'reference'"),
        ({"evaluate": {"calibrate_with": {"annotations": "a.json"}}}, "needs a judge that reads them: set judge.kind"),
        ({"method": "dpo", "train": {"epsilon_step": 0.01}}, "train.epsilon_step is 0.01, but method 'dpo' keeps β"),
        ({"method": "dpo", "train": {"beta_update": "mean_beta"}}, "train.beta_update has no effect under method"),
        ({"method": "ipo", "train": {"epsilon_step": 0.01}}, "but method 'ipo' keeps β constant. Remove the key"),
        ({"method": "beta_dpo", "train": {"epsilon_step": 0.01}}, "but method 'beta_dpo' sets β batch by batch"),
        (
            {"train": {"ref_model_sync_steps": 8}},
            "no effect under method 'epsilon_dpo'. Remove it, or use method: tr_dpo",
        ),
        ({"train": {"sync_ref_model": True}}, "train.sync_ref_model belongs elsewhere: the top-level `method`: tr_dpo"),
        ({"train": {"loss_type": ["ipo"]}}, "train.loss_type belongs elsewhere: the top-level `method`"),
        ({"train": {"keep_ratio": 0.5}}, "train.keep_ratio has no effect under method 'epsilon_dpo'. Remove it"),
        ({"method": "simpo", "train": {"epsilon": 0.01}}, "train.epsilon has no effect under method 'simpo'"),
        ({"method": "simpo", "train": {"cpo_alpha": 1.0}}, "train.cpo_alpha has no effect under method 'simpo'"),
        ({"method": "orpo", "train": {"simpo_gamma": 1.0}}, "train.simpo_gamma has no effect under method 'orpo'"),
        # what the trainer's own config refuses, before anything runs
        ({"train": {"epsilon": 5.0}}, "run.yaml: train.epsilon=5.0 must lie in (0, 1)"),
        ({"train": {"beta": 0.0}}, "train.beta=0.0 must be positive"),
        ({"method": "beta_dpo", "train": {"keep_ratio": 1.5}}, "train.keep_ratio=1.5 must lie in (0, 1]"),
        ({"method": "exo_pair"}, "train.label_smoothing=0.0 must be above 0 for exo_pair"),
        ({"method": "kto", "train": {"per_device_train_batch_size": 1}}, "it needs at least 2 pairs. Raise it"),
        ({"train": {"per_device_train_batch_size": 3}}, "train.global_batch_size=128 cannot be split over 1 process"),
        ({"train": {"eval_strategy": "steps", "eval_steps": 2.5}}, "train: --eval_steps must be an integer"),
        ({"train": {"precompute_ref_log_probs": True}}, "train.precompute_ref_log_probs=True cannot be combined"),
        # adapters
        ({"model": {"lora": {"rank": 8}}}, "model.lora.rank is unknown"),
        ({"model": {"lora": {"dropout": 1.0}}}, "model.lora.dropout is 1.0 (float): input should be less than 1"),
        ({"method": "tr_dpo", "model": {"lora": {}}}, "method 'tr_dpo' moves the weights of its reference, and with"),
    ],
)
def test_mistakes_are_refused_with_key_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as refusal:
        check(**changes)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("run.yaml: ")


@pytest.mark.parametrize("text", ["1e9", "1E9", "1.0e9", "1e+9", "7e-7", ".5e3", "-.5e3", "+1.5e12", "5.e3", "1e300"])
def test_numbers_that_are_advised_are_numbers_to_yaml(text):
    """Also to a notebook's parameters and to claims, whose messages have the same advice."""
    advised = number_advice(text).rpartition("Write ")[2]
    assert type(yaml.safe_load(advised)) is float and yaml.safe_load(advised) == float(text)
    assert number_advice("a1e9") == number_advice(1e9) == number_advice("42") == ""


def test_missing_keys_are_named():
    with pytest.raises(ConfigError) as refusal:
        check_experiment({"name": "run"}, where="run.yaml")
    assert str(refusal.value).splitlines() == ["run.yaml: method is missing", "run.yaml: train is missing"]


def test_all_mistakes_of_the_train_section_are_listed_at_once():
    with pytest.raises(ConfigError) as refusal:
        check(train={"betta": 0.1, "epsilon": "1e-2", "seed": 1})
    assert len(str(refusal.value).splitlines()) == 3


def test_defaults_say_what_a_config_leaves_out():
    experiment = check()
    assert experiment.title == "run"
    assert experiment.seed == 42
    assert experiment.evaluate is None
    assert (experiment.data.source, experiment.model.name_or_path) == ("world", "world")
    assert check(evaluate={}).evaluate.temperature == 1.0


def test_a_whole_number_will_do_for_a_float():
    assert check(evaluate={"temperature": 0}).evaluate.temperature == 0.0
    assert check(train={"max_grad_norm": 1}).train["max_grad_norm"] == 1


def test_plain_dpo_is_epsilon_dpo_with_steps_of_size_zero():
    train = {"beta": 0.1, "epsilon": 0.02, "global_batch_size": 16, "max_length": 64}
    assert check(method="dpo", train=train).training_arguments() == {**train, "epsilon_step": 0.0, "seed": 42}
    assert check(method="dpo", train={"epsilon_step": 0.0}).training_arguments()["epsilon_step"] == 0.0
    assert check(train=train, seed=7).training_arguments() == {**train, "seed": 7}


def test_the_batch_is_stated_for_all_processes_together():
    """By default it is the paper's; accumulation follows from it and cannot contradict it."""
    assert check(train={}).training_arguments()["global_batch_size"] == 128
    with pytest.raises(ConfigError, match=r"train\.gradient_accumulation_steps belongs elsewhere: `global_batch_size`"):
        check(train={"gradient_accumulation_steps": 4})


def test_what_is_saved_reads_back_equal(tmp_path):
    experiment = check(
        title="ε = 0.02",
        train={"beta": 0.1, "learning_rate": 7.0e-7, "report_to": ["none"]},
        data={"columns": {"prompt": "question"}, "max_prompt_length": 64},
        evaluate={"top_p": 0.9},
    )
    path = tmp_path / "other-name.yaml"
    save_experiment(experiment, path)
    assert load_experiment(path) == experiment
    assert "ε = 0.02" in path.read_text(encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["learning_rate"] == 7e-7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "not readable as YAML"),
        ("- method", "expected keys and values at the top level, got list"),
        ("", "expected keys and values at the top level, got NoneType"),
        ("method: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_experiment(path)
    with pytest.raises(ConfigError, match="absent.yaml: no such config file"):
        load_experiment(tmp_path / "absent.yaml")


def write(path: Path, **changes) -> None:
    values = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.yaml", name=None)
    write(tmp_path / "a.yaml", name=None, method="dpo")
    (tmp_path / "notes.md").write_text("not a config")
    assert [experiment.name for experiment in load_experiments(tmp_path)] == ["a", "b"]
    assert load_experiments(tmp_path / "a.yaml") == [load_experiment(tmp_path / "a.yaml")]


def test_problems_of_a_folder_are_listed_together(tmp_path):
    write(tmp_path / "a.yaml", seed="1")
    write(tmp_path / "b.yaml", name="twin")
    write(tmp_path / "c.yaml", name="twin")
    with pytest.raises(ConfigError) as refusal:
        load_experiments(tmp_path)
    seed, twins = str(refusal.value).splitlines()
    assert "a.yaml: seed is '1'" in seed
    assert "2 configs are named 'twin'; give each its own `name`" in twins


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the folder holds no \*\.yaml config"):
        load_experiments(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_above_every_key_of_the_committed_configs_stands_a_sentence_with_its_source(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()

    def stated(mapping):
        for key, value in mapping.value:
            yield from stated(value) if isinstance(value, yaml.MappingNode) else [key]

    for key in stated(yaml.compose(text)):
        above = lines[key.start_mark.line - 1]
        indent = " " * key.start_mark.column
        assert re.fullmatch(rf"{indent}# .+(\.|…) \[[PRK]\b[^\]]*\]", above), f"{key.value}: {above}"


def test_two_runs_of_a_folder_cannot_share_a_title(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("title: same\nmethod: dpo\ntrain: {bf16: false}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 configs are titled 'same'; give each its own `title`"):
        load_experiments(tmp_path)


def test_model_on_an_unreachable_hub_is_refused_and_a_commit_is_not_asked_about():
    """The tests run with the hub switched off."""
    with pytest.raises(ConfigError, match="'owner/name' is no local folder.*Give model.revision as a full commit"):
        pin_revision(ModelSection(name_or_path="owner/name"))
    pinned = ModelSection(name_or_path="owner/name", revision="0123456789" * 4)
    assert pin_revision(pinned) == pinned


def test_the_criterion_that_runs_is_known_where_a_config_leaves_it_to_the_default():
    ours = EpsilonDPOConfig
    defaults = {"epsilon": ours.epsilon, "epsilon_step": ours.epsilon, "criterion_dtype": ours.criterion_dtype}
    experiments = {
        method: check_experiment({"name": method, "method": method, "train": {}}, where="test")
        for method in ("epsilon_dpo", "dpo", "simpo")
    }
    assert experiments["epsilon_dpo"].criterion() == defaults and experiments["epsilon_dpo"].beta_follows
    assert experiments["dpo"].criterion() == {**defaults, "epsilon_step": 0.0} and not experiments["dpo"].beta_follows
    assert experiments["simpo"].criterion() == {} and not experiments["simpo"].beta_follows
    stated = {"epsilon": 0.02, "epsilon_step": 0.0, "criterion_dtype": "bfloat16"}
    still = check_experiment({"name": "still", "method": "epsilon_dpo", "train": stated}, where="test")
    assert still.criterion() == stated and not still.beta_follows
