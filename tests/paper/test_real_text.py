"""The study on real text with a tiny model: foretold before it is measured, taken up where it stopped, shown."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kit.official import OFFICIAL
from kit.tiny_stages import TEMPLATE, TRAIN, experiment_of, write_base_model, write_prompts

from epsdpo.__main__ import main
from epsdpo.batch.runner import run_batch
from epsdpo.batch.specs import StageId
from epsdpo.data.prompts import read_prompts
from epsdpo.experiment import ConfigError, load_experiment, load_saved
from epsdpo.paper.frozen import load_frozen
from epsdpo.paper.precision import decisions
from epsdpo.paper.precision.decisions import ARITHMETICS
from epsdpo.paper.real_text import outcomes
from epsdpo.paper.real_text.foretold import compared, expected_range, mean_steps, predictions
from epsdpo.paper.real_text.measuring import measure
from epsdpo.paper.real_text.seal import DIGEST, PREDICTIONS, WRITTEN
from epsdpo.paper.real_text.subjects import few_some_many, subjects_of
from epsdpo.runs.layout import REAL_TEXT

HH = Path(__file__).parents[2] / "configs" / "real_mini" / "hh"
EPSILONS = (0.02, 0.1)
TITLE = "tiny <script>alert('title')</script>"


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """One run of the tiny model on the tiny pairs, of which every step is kept, through the runner to the page."""
    folder = tmp_path_factory.mktemp("real_text")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    values = {
        "name": "tiny",
        "title": TITLE,
        "method": "epsilon_dpo",
        "data": {"source": str(OFFICIAL / "pairs.jsonl"), "eval_share": 0.34},
        "model": {
            "name_or_path": str(write_base_model(folder / "base")),
            "dtype": "float32",
            "chat_template": str(folder / "template.jinja"),
        },
        "train": TRAIN
        | {"epsilon": 0.01, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0e-2},
        "trajectory": False,
        "evaluate": {
            "prompts": {"source": str(write_prompts(folder / "prompts.jsonl")), "column": "prompt"},
            "max_new_tokens": 8,
            "judge": None,
            "bootstrap_samples": 20,
        },
    }
    outcome = run_batch([experiment_of(values)], folder / "runs", real_text=True)
    assert not outcome.failed and not outcome.not_run
    assert StageId("real_text", "real_text") in outcome.finished
    return folder / "runs"


@pytest.fixture
def run_dir(batch, tmp_path):
    """A copy of the batch in which nothing was foretold yet."""
    shutil.copytree(batch, tmp_path / "runs", ignore=shutil.ignore_patterns(REAL_TEXT, "real_text"))
    return tmp_path / "runs"


@pytest.fixture
def decided(monkeypatch):
    """What is computed in arithmetic that rounds, as it is computed: ε of each batch."""
    seen, steps = [], decisions.rounded_steps

    def watched(states, heads, epsilon):
        seen.append(epsilon)
        return steps(states, heads, epsilon)

    monkeypatch.setattr(decisions, "rounded_steps", watched)
    return seen


def kept_in(run_dir):
    (folder,) = (run_dir / REAL_TEXT).iterdir()
    return folder


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_it_cannot_show_and_shows_the_rest(batch):
    page = (batch / "real_text" / "notebook.html").read_text(encoding="utf-8")
    assert "no win rate" in page and "Traceback" not in page and "Warning" not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.index("What it cannot show") < page.index("The criterion") < page.index("Examples")
    folder = kept_in(batch)
    digest = (folder / DIGEST).read_text().split()[0]
    assert digest in page
    # Steps 1, 2 and 4 of four: few, some and many.
    policies = pd.read_csv(batch / "real_text" / "shares.csv")["policy"].unique()
    assert list(policies) == ["tiny-step1", "tiny-step2", "tiny-step4"]
    pictures = {path.stem for path in (batch / "real_text").glob("*.png")}
    assert pictures == {"shares_tiny", "mean_steps", "beta", "apart"}
    assert "real_text/notebook.html" in (batch / "index.html").read_text(encoding="utf-8")
    assert not list(folder.glob("*.safetensors"))  # hidden states are held no longer than they are needed


def test_a_finished_batch_is_left_alone(batch):
    before = {path: path.stat().st_mtime_ns for path in (batch / "real_text").iterdir()}
    outcome = run_batch([experiment_in(batch)], batch, real_text=True)
    assert not outcome.failed and {path: path.stat().st_mtime_ns for path in (batch / "real_text").iterdir()} == before


def test_the_command_ends_in_the_study_where_asked(tmp_path, capsys):
    config = str(HH.parents[1] / "demo")
    for asked in (True, False):
        assert main(["run", config, "--dry-run", "--output", str(tmp_path / "none"), *["--real-text"] * asked]) == 0
        assert ("would run  real_text/real_text: not run yet" in capsys.readouterr().out) is asked


def experiment_in(run_dir):
    return load_saved(run_dir / "tiny" / "experiment.yaml")


# ------------------------------------------------------------------------------------------- foretold, then measured


def test_predictions_lie_there_before_anything_rounded_is_computed(run_dir, monkeypatch):
    steps, seen = decisions.rounded_steps, []

    def looking(states, heads, epsilon):
        folder = kept_in(run_dir)
        seen.append([(folder / name).exists() for name in (PREDICTIONS, DIGEST, WRITTEN)])
        return steps(states, heads, epsilon)

    monkeypatch.setattr(decisions, "rounded_steps", looking)
    measured = measure(run_dir, EPSILONS)
    assert seen and all(all(there) for there in seen)
    assert measured.seal.written <= measured.first_measured
    checked = subprocess.run(["sha256sum", "--check", DIGEST], cwd=kept_in(run_dir), capture_output=True, text=True)
    assert checked.stdout == f"{PREDICTIONS}: OK\n"
    assert {*ARITHMETICS} <= {*measured.table}
    assert measured.table.groupby(["policy", "epsilon"]).size().nunique() == 1


def test_what_is_measured_is_what_one_pass_over_all_pairs_gives(run_dir):
    """The two passes in batches decide as the precision study's one pass, but for near-ties."""
    table = measure(run_dir, EPSILONS).table
    (subject,) = subjects_of(run_dir)
    reference, policy = (
        load_frozen(subject.experiment, str(place), subject.arguments.device)
        for place in (subject.experiment.model.name_or_path, subject.policies[-1].folder)
    )
    whole = decisions.measure_pairs(policy, reference, subject.pairs, subject.arguments.max_length, EPSILONS)
    both = table[table["policy"] == "tiny-step4"].merge(whole, on=["epsilon", "pair_id"], suffixes=("", " whole"))
    assert len(both) == len(whole) == len(EPSILONS) * len(subject.pairs)
    for arithmetic in ARITHMETICS:
        assert (both[arithmetic] == both[f"{arithmetic} whole"]).mean() > 0.97, arithmetic
    assert np.allclose(both["chosen_log_ratio"], both["chosen_log_ratio whole"], atol=1e-4)
    assert both["float32"].abs().mean() > 0.9  # there is something to decide


def test_a_killed_pass_goes_on_where_it_stopped(run_dir, decided, monkeypatch):
    """Killed in the middle of the second policy: no file is made twice, and the predictions stay as they were."""
    watched, calls = decisions.rounded_steps, []

    def dying(states, heads, epsilon):
        calls.append(epsilon)
        if len(calls) > 14:  # four batches for each of six policies and ε
            raise KeyboardInterrupt
        return watched(states, heads, epsilon)

    monkeypatch.setattr(decisions, "rounded_steps", dying)
    with pytest.raises(KeyboardInterrupt):
        measure(run_dir, EPSILONS)
    folder = kept_in(run_dir)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    finished = [name for name in before if name.endswith("-decided.parquet")]
    assert len(finished) == 3 and WRITTEN in before
    decided.clear()
    monkeypatch.setattr(decisions, "rounded_steps", watched)
    first = measure(run_dir, EPSILONS)
    assert len(decided) == 3 * 4
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if after.get(name) != before[name]} == {
        f"tiny-step{step}.safetensors"
        for step in (1, 2, 4)  # hidden states, no longer needed
    }
    decided.clear()
    again = measure(run_dir, EPSILONS)
    assert decided == [] and again.seal == first.seal
    pd.testing.assert_frame_equal(again.table, first.table)


def test_tampering_is_refused(run_dir):
    """With predictions that are other, or gone while what they are about was measured."""
    measure(run_dir, EPSILONS)
    folder = kept_in(run_dir)
    file, content = folder / PREDICTIONS, (folder / PREDICTIONS).read_bytes()
    file.write_bytes(content.replace(b"0.0", b"0.1", 1))
    with pytest.raises(ConfigError, match="SHA-256 is not that of"):
        measure(run_dir, EPSILONS)
    # With a new hash to match, it is still not what follows from the exact pass.
    (folder / DIGEST).write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {PREDICTIONS}\n")
    with pytest.raises(ConfigError, match="not what follows from the exact pass"):
        measure(run_dir, EPSILONS)
    file.unlink()
    with pytest.raises(ConfigError, match="holds measurements, and not the predictions"):
        measure(run_dir, EPSILONS)


def test_decisions_of_other_predictions_are_refused(run_dir):
    measure(run_dir, EPSILONS)
    one = next(kept_in(run_dir).glob("*-decided.parquet"))
    pd.read_parquet(one).assign(after="0" * 64).to_parquet(one)
    with pytest.raises(ConfigError, match="measured after other predictions"):
        measure(run_dir, EPSILONS)


# ---------------------------------------------------------------------------------------------------------- the pairs


def test_the_pairs_are_as_many_as_is_said_and_no_prompt_is_in_both_files():
    rows, prompts = {}, {}
    for name in ("short", "longer"):
        with gzip.open(HH / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file]
        prompts[name] = {row["chosen"].rpartition("\n\nAssistant:")[0] for row in rows[name]}
    said = re.findall(r"\| `\w+\.jsonl\.gz` \| ([\d,]+) \|", (HH / "README.md").read_text(encoding="utf-8"))
    assert (
        [int(number.replace(",", "")) for number in said] == [len(rows["short"]), len(rows["longer"])] == [1253, 1059]
    )
    assert not prompts["short"] & prompts["longer"]
    assert "MIT License" in (HH / "LICENSE").read_text(encoding="utf-8")
    answered = load_experiment(HH.parent / "dpo.yaml").evaluate.prompts
    asked = read_prompts(answered.model_copy(update={"source": str(HH / "longer.jsonl.gz")}))
    assert len(asked.table) == 32 and answered.source == "configs/real_mini/hh/longer.jsonl.gz"


# ------------------------------------------------------------------------------------------------------- by hand


def test_expected_range_by_hand():
    """Ten fair coins: 2 to 8 heads in 97.9 % of cases, fewer than 2 or more than 8 in 1.1 % each."""
    assert expected_range(np.full(10, 0.5)) == (0.2, 0.8)
    assert expected_range(np.zeros(7)) == (0.0, 0.0) and expected_range(np.ones(7)) == (1.0, 1.0)
    assert expected_range(np.array([1.0, 1.0, 0.0, 0.0])) == (0.5, 0.5)


def test_range_holds_what_it_should():
    random = np.random.default_rng(0)
    chances = random.uniform(size=150) ** 3
    low, high = expected_range(chances)
    shares = (random.uniform(size=(4000, 150)) < chances).mean(axis=1)
    inside = ((shares >= low - 1e-9) & (shares <= high + 1e-9)).mean()
    assert 0.95 <= inside < 0.985


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [([5], [5]), ([1, 2, 9], [1, 2, 9]), ([8, 16, 24, 32], [8, 16, 32]), ([1, 10, 50, 100], [1, 10, 100])],
)
def test_few_some_and_many_steps(steps, chosen):
    assert few_some_many(steps) == chosen


def made_up(pairs=60):
    """Pairs of one policy that decide as the model has it in all arithmetic but bfloat16, where all tie."""
    random = np.random.default_rng(1)
    table = {"policy": "a-step2", "run": "A <b>", "step": 2, "epsilon": 0.01, "float32": 1}
    table |= {"pair_id": [f"p{number}" for number in range(pairs)], "tokens": np.arange(pairs) + 10}
    table |= {"chosen_log_ratio": random.normal(size=pairs), "rejected_log_ratio": random.normal(size=pairs) - 1.0}
    table = pd.DataFrame(table)
    table["prompt"] = table["pair_id"]
    for arithmetic in ("bfloat16_logits", "float16", "sums_rounded", "bfloat16"):
        table[arithmetic] = random.choice([1, 0, -1], p=[0.5, 0.3, 0.2], size=pairs)
        for decision, chance in (("relaxed", 0.5), ("tied", 0.3), ("tightened", 0.2)):
            table[f"{arithmetic} {decision}"] = chance
    table["bfloat16"] = 0
    return table


def test_what_is_off_is_listed_and_what_is_not_is_not():
    table = made_up()
    comparison = compared(predictions(table), table)
    called = outcomes.titles(table)
    off = outcomes.unexplained(comparison, called)
    of_all = off[(off["length of both (tokens)"] == "all") & (off["arithmetic"] == "all bfloat16")]
    assert set(of_all["decision"]) == {"relaxed (β⁻)", "tied (β)", "tightened (β⁺)"}
    assert (off["arithmetic"] == "all bfloat16").sum() == 12  # all lengths' three decisions
    assert (off["arithmetic"] != "all bfloat16").sum() <= 4  # of 36, by chance
    assert off["decision"].iloc[0] == "tied (β)"  # furthest out: 100 % where 30 % were foretold
    assert outcomes.off_by_epsilon(comparison).loc["all bfloat16", 0.01] == "12 of 12"
    sentence = outcomes.in_short(comparison, called)
    assert re.search(r"all bfloat16 1?\d of 12", sentence) and "unexplained" in sentence
    shown = outcomes.side_by_side(comparison, called, "tied")
    assert shown.loc[("A <b>, step 2", "all bfloat16"), 0.01].endswith("· 30*")


def test_mean_steps_and_the_tables_beside():
    table = made_up()
    steps = mean_steps(table).set_index("arithmetic")
    assert steps.loc["bfloat16", "mean_step"] == 0.0 and steps.loc["bfloat16", "predicted"] == pytest.approx(0.3)
    assert np.isnan(steps.loc["float32", "predicted"]) and steps.loc["float32", "mean_step"] == 1.0
    beside = outcomes.table_5_beside(steps.reset_index(), outcomes.titles(table))
    assert beside.loc["paper, Table 5: runs of gemma-2-2b on HH", 0.01] == "+0.24 to +0.25"
    assert beside.loc["A <b>, step 2", 0.02] == "–"
    held_out = outcomes.held_out(table, outcomes.titles(table)).loc["A <b>, step 2"]
    share = 100 * (table["chosen_log_ratio"] > table["rejected_log_ratio"]).mean()
    assert held_out["accuracy (%)"].startswith(f"{share:.0f} [")
