"""The configs of the paper and their small counterparts, executed on miniatures of their models and data.

One experiment of a file trains for two steps; one file for each architecture goes through all stages, as `epsdpo run`
does it.
"""

from pathlib import Path

import pytest
import torch
import yaml
from kit.tiny_architectures import MODELS, save_data, save_miniature
from safetensors.torch import load_file

from epsdpo.batch.check.configs import config_files
from epsdpo.batch.runner import Resources, run_batch
from epsdpo.data.prepared import prepare
from epsdpo.evaluation.evaluate import evaluate
from epsdpo.experiment import load_experiments
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.models.start import load_tokenizer
from epsdpo.train.preferences import train

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = config_files([CONFIGS / "paper", CONFIGS / "small"])
# Those of these folders repeat a training of table1 or figure4b with another sweep, or other checkpoints.
REPEATED = ("table4", "table6", "figure3", "figure4a", "figure5")
TRAINED = [file for file in FILES if not file.parent.name.startswith(REPEATED)]
SHORT = {"train.use_cpu": True, "train.global_batch_size": 4, "train.max_steps": 2, "train.save_strategy": "no"}

# Between them they have every architecture, both kinds of data, full weights and adapters.
WHOLE_GRAPHS = {
    "llama3": "paper/table1_llama3/epsilon_dpo.yaml",
    "mistral": "paper/table1_mistral/dpo.yaml",
    "gemma2": "paper/figure4b_pareto/tr_dpo_soft.yaml",
    "qwen2.5": "small/table3_qwen2.5/epsilon_dpo.yaml",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """Hub id -> local folder, of all models and data sets that the configs name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    models = {name: save_miniature(name, folder / name.replace("/", "--")) for name in MODELS}
    return models | save_data(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare the data of an experiment, once for all that share them."""
    made = {}

    def get(experiment):
        key = yaml.safe_dump(
            [experiment.data.model_dump(), experiment.model.name_or_path, experiment.train["max_length"]]
        )
        if key not in made:
            tokenizer = load_tokenizer(experiment)
            folder = tmp_path_factory.mktemp("data")
            made[key] = prepare(experiment.data, tokenizer, folder, max_length=experiment.train["max_length"])
        return made[key]

    return get


def swapped(file, stand_ins, **overrides):
    """The first experiment of a config, with its model and data swapped for their stand-ins.

    What comes before prepare and train, and the judge, are left out unless `overrides` say otherwise.
    """
    first = load_experiments(file)[0]
    pairs = "princeton-nlp/llama3-ultrafeedback" if first.data.on_policy is not None else first.data.source
    values = {
        "model.name_or_path": str(stand_ins[first.model.name_or_path]),
        "model.revision": None,
        "model.chat_template": None,
        "model.sft": None,
        "data.source": str(stand_ins[pairs]),
        "data.on_policy": None,
        "data.revision": None,
        "evaluate.judge": None,
        **overrides,
    }
    return load_experiments(file, values)[0]


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_config_trains(file, stand_ins, prepared, tmp_path):
    experiment = swapped(file, stand_ins, **SHORT, **{"train.eval_strategy": "no"})
    data = prepared(experiment)
    model_dir = train(experiment, data, tmp_path / "run", callbacks=[])
    steps = read_steps(tmp_path / "run")
    assert list(steps["step"]) == [1, 2] and steps["loss"].notna().all()
    # β-DPO has moved it by then, by the rounding of the first margins.
    assert steps["beta_before"][0] == pytest.approx(experiment.train["beta"], rel=1e-2)
    weights = load_file(model_dir / "model.safetensors")
    start = load_file(Path(experiment.model.name_or_path) / "model.safetensors")
    assert set(weights) == set(start)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_adapters_are_merged_into_the_weights_that_are_evaluated(stand_ins, prepared, tmp_path):
    """W + alpha / r · B A, and nothing else has changed."""
    lora = {"r": 4, "alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    file = CONFIGS / "small" / "table3_qwen2.5" / "epsilon_dpo.yaml"
    overrides = {"model.lora": lora, "train.learning_rate": 1e-2, "train.eval_strategy": "no"}
    experiment = swapped(file, stand_ins, **SHORT, **overrides)
    model_dir = train(experiment, prepared(experiment), tmp_path / "run", callbacks=[])
    merged = load_file(model_dir / "model.safetensors")
    start = load_file(Path(experiment.model.name_or_path) / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not (model_dir / "adapter_config.json").exists()
    for name, weight in start.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(lora["target_modules"])):
            a, b = (adapter[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            assert b.abs().max() > 0
            torch.testing.assert_close(merged[name], weight + 3 * b @ a)
        else:
            assert merged[name].equal(weight), name
    assert len(adapter) == 2 * 2 * 2  # two layers with two adapted modules each, A and B


def with_local_prompts(file, stand_ins, **overrides):
    """As `swapped`, with the prompts of the evaluation swapped too, and short answers."""
    prompts = load_experiments(file)[0].evaluate.prompts.source
    return swapped(
        file,
        stand_ins,
        **SHORT,
        **{
            "evaluate.prompts.source": str(stand_ins[prompts]),
            "evaluate.prompts.revision": None,
            "evaluate.max_new_tokens": 4,
            "evaluate.bootstrap_samples": 20,
            **overrides,
        },
    )


@pytest.mark.parametrize("architecture", WHOLE_GRAPHS)
def test_an_architecture_is_evaluated_after_training(architecture, stand_ins, prepared, tmp_path):
    """What the stages compute, in this process."""
    experiment = with_local_prompts(CONFIGS / WHOLE_GRAPHS[architecture], stand_ins)
    data = prepared(experiment)
    train(experiment, data, tmp_path / "train", callbacks=[])
    evaluated = evaluate(experiment, data.directory, tmp_path / "train", tmp_path / "evaluate")
    assert len(read_pairs(tmp_path / "train")) == 2 * 4
    # At these learning rates two steps change nothing that four tokens could tell.
    assert evaluated.summary["reverse_kl_per_response"] == pytest.approx(0.0, abs=1e-3)
    assert evaluated.summary["prompts"]["bos_per_prompt"] == (architecture != "qwen2.5")
    assert data.report["splits"]["train"]["bos_per_sequence"] == (architecture != "qwen2.5")


def test_the_whole_graph_runs_as_a_batch_of_notebooks(stand_ins, tmp_path):
    """Of the experiments that differ most from the others: SFT first, soft caps, eager attention, transcripts."""
    file = CONFIGS / WHOLE_GRAPHS["gemma2"]
    sft = load_experiments(file)[0].model.sft.model_dump() | {"global_batch_size": 4, "bf16": False}
    template = str(stand_ins["google/gemma-2-2b"])
    overrides = {"model.sft": sft, "model.chat_template": template}
    experiment = with_local_prompts(file, stand_ins, **overrides)
    outcome = run_batch([experiment], tmp_path / "runs", Resources(jobs=2))
    assert not outcome.failed and not outcome.not_run
    stages = {path.parent.name for path in (tmp_path / "runs").glob("*/*/manifest.json")}
    assert stages == {"train", "trajectory", "evaluate"}
    assert len(list((tmp_path / "runs").glob("sft-*/manifest.json"))) == 1
    assert (tmp_path / "runs" / "report" / "manifest.json").exists()
