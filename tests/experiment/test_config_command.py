"""`python -m epsdpo config`: what configs come to, what their keys mean, and how a wrong one ends the command."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epsdpo.__main__ import main
from epsdpo.experiment import load_experiment, load_experiments
from epsdpo.experiment.keys import section_keys, train_keys
from epsdpo.experiment.schema import STATED_ELSEWHERE
from epsdpo.methods.catalogue import METHODS, config_class

CONFIGS = Path(__file__).parents[2] / "configs"

RUN = "method: epsilon_dpo\ntrain: {beta: 0.1, learning_rate: 7.0e-7}\n"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN + "title: Run\nsweep: {train.epsilon: [0.005, 0.01]}\n", encoding="utf-8")
    return path


def output(capsys, *arguments) -> str:
    assert main(["config", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


def test_a_table_of_what_the_experiments_are_and_where_they_differ(config, capsys):
    assert output(capsys, config).splitlines() == [
        "name              title         method       model  data   seed  train.epsilon",
        "run-epsilon0.005  Run, ε=0.005  epsilon_dpo  world  world  42    0.005",
        "run-epsilon0.01   Run, ε=0.01   epsilon_dpo  world  world  42    0.01",
    ]


def test_a_key_that_only_some_experiments_state_is_a_difference(config, capsys):
    (config.parent / "dpo.yaml").write_text("method: dpo\ntrain: {beta: 0.2}\nevaluate: {}\n", encoding="utf-8")
    header, dpo, *_ = output(capsys, config.parent).splitlines()
    differences = dict(zip(header.split(), dpo.split(), strict=True))
    assert differences["train.beta"] == "0.2" and differences["train.learning_rate"] == "–"
    assert differences["evaluate.top_p"] == "1.0"


def test_whole_configs_read_back(config, capsys, tmp_path):
    documents = output(capsys, config, "--full", "--set", "seed=7").split("---\n")
    again = []
    for number, text in enumerate(documents):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        again.append(load_experiment(path))
    assert again == load_experiments(config, {"seed": 7})


def test_a_single_experiment_is_printed_whole_and_nothing_is_written(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.write_text(RUN, encoding="utf-8")
    text = output(capsys, config)
    assert list(tmp_path.iterdir()) == [config]
    config.write_text(text, encoding="utf-8")
    assert output(capsys, config) == text
    assert "learning_rate: 7.0e-07" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{config}", "--set", "train.epsilonn=1"], "did you mean 'train.epsilon'?"),
        (["{config}", "--set", "train.epsilon=1"], "train.epsilon is swept"),
        (["nowhere.yaml"], "nowhere.yaml: no such file or folder"),
        ([], "name a config file or folder"),
        (["{config}", "--explain", "seed"], "--explain is about keys, not about a config"),
        (["--explain", "train.betta"], "--explain: train.betta is unknown; did you mean 'train.beta'?"),
        (["--explain", "train.seed"], "--explain: train.seed belongs elsewhere: the top-level `seed`"),
    ],
)
def test_what_is_wrong_ends_in_exit_code_2_and_one_line(config, capsys, arguments, message):
    assert main(["config", *(argument.format(config=config) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1
    assert not printed.out


def test_a_wrong_section_is_refused_without_waiting_for_torch(config):
    config.write_text(RUN + "sed: 1\n", encoding="utf-8")
    program = (
        "import sys\nfrom epsdpo.__main__ import main\n"
        f"assert main(['config', {str(config)!r}]) == 2\n"
        "sys.exit('torch' in sys.modules or 'papermill' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'seed'?" in done.stderr


def test_every_key_is_explained_with_type_default_sentence_and_source(capsys):
    text = output(capsys, "--explain")
    blocks = text.strip().split("\n\n")[1:]
    names = [block.split(" ", 1)[0] for block in blocks]
    configs = {config_class(method) for method in METHODS}
    in_train = {field.name for config in configs for field in dataclasses.fields(config) if field.init}
    in_train -= set(STATED_ELSEWHERE)
    assert set(names) == set(section_keys()) | {f"train.{name}" for name in in_train}
    assert len(names) == len(set(names))
    classes = {parent for config in configs for parent in config.__mro__ if parent.__module__.startswith("epsdpo.")}
    ours = {name for parent in classes for name in parent.__dict__.get("__annotations__", {})}
    of_trl = {f"train.{name}" for name in in_train - ours}
    for name, block in zip(names, blocks, strict=True):
        source = r" \[T\]" if name in of_trl else r"\. \[[PRK]\b[^\]]*\]"
        assert re.fullmatch(rf"\S+ \([^)]+; (default: .+|required)\) .+{source}", " ".join(block.split())), block


def test_ours_come_before_trls_and_each_after_its_section(capsys):
    names = [block.split(" ", 1)[0] for block in output(capsys, "--explain").split("\n\n")[1:]]
    assert names[:6] == ["extends", "sweep", "name", "title", "method", "seed"]
    start = names.index("train")
    assert names[start + 1 : start + 3] == ["train.epsilon", "train.epsilon_step"]
    assert names.index("train.beta") < names.index("train.optim") < names.index("evaluate")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("title", "title  (text; default: the name)"),
        ("name", "name  (text; default: the file's name)"),
        ("data.max_prompt_length", "data.max_prompt_length  (int > 0 or null; default: null)"),
        ("evaluate.top_p", "evaluate.top_p  (float > 0 and ≤ 1; default: 1.0)"),
        (
            "train.criterion",
            "train.criterion_dtype  (float32 or bfloat16 or bfloat16_logits or float16; default: float32)",
        ),
        ("train.learning", "train.learning_rate  (float; default: 1.0e-06)"),
        ("train.global_batch_size", "train.global_batch_size  (int or null; default: 128)"),
        ("eval_strategy", "train.eval_strategy  ('no' or steps or epoch; default: 'no')"),
        ("ddp_timeout", "train.ddp_timeout  (int; default: 1800)"),
        ("discopop_tau", "train.discopop_tau  (float; default: 0.05)"),
        ("simpo_gamma", "train.simpo_gamma  (float; default: 0.5)"),
        ("keep_ratio", "train.keep_ratio  (float; default: 0.8)"),
    ],
)
def test_a_key_is_found_by_its_name_or_the_beginning_of_it(capsys, name, head):
    legend, entry = output(capsys, "--explain", name).split("\n\n")
    assert legend.startswith("Sources: [P] the paper")
    assert entry.splitlines()[0] == head


def test_a_prefix_finds_all_that_it_begins(capsys):
    blocks = output(capsys, "--explain", "epsilon").split("\n\n")[1:]
    assert [block.split(" ", 1)[0] for block in blocks] == ["train.epsilon", "train.epsilon_step"]
    blocks = output(capsys, "--explain", "data.world").split("\n\n")[1:]
    assert len(blocks) == 1 + 6
    assert set(train_keys()).isdisjoint(block.split(" ", 1)[0] for block in blocks)


def test_a_reader_that_has_seen_enough_is_no_error(config):
    command = f"'{sys.executable}' -m epsdpo config --explain method | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
