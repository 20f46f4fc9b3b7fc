"""From files to experiments: what `extends`, `sweep` and `--set` come to, and how their mistakes are refused."""

from pathlib import Path

import pytest
import yaml

from epsdpo.experiment import ConfigError, load_experiment, load_experiments
from epsdpo.experiment.sweep import parse_overrides
from epsdpo.experiment.values import flatten, merged, nested, overlap

RUN = "method: epsilon_dpo\ntrain: {beta: 0.1}\n"


@pytest.fixture
def write(tmp_path):
    """A function that writes one file of a config folder, sub-folders included, and returns its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=None) -> str:
    with pytest.raises(ConfigError) as refused:
        load_experiments(path, overrides)
    return str(refused.value)


# values


def test_mappings_merge_and_everything_else_is_replaced():
    below = {"train": {"beta": 0.1, "report_to": ["a", "b"]}, "evaluate": {"top_p": 0.9}, "seed": 1}
    above = {"train": {"report_to": ["c"], "epsilon": 0.01}, "evaluate": None}
    expected = {"train": {"beta": 0.1, "report_to": ["c"], "epsilon": 0.01}, "evaluate": None, "seed": 1}
    assert merged(below, above) == expected
    assert below["train"] == {"beta": 0.1, "report_to": ["a", "b"]}, "the lower layer serves other files too"
    assert nested(flatten(expected)) == expected


def test_dotted_names_overlap_only_along_whole_parts():
    assert overlap("train.epsilon", "train") and overlap("train", "train.epsilon") and overlap("seed", "seed")
    assert not overlap("train.epsilon", "train.epsilon_step")


# extends


def test_a_config_is_its_base_with_its_own_keys_on_top(write):
    write("shared/_root.yaml", RUN + "seed: 1\ndata: {max_train_pairs: 8, max_eval_pairs: 4}\nevaluate: {top_p: 0.5}\n")
    write("runs/_base.yaml", "extends: ../shared/_root.yaml\ntrain: {epsilon: 0.02}\ndata: {max_train_pairs: 16}\n")
    path = write("runs/run.yaml", "extends: _base.yaml\nevaluate: null\ndata: {max_eval_pairs: null}\n")
    experiment = load_experiment(path)
    assert experiment.train == {"global_batch_size": 128, "max_length": 1024, "beta": 0.1, "epsilon": 0.02}
    assert (experiment.data.max_train_pairs, experiment.data.max_eval_pairs) == (16, None)
    assert (experiment.seed, experiment.evaluate) == (1, None)
    assert load_experiments(path.parent) == [experiment], "_base.yaml is no experiment"


def test_name_and_title_are_not_taken_over(write):
    """Else a changed copy of a run would go by the name of the original in every figure."""
    write("dpo.yaml", RUN + "name: original\ntitle: The original\n")
    experiment = load_experiment(write("copy.yaml", "extends: dpo.yaml\nseed: 7\n"))
    assert (experiment.name, experiment.title) == ("copy", "copy")


def test_a_base_is_not_an_experiment(write, tmp_path):
    base = write("_base.yaml", RUN)
    assert "_base.yaml: a name that begins with '_' marks a file that others extend" in refusal(base)
    assert "the folder holds no *.yaml config (files that begin with '_'" in refusal(tmp_path)


def test_a_config_that_extends_itself_is_refused_with_the_chain(write, tmp_path):
    path = write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: sub/../a.yaml\n")
    (tmp_path / "sub").mkdir()
    chain = f"{path} extends {tmp_path / 'b.yaml'} extends {tmp_path / 'sub/../a.yaml'}"
    assert refusal(path) == f"{chain}: a config cannot build on itself. Remove one `extends`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: absent.yaml\n", "absent.yaml: no such config file, which"),
        ("extends: [a.yaml, b.yaml]\n", "run.yaml: extends is ['a.yaml', 'b.yaml'] (list): write the path of one"),
        ("extends: .\n", "not readable as YAML"),
        ("extend: base.yaml\n" + RUN, "run.yaml: extend is unknown; did you mean 'extends'?"),
        (RUN + "train: {epsilon: 0.02}\n", "'train' is stated twice"),
        (RUN + "data: {eval_split: a, eval_split: b}\n", "'eval_split' is stated twice"),
    ],
)
def test_files_that_do_not_add_up(write, text, message):
    assert message in refusal(write("run.yaml", text))


def test_a_mistake_is_reported_once_and_where_it_was_made(write, tmp_path):
    base = write("_base.yaml", RUN + "sed: 1\nseed: '1'\n")
    write("a.yaml", "extends: _base.yaml\n")
    own = write("b.yaml", "extends: _base.yaml\nseed: '2'\n")
    assert refusal(tmp_path).splitlines() == [
        f"{base}: seed is '1' (str): input should be a valid integer",
        f"{base}: sed is unknown; did you mean 'seed'?",
        f"{own}: seed is '2' (str): input should be a valid integer",
    ]


# sweep


def test_a_sweep_is_every_combination_and_says_so_in_names_and_titles(write):
    path = write("base.yaml", RUN + "title: ε-DPO\nsweep: {train.epsilon: [0.005, 0.01], seed: [1, 2, 3]}\n")
    experiments = load_experiments(path)
    assert [(e.train["epsilon"], e.seed) for e in experiments] == [
        (0.005, 1),
        (0.005, 2),
        (0.005, 3),
        (0.01, 1),
        (0.01, 2),
        (0.01, 3),
    ]
    assert (experiments[0].name, experiments[0].title) == ("base-epsilon0.005-seed1", "ε-DPO, ε=0.005, seed=1")
    assert (experiments[5].name, experiments[5].title) == ("base-epsilon0.01-seed3", "ε-DPO, ε=0.01, seed=3")
    assert {experiment.train["beta"] for experiment in experiments} == {0.1}


def test_values_can_be_varied_together_as_a_list_of_points(write):
    path = write("b.yaml", RUN + "sweep: [{train.beta: 0.01, train.epsilon: 0.02}, {train.beta: 0.05}]\n")
    experiments = load_experiments(path)
    assert [experiment.name for experiment in experiments] == ["b-beta0.01-epsilon0.02", "b-beta0.05"]
    assert [experiment.train.get("epsilon") for experiment in experiments] == [0.02, None]


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("{train.learning_rate: [7.0e-7, 1.0e-6]}", ["-learning_rate7.0e-07", "-learning_rate1.0e-06"]),
        ("{method: [dpo, epsilon_dpo]}", ["-method-dpo", "-method-epsilon_dpo"]),
        ("{train.adam_beta1: [0.9]}", ["-adam_beta1-0.9"]),
        ("{train.max_steps: [-1, 1]}", ["-max_steps--1", "-max_steps1"]),
        ("{evaluate: [null, {top_p: 0.5}]}", ["-evaluate-null", "-evaluate-top_p-0.5"]),
        ("{seed: [1], data.world.seed: [2]}", ["-seed1-data.world.seed2"]),
        ("{train.report_to: [[none], wandb]}", ["-report_to-none", "-report_to-wandb"]),
    ],
)
def test_names_are_folder_names_for_any_value(write, sweep, names):
    path = write("run.yaml", RUN + f"sweep: {sweep}\n")
    assert [experiment.name.removeprefix("run") for experiment in load_experiments(path)] == names


def test_a_sweep_comes_with_the_base_and_can_be_extended_or_turned_off(write):
    write("_base.yaml", RUN + "sweep: {seed: [1, 2]}\n")
    more = write("more.yaml", "extends: _base.yaml\nsweep: {train.beta: [0.1, 0.2]}\n")
    assert [experiment.name for experiment in load_experiments(more)] == [
        f"more-seed{seed}-beta{beta}" for seed in (1, 2) for beta in (0.1, 0.2)
    ]
    none = write("none.yaml", "extends: _base.yaml\nsweep: null\n")
    assert load_experiment(none).name == "none"


def test_one_experiment_is_wanted_and_a_sweep_states_more(write):
    path = write("run.yaml", RUN + "sweep: {seed: [1, 2]}\n")
    with pytest.raises(ConfigError, match=r"its sweep states 2 experiments.*`python -m epsdpo run "):
        load_experiment(path)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{train.epsilonn: [0.01]}", "sweep: train.epsilonn is unknown; did you mean 'train.epsilon'?"),
        ("{beta: [0.01]}", "sweep: beta is unknown; did you mean 'train.beta'?"),
        ("{train.seed: [1]}", "sweep: train.seed belongs elsewhere: the top-level `seed`"),
        ("{1: [1]}", "sweep: 1 is unknown"),
        ("{name: [a, b]}", "sweep: name cannot be swept. Names and titles follow from the values that are"),
        ("{seed: []}", "sweep: seed is []: write a list of at least one value"),
        ("{seed: 1}", "sweep: seed is 1: write a list of at least one value"),
        ("{}", "sweep is {}: write keys with lists of values"),
        ("seed", "sweep is 'seed': write keys with lists of values"),
        ("[seed]", "sweep: the point 'seed' is no mapping"),
        ("[{}]", "sweep: the point {} is no mapping"),
        ("{seed: [1, 2, 1]}", "sweep: the points [{'seed': 1}, {'seed': 1}] would all be called '-seed1'"),
        ("{evaluate: [null], evaluate.top_p: [0.5]}", "evaluate and evaluate.top_p state the same value"),
        ("{train.learning_rate: [7e-7]}", "sweep: train.learning_rate is the text '7e-7', not a number"),
        ("{seed: [1, one]}", "sweep: seed is 'one' (str)"),
    ],
)
def test_wrong_sweeps(write, sweep, message):
    path = write("run.yaml", RUN + f"sweep: {sweep}\n")
    refused = refusal(path)
    assert message in refused
    assert refused.startswith(f"{path}: sweep") and len(refused.splitlines()) == 1


# overrides


def test_overrides_reach_every_experiment_of_every_file(write):
    one = write("one.yaml", RUN + "evaluate: {top_p: 0.5}\n")
    write("more/two.yaml", RUN + "sweep: {seed: [1, 2]}\n")
    overrides = parse_overrides(["train.epsilon=0.02", "evaluate=null", "train.report_to=[none]", "model.revision=abc"])
    experiments = load_experiments([one, one.parent / "more"], overrides)
    assert [experiment.name for experiment in experiments] == ["one", "two-seed1", "two-seed2"]
    for experiment in experiments:
        assert (experiment.train["epsilon"], experiment.train["report_to"]) == (0.02, ["none"])
        assert (experiment.evaluate, experiment.model.revision) == (None, "abc")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.epsilonn=0.02", "--set train.epsilonn=0.02: train.epsilonn is unknown; did you mean 'train.epsilon'?"),
        ("sed=1", "--set sed=1: sed is unknown; did you mean 'seed'?"),
        ("quux=1", "--set quux=1: quux is unknown; `python -m epsdpo config --explain` lists all keys"),
        ("train.output_dir=x", "train.output_dir belongs elsewhere: the --output option"),
        ("sweep={seed: [1]}", "sweep belongs in a config file"),
        ("seed", "--set seed: write KEY=VALUE"),
        ("seed=", "--set seed=: write KEY=VALUE"),
        ("title=[a", "the value is not readable as YAML; put it in quotes"),
    ],
)
def test_wrong_overrides(argument, message):
    with pytest.raises(ConfigError) as refused:
        parse_overrides([argument])
    assert message in str(refused.value)


def test_overrides_that_state_one_thing_twice_are_refused():
    with pytest.raises(ConfigError, match=r"--set seed=2: seed and seed state the same value"):
        parse_overrides(["seed=1", "seed=2"])


def test_values_of_overrides_are_checked_like_those_of_files(write):
    path = write("run.yaml", RUN)
    wrong = parse_overrides(["train.learning_rate=7e-7", "train.eval_strategy=no", "train.criterion_dtype=bf16"])
    number, word, choice = refusal(path, wrong).splitlines()
    assert number.startswith("--set: train.learning_rate is the text '7e-7'") and "Write 7.0e-7" in number
    assert word == "--set: train.eval_strategy is False: YAML reads a bare no as false. Write 'no', in quotes"
    assert choice == "--set: train.criterion_dtype is 'bf16': choose 'bfloat16'"


def test_a_swept_key_cannot_be_set(write):
    path = write("run.yaml", RUN + "sweep: {train.epsilon: [0.01, 0.02]}\n")
    message = refusal(path, {"train.epsilon": 0.03})
    assert "train.epsilon is swept, and --set train.epsilon would decide it. Leave --set out" in message


def test_clashes_between_files_and_folders_are_refused(write, tmp_path):
    paths = [write("a/run.yaml", RUN), write("b/run.yaml", RUN)]
    assert "2 configs are named 'run'" in refusal([path.parent for path in paths])
    message = refusal([write("a.yaml", RUN), write("b.yaml", RUN)], {"title": "same"})
    assert message.startswith(f"{tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'}: 2 configs are titled 'same'")


def test_a_resolved_config_keeps_neither_extends_nor_sweep(write):
    write("_base.yaml", RUN)
    path = write("run.yaml", "extends: _base.yaml\nsweep: {seed: [1, 2]}\n")
    for experiment in load_experiments(path):
        again = write(f"{experiment.name}.yaml", yaml.safe_dump(experiment.model_dump()))
        assert load_experiment(again) == experiment
        assert not {"extends", "sweep"} & yaml.safe_load(again.read_text()).keys()


# what can be nothing's value


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: .inf}", "train.learning_rate is inf, which is no finite number. Write one"),
        ("train: {beta: .nan}", "train.beta is nan, which is no finite number"),
        ("model: {sft: {learning_rate: -.inf}}", "model.sft.learning_rate is -inf"),
        ("sweep: {train.learning_rate: [1.0, .inf]}", "sweep.train.learning_rate.1 is inf"),
        ('title: "\\ud83d half"', r"title is '\ud83d half', which holds half a character"),
        ('name: "\\ud83d"', "which holds half a character"),
        ('data: {source: "\\ude00"}', "data.source is"),
        ("title: ''", "title: '' says nothing"),
        ("title: '  '", "says nothing"),
        ("title: _hidden", "title: '_hidden' begins with '_', and legends of figures leave out what does"),
        ('title: "two\\nlines"', "holds control characters"),
        ('title: "a\\0b"', "holds control characters"),
        (f"name: {'n' * 300}", "string should have at most 200 characters"),
        (f"title: {DEEP}", "nested more than 20 deep. Write it flat"),
        (f"data: {'{columns: ' * 30 + '1' + '}' * 30}", "data is nested more than 20 deep"),
        ("data: &again {columns: *again}", "data is nested more than 20 deep"),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_key_can_take_is_refused_by_its_key(write, text, message):
    path = write("run.yaml", f"method: epsilon_dpo\n{text}\n")
    refused = refusal(path)
    assert refused.startswith(str(path)) and message in refused, refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=.inf", "--set: train.learning_rate is inf, which is no finite number"),
        ('title="\\ud83d"', "--set: title is '\\ud83d', which holds half a character"),
        (f"title={DEEP}", "--set title: the value is nested more than 20 deep"),
        (f"title={'[' * 30 + ']' * 30}", "--set: title is nested more than 20 deep"),
    ],
    ids=lambda text: text[:30],
)
def test_nor_can_an_override(override, message):
    with pytest.raises(ConfigError) as refused:
        parse_overrides([override])
    assert message in str(refused.value)


def test_many_aliases_are_looked_at_once(write):
    """Nine lists of nine of the list before: a billion values, of which YAML makes nine lists."""
    lines = ["a0: &a0 [.inf]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    refused = refusal(write("run.yaml", "method: dpo\n" + "\n".join(lines) + "\n"))
    assert " is inf, which is no finite number" in refused and len(refused.splitlines()) < 20


def test_long_names_and_titles_in_any_script_are_taken(write):
    names = {"name": "n" * 200, "title": "β 😀 = +1 <b>&amp; $x$ עברית"}
    experiment = load_experiment(write("run.yaml", RUN + yaml.safe_dump(names, allow_unicode=True)))
    assert (experiment.name, experiment.title) == tuple(names.values())
