"""What the tests share: the reference models and pairs in tests/data/official, and quick trainers over them."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is wrong
# Processes that tests start find `kit` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import pytest
from kit.official import OFFICIAL, tokenised_pairs


@pytest.fixture(scope="module", autouse=True)
def little_garbage_to_look_for():
    """accelerate collects garbage after each training, which over all that is imported takes longer than a tiny one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def official():
    """Folder with the tiny policy, reference and tokenizer, and what the released code did with them."""
    return OFFICIAL


@pytest.fixture(scope="session")
def official_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(OFFICIAL / "tok")


@pytest.fixture(scope="session")
def official_pairs(official_tokenizer):
    return tokenised_pairs(official_tokenizer)


@pytest.fixture
def make_trainer(tmp_path, official_tokenizer, official_pairs):
    """Build a trainer, EpsilonDPOTrainer by default; keyword arguments go to its config.

    Policy and reference are the reference models in `dtype`, or `models`, the trainer's own arguments for them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer

    def make(
        pairs=official_pairs,
        eval_pairs=None,
        dtype=torch.float32,
        trainer=EpsilonDPOTrainer,
        config=EpsilonDPOConfig,
        callbacks=None,
        models=None,
        **settings,
    ):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "beta": 0.1,
            "max_length": 128,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "train_sampling_strategy": "sequential",
            "bf16": False,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        if models is None:
            names = {"model": "policy", "ref_model": "ref"}
            models = {
                key: AutoModelForCausalLM.from_pretrained(OFFICIAL / name, dtype=dtype) for key, name in names.items()
            }
        return trainer(
            **models,
            args=config(**{**defaults, **settings}),
            train_dataset=pairs,
            eval_dataset=eval_pairs,
            processing_class=official_tokenizer,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where the folders of `distributed_worker` lie side by side, and the models that its runs share."""
    from kit import distributed_worker as worker

    folder = tmp_path_factory.mktemp("runs")
    worker.write_models(folder / worker.MODELS)
    return folder


@pytest.fixture(scope="session")
def alone(runs):
    """Every run of `distributed_worker` in this one process, and with one thread, as several processes have."""
    import torch
    from kit import distributed_worker as worker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.main(runs / "alone", list(worker.RUNS))
    torch.set_num_threads(threads)
    return runs / "alone"
