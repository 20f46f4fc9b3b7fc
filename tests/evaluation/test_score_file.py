"""Scores of published judgements against the leaderboard, and what `python -m epsdpo winrate` prints and refuses."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kit.published import (
    GAMED,
    LEADERBOARD,
    MODELS,
    WEIGHTS,
    rows_of,
    write_difficulties,
    write_numbered_difficulties,
    write_rows,
)
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from epsdpo.__main__ import main
from epsdpo.evaluation.scores.alpaca_eval_prompts import prompt_number
from epsdpo.evaluation.scores.annotations import InputError
from epsdpo.evaluation.scores.length_control import Coefficients, GamedRows, length_control, predicted_chances
from epsdpo.evaluation.scores.length_control_data import (
    HUB_FILE,
    HUB_REVISION,
    read_difficulties,
    read_gamed,
    require_sha256,
)
from epsdpo.evaluation.scores.score_file import score_file

# Three of AlpacaEval's prompts, by their numbers; the file has a judgement of each of the first, in their order.
_JUDGED = Path(__file__).parents[1] / "data" / "alpaca_eval_judge.json.gz"
_CALLS = json.loads(gzip.decompress(_JUDGED.read_bytes()))["calls"]
ALPACA_EVAL_PROMPTS = {number: _CALLS[number]["instruction"] for number in (1, 3, 4)}
# NullModel's row of the leaderboard was computed with the next C of the grid, see docs/scores.md.
LEADERBOARD_C = LEADERBOARD["C_of_weights"].to_dict() | {"NullModel": 10 ** (4 / 3)}


@pytest.fixture(scope="module")
def difficulties(tmp_path_factory):
    return write_difficulties(tmp_path_factory.mktemp("difficulties") / "difficulties.csv")


@pytest.mark.parametrize("model", MODELS)
def test_the_leaderboard_is_reproduced(tmp_path, difficulties, model):
    path = write_rows(tmp_path / "annotations.json", rows_of(model))
    numbers = score_file(path, GAMED, difficulties, LEADERBOARD_C[model], samples=2)
    published = LEADERBOARD.loc[model]
    for key in ("n_total", "n_wins", "n_wins_base", "n_draws", "avg_length"):
        assert numbers[key] == published[key]
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        assert numbers[key] == pytest.approx(published[key], abs=1e-6)
    assert numbers["length_controlled_winrate"] == pytest.approx(published["length_controlled_winrate"], abs=1e-3)
    if published.notna()["lc_standard_error"]:
        assert numbers["lc_standard_error"] == pytest.approx(published["lc_standard_error"], abs=1e-4)
    if model != "NullModel":
        weights = published[["glm_w_tanh_len", "glm_w_difficulty", "glm_w_bias"]]
        assert list(numbers["coefficients"].values()) == pytest.approx(list(weights), abs=2e-4)


def test_the_published_weights_give_the_published_rates():
    gamma = read_gamed(GAMED).difficulties[:805]
    for model in LEADERBOARD.index.drop("NullModel"):
        row = LEADERBOARD.loc[model]
        weights = Coefficients(row["glm_w_tanh_len"], row["glm_w_difficulty"], row["glm_w_bias"])
        rate = 100.0 * predicted_chances(weights, gamma).mean()
        assert rate == pytest.approx(row["length_controlled_winrate"], abs=1e-6)


def test_null_models_weights_belong_to_another_c_than_its_row(tmp_path, difficulties):
    path = write_rows(tmp_path / "annotations.json", rows_of("NullModel"))
    published = LEADERBOARD.loc["NullModel"]
    of_weights = score_file(path, GAMED, difficulties, published["C_of_weights"], samples=2)
    weights = published[["glm_w_tanh_len", "glm_w_difficulty", "glm_w_bias"]]
    assert list(of_weights["coefficients"].values()) == pytest.approx(list(weights), abs=2e-4)
    assert of_weights["length_controlled_winrate"] == pytest.approx(86.325, abs=1e-3)
    assert abs(of_weights["length_controlled_winrate"] - published["length_controlled_winrate"]) > 0.1


def test_the_order_of_rows_changes_nothing(tmp_path, difficulties):
    rows = rows_of("alpaca-7b")
    straight = score_file(write_rows(tmp_path / "a.json", rows), GAMED, difficulties, samples=5)
    random.Random(3).shuffle(rows)
    assert score_file(write_rows(tmp_path / "b.json", rows), GAMED, difficulties, samples=5) == straight
    assert straight["C_from"] == "cross-validation"
    assert straight["C"] == pytest.approx(10 ** (4 / 3))  # its log-loss is smaller than its neighbours' by 7e-7


def test_intervals_surround_their_rates(tmp_path, difficulties):
    path = write_rows(tmp_path / "annotations.json", rows_of("FuseChat-Gemma-2-9B-Instruct"))
    numbers = score_file(path, GAMED, difficulties, 2.78, samples=100)
    for rate in ("win_rate", "length_controlled_winrate", "length_only_winrate"):
        assert numbers[f"{rate}_low"] < numbers[rate] < numbers[f"{rate}_high"]
    raw_width = numbers["win_rate_high"] - numbers["win_rate_low"]
    assert raw_width == pytest.approx(2 * 1.96 * numbers["standard_error"], rel=0.3)


def test_failed_judgements_are_counted_and_enter_no_rate(tmp_path, difficulties, caplog):
    rows = rows_of("FuseChat-Gemma-2-9B-Instruct")
    for row in rows[::9]:
        row["preference"] = None
    numbers = score_file(write_rows(tmp_path / "annotations.json", rows), GAMED, difficulties, 2.78, samples=5)
    assert (numbers["n_total"], numbers["n_scored"], numbers["n_failed"]) == (805, 715, 90)
    scored = [row["preference"] - 1 for row in rows if row["preference"] is not None]
    assert numbers["win_rate"] == pytest.approx(100 * np.mean(scored))
    assert "90 of 805 prompts have no preference" in caplog.text


def test_length_control_maximises_the_penalised_likelihood():
    generator = np.random.default_rng(0)
    gamed = GamedRows(generator.random(80), generator.normal(size=80), generator.normal(size=80))
    difficulty = generator.normal(size=60)
    lengths, reference_lengths = generator.integers(10, 900, (2, 60)).astype(float)
    wins = expit(0.4 - 0.8 * np.tanh((reference_lengths - lengths) / 300) + 0.5 * difficulty)
    preferences = 1.0 + np.where(generator.random(60) < wins, 0.9, 0.2)
    preferences[:7] = np.nan
    c = 0.3

    feature = np.tanh((reference_lengths - lengths) / (reference_lengths - lengths).std(ddof=1))
    own = np.column_stack([feature, difficulty, np.ones(60)])[7:]
    anchor = np.column_stack([np.tanh(gamed.length_differences), gamed.difficulties, np.zeros(80)])
    features = np.concatenate([own, anchor])
    chances = np.concatenate([preferences[7:] - 1, gamed.wins])
    weights = np.concatenate([np.ones(53), np.full(80, 0.1)])

    def loss(halves):  # coefficients are the difference of two positive halves, which makes |·| smooth
        logits = features @ (halves[:3] - halves[3:])
        return halves.sum() - c * weights @ (chances * log_expit(logits) + (1 - chances) * log_expit(-logits))

    best = minimize(loss, np.full(6, 0.1), bounds=[(0, None)] * 6, options={"ftol": 1e-15, "gtol": 1e-9}).x
    result = length_control(preferences, lengths, reference_lengths, difficulty, gamed, samples=3, seed=0, c=c)
    expected = best[:3] - best[3:]
    found = result.coefficients
    # liblinear stops at a tolerance of 1e-4, which is what published numbers were made with.
    assert [found.length, found.difficulty, found.advantage] == pytest.approx(expected, abs=0.01)
    predicted = expit(found.difficulty * difficulty + found.advantage)
    assert result.win_rate == pytest.approx(100 * predicted.mean())
    assert result.standard_error == pytest.approx(100 * predicted.std(ddof=1) / np.sqrt(60))


@pytest.mark.parametrize(
    ("preferences", "difficulties", "lengths", "message"),
    [
        ([1.5, None], [0.0, 0.0], [1.0, 2.0], "two scored prompts at least; 1 of 2"),
        ([1.5, 1.0], [0.0, np.nan], [1.0, 2.0], "1 of 2 prompts have no difficulty"),
        ([1.5, 1.0], [0.0, 0.0], [1.0, np.nan], "1 of 2 scored prompts have no length"),
    ],
)
def test_length_control_refuses_gaps(preferences, difficulties, lengths, message):
    gamed = GamedRows(np.array([0.5]), np.array([0.0]), np.array([0.0]))
    with pytest.raises(ValueError, match=message):
        length_control(preferences, lengths, [3.0, 4.0], difficulties, gamed, samples=2, seed=0, c=1.0)


def test_prompts_without_difficulty_get_no_length_controlled_win_rate(tmp_path, difficulties, caplog):
    rows = rows_of("NullModel")
    rows[5]["instruction"] = "something else"
    numbers = score_file(write_rows(tmp_path / "annotations.json", rows), GAMED, difficulties, 2.78, samples=5)
    reason = "1 of 805 prompts have no difficulty, the first is 'something else'"
    assert numbers["length_control"] == f"none: {reason}"
    for key in ("length_controlled_winrate", "lc_standard_error", "C", "C_from", "coefficients"):
        assert numbers[key] is None
    assert numbers["win_rate"] == pytest.approx(LEADERBOARD.loc["NullModel", "win_rate"])
    assert numbers["length_only_winrate"] > numbers["win_rate"]  # NullModel's responses are short
    assert reason in caplog.text


def test_prompts_of_ones_own_are_not_looked_up_on_the_hub(tmp_path):
    numbers = score_file(write_rows(tmp_path / "annotations.json", rows_of("NullModel")), samples=5)
    assert numbers["length_control"].startswith("none: 805 of 805 prompts are not AlpacaEval's")


def test_one_scored_prompt_has_a_rate_alone(tmp_path, difficulties):
    path = write_rows(tmp_path / "annotations.json", rows_of("NullModel")[:1])
    numbers = score_file(path, GAMED, difficulties, samples=5)
    assert numbers["win_rate"] == pytest.approx(100 * (rows_of("NullModel")[0]["preference"] - 1))
    assert numbers["standard_error"] is None
    assert numbers["length_only_winrate"] is None
    assert numbers["length_control"] == "none: it needs two scored prompts at least"


def test_a_model_against_itself_is_even_by_construction(tmp_path, difficulties, caplog):
    """As AlpacaEval's package has it, which fits nothing then; the raw rate stays what was judged."""
    rows = [row | {"generator_1": "NullModel"} for row in rows_of("NullModel")]
    path = write_rows(tmp_path / "annotations.json", rows)
    for gamed, known in ((GAMED, difficulties), (None, None)):
        numbers = score_file(path, gamed, known, samples=5)
        for end in ("", "_low", "_high"):
            assert numbers[f"length_controlled_winrate{end}"] == numbers[f"length_only_winrate{end}"] == 50.0
        assert (numbers["lc_standard_error"], numbers["C"], numbers["C_from"]) == (0.0, None, "construction")
        assert set(numbers["coefficients"].values()) == {0.0}
        assert numbers["win_rate"] == pytest.approx(LEADERBOARD.loc["NullModel", "win_rate"])
    assert "both 'NullModel', one model against itself" in caplog.text


def test_the_same_outputs_under_two_names_are_said(tmp_path, caplog):
    rows = [
        {"instruction": f"{n}", "output_1": "x" * n, "output_2": "x" * n, "generator_1": "a", "generator_2": "b",
         "preference": 1.5}
        for n in range(3)
    ]  # fmt: skip
    assert score_file(write_rows(tmp_path / "annotations.json", rows), samples=5)["length_only_winrate"] == 50.0
    assert "one model, whatever its sides are called" in caplog.text


def test_a_constant_length_difference_is_no_equal_length(tmp_path, difficulties):
    """The gamed rows know what length does, so AlpacaEval's rate is that of ever more equal differences."""
    rows = rows_of("alpaca-7b")
    rates = []
    for spread in (0, 0.001):
        for place, row in enumerate(rows):
            row |= {"len_1": 1000, "len_2": 600 - (place % 2 if spread else 0)}
        numbers = score_file(write_rows(tmp_path / "annotations.json", rows), GAMED, difficulties, 2.78, samples=3)
        rates.append(numbers["length_controlled_winrate"])
        assert numbers["length_only_winrate"] is None and numbers["length_only_winrate_low"] is None
        assert numbers["length_only_missing"].startswith("responses of one side are longer")
    assert rates[0] == pytest.approx(rates[1], abs=0.01)
    assert abs(rates[0] - numbers["win_rate"]) > 1.0


def alpaca_eval_rows():
    return [
        {"instruction": text, "len_1": 90, "len_2": 10 * number, "preference": 1.0 + 0.2 * number}
        for number, text in ALPACA_EVAL_PROMPTS.items()
    ]


@pytest.mark.parametrize("model", WEIGHTS.index)
def test_the_leaderboard_joined_files_that_lack_rows_by_row(tmp_path, model):
    """Its rates follow from its weights with the difficulties of AlpacaEval's first prompts, whichever were absent."""
    row = WEIGHTS.loc[model]
    weights = Coefficients(0.0, row["glm_w_difficulty"], row["glm_w_bias"])
    known = read_difficulties(write_numbered_difficulties(tmp_path / "numbered.csv"))
    by_row, all_prompts = (
        100.0 * predicted_chances(weights, known.of_first(count)).mean() for count in (int(row["n_total"]), 805)
    )
    assert by_row == pytest.approx(row["length_controlled_winrate"], abs=1e-6)
    assert (abs(all_prompts - by_row) > 1e-3) == (row["n_total"] < 805)


def incomplete_rows(model):
    """The model's judgements of those of AlpacaEval's prompts whose texts the tests have: 142, with gaps between."""
    content = json.loads(gzip.decompress(_JUDGED.read_bytes()))
    texts = {prompt_number(row["instruction"]): row["instruction"] for row in content["calls"] + content["comparisons"]}
    judged = rows_of(model)
    return [judged[number] | {"instruction": texts[number]} for number in sorted(texts)], sorted(texts)


def test_an_incomplete_file_gets_the_official_codes_number_too(tmp_path, caplog):
    rows, numbers = incomplete_rows("OpenHermes-2.5-Mistral-7B")
    numbered = write_numbered_difficulties(tmp_path / "numbered.csv")
    found = score_file(write_rows(tmp_path / "a.json", rows), GAMED, numbered, 2.78, samples=2)
    difficulties = pd.read_csv(numbered)["instruction_difficulty"].to_numpy()
    expected = [
        length_control(
            *np.array([[row[key] for key in ("preference", "len_2", "len_1")] for row in rows]).T,
            of_rows, read_gamed(GAMED), samples=2, seed=0, c=2.78,
        ).win_rate
        for of_rows in (difficulties[numbers], difficulties[: len(rows)])
    ]  # fmt: skip
    assert found["n_absent"] == 805 - len(rows) == 663
    rates = [found["length_controlled_winrate"], found["length_controlled_winrate_by_row"]]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert abs(rates[0] - rates[1]) > 1.0
    assert "incomplete: it has 142 of AlpacaEval's 805 prompts" in caplog.text
    assert f"{rates[0]:.2f}; the official code gives {rates[1]:.2f}" in caplog.text
    random.Random(4).shuffle(rows)
    assert score_file(write_rows(tmp_path / "b.json", rows), GAMED, numbered, 2.78, samples=2) == found


def test_a_complete_file_and_prompts_of_ones_own_have_no_number_by_row(tmp_path, difficulties):
    rows = rows_of("alpaca-7b")[:700]  # called "prompt 000" and so on, which are not AlpacaEval's
    numbers = score_file(write_rows(tmp_path / "a.json", rows), GAMED, difficulties, 2.78, samples=2)
    assert numbers["n_absent"] is None and numbers["length_controlled_winrate_by_row"] is None
    assert numbers["length_controlled_winrate"] is not None


def test_a_file_with_prompts_of_others_has_no_number_by_row(tmp_path):
    rows, _ = incomplete_rows("alpaca-7b")
    rows = rows[:20] + [rows[-1] | {"instruction": "one of our own"}]
    own = pd.DataFrame({"instruction": [row["instruction"] for row in rows], "instruction_difficulty": 0.5})
    own.to_csv(tmp_path / "own.csv")
    found = score_file(write_rows(tmp_path / "a.json", rows[5:]), GAMED, tmp_path / "own.csv", 2.78, samples=2)
    assert found["n_absent"] is None and found["length_controlled_winrate_by_row"] is None
    assert found["length_controlled_winrate"] is not None


def test_difficulties_of_the_present_prompts_alone_give_no_number_by_row(tmp_path):
    rows, numbers = incomplete_rows("alpaca-7b")
    table = pd.read_csv(write_numbered_difficulties(tmp_path / "numbered.csv")).iloc[numbers]
    table.assign(instruction=[row["instruction"] for row in rows]).to_csv(tmp_path / "own.csv")
    found = score_file(write_rows(tmp_path / "a.json", rows), GAMED, tmp_path / "own.csv", 2.78, samples=2)
    assert found["n_absent"] == 663 and found["length_controlled_winrate_by_row"] is None
    assert found["length_controlled_winrate"] is not None


def test_alpaca_evals_prompts_are_known_by_their_text():
    assert [prompt_number(text) for text in ALPACA_EVAL_PROMPTS.values()] == list(ALPACA_EVAL_PROMPTS)
    assert prompt_number(f"\n {ALPACA_EVAL_PROMPTS[1]} ") == 1
    assert prompt_number(ALPACA_EVAL_PROMPTS[1][:-1]) is None


def test_numbered_difficulties_are_joined_by_instruction(tmp_path):
    numbered = write_numbered_difficulties(tmp_path / "numbered.csv")
    known = read_difficulties(numbered)
    table = pd.read_csv(numbered)["instruction_difficulty"]
    assert [known.of(text) for text in ALPACA_EVAL_PROMPTS.values()] == [table[1], table[3], table[4]]
    assert np.isnan(known.of("prompt 001"))
    in_the_gamed_file = read_difficulties(GAMED)
    assert [in_the_gamed_file.of(text) for text in ALPACA_EVAL_PROMPTS.values()] == pytest.approx(
        [table[1], table[3], table[4]], abs=1e-6
    )
    unnamed = tmp_path / "unnamed.csv"
    pd.read_csv(numbered, index_col=0).rename_axis(None).to_csv(unnamed)
    assert read_difficulties(unnamed).of(ALPACA_EVAL_PROMPTS[3]) == table[3]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_difficulties, "index,difficulty\n0,1\n", "no column `instruction_difficulty`; it has index, difficulty"),
        (read_difficulties, "prompt,instruction_difficulty\n0,1\n", "no column `index`"),
        (read_difficulties, "index,instruction_difficulty\n0,1\n1,\n", "row 1: `instruction_difficulty` is 'nan'"),
        (read_difficulties, "index,instruction_difficulty\n0,1\n0,2\n", "row 1: .* prompt 0 is 2, but 1 in a row"),
        (read_difficulties, "", "not a table in CSV"),
        (read_gamed, "preference,std_delta_len\n1,1\n", "no column `instruction_difficulty`"),
        (
            read_gamed,
            "preference,std_delta_len,instruction_difficulty\n0.5,1,1\n1.5,1,1\n",
            r"row 1: `preference` is 1.5; of gamed rows it is in \[0, 1\]",
        ),
        (
            read_gamed,
            "preference,std_delta_len,instruction_difficulty\nhigh,1,1\n",
            "row 0: `preference` is 'high', not a number",
        ),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, read, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "missing.csv")


def test_gamed_rows_without_preference_are_left_out(tmp_path):
    path = tmp_path / "gamed.csv"
    path.write_text("preference,std_delta_len,instruction_difficulty\n0.5,1,2\n,3,4\n")
    gamed = read_gamed(path)
    assert (gamed.wins, gamed.length_differences, gamed.difficulties) == ([0.5], [1.0], [2.0])


def test_a_file_with_another_hash_is_refused():
    require_sha256(GAMED, hashlib.sha256(GAMED.read_bytes()).hexdigest())
    with pytest.raises(InputError, match="its SHA-256 is .* that of the published file is 0000"):
        require_sha256(GAMED, "0" * 64)


def run_winrate(*arguments, hub_cache):
    """The command in a process of its own, with nothing but `hub_cache` to take the hub's files from."""
    return subprocess.run(
        [sys.executable, "-m", "epsdpo", "winrate", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_damaged_file_in_the_hubs_cache_is_refused(tmp_path):
    snapshot = tmp_path / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / HUB_REVISION
    snapshot.mkdir(parents=True)
    (snapshot / HUB_FILE).write_bytes(gzip.decompress(GAMED.read_bytes()))
    result = run_winrate(write_rows(tmp_path / "annotations.json", alpaca_eval_rows()), hub_cache=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "its SHA-256 is" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_the_hub_there_is_no_length_controlled_win_rate(tmp_path):
    result = run_winrate(write_rows(tmp_path / "annotations.json", alpaca_eval_rows()), hub_cache=tmp_path)
    numbers = json.loads(result.stdout)
    assert result.returncode == 0
    assert numbers["win_rate"] == pytest.approx(100 * (0.2 + 0.6 + 0.8) / 3)
    assert numbers["length_controlled_winrate"] is None
    assert numbers["length_control"].startswith("none: the published gamed rows cannot be had")
    assert "no length-controlled win rate" in result.stderr


def test_the_command_prints_one_json_object_and_needs_no_torch(tmp_path):
    numbered = write_numbered_difficulties(tmp_path / "numbered.csv")
    annotations = write_rows(tmp_path / "annotations.json", alpaca_eval_rows())
    arguments = ["winrate", annotations, "--gamed", GAMED, "--difficulty", numbered, "--C", "2.5"]
    code = (
        "import sys; from epsdpo.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'datasets', 'papermill'} & set(sys.modules)), file=sys.stderr); "
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stderr.splitlines()[-1] == "[]"
    assert "incomplete: it has 3 of AlpacaEval's 805 prompts" in result.stderr
    numbers = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is not strict JSON"))
    assert numbers["n_total"] == numbers["n_scored"] == 3
    assert numbers["avg_length"] == int((10 + 30 + 40) / 3)
    assert numbers["length_control"] == "AlpacaEval 2"
    assert (numbers["C"], numbers["C_from"]) == (2.5, "caller")
    assert 0.0 < numbers["length_controlled_winrate"] < 100.0


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"instruction": "a", "len_1": 1, "len_2": 1, "preference": 3}], [], "outside [1, 2]"),
        ([{"instruction": "a", "len_1": 1, "len_2": 1, "preference": None}], [], "none of its 1 prompts"),
        (alpaca_eval_rows(), ["--C", "0"], "C is 0"),
        (alpaca_eval_rows(), ["--C", "nan"], "C is nan"),
        (alpaca_eval_rows(), ["--gamed", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_the_command_refuses_with_exit_code_2(tmp_path, capsys, rows, arguments, message):
    path = write_rows(tmp_path / "annotations.json", rows)
    assert main(["winrate", str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
