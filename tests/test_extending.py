"""docs/extending.md, taken by its word: its files are written, its blocks run in order, and β follows the rule."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from kit.official import save_official_model

from epsdpo import read_pairs, read_steps
from epsdpo.batch.specs import STAGES, code_digests
from epsdpo.methods.catalogue import CATALOGUE
from epsdpo.runs import reach
from epsdpo.runs.layout import NOTEBOOKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# A block, with the file of which the paragraph before it says at its end that it is that.
BLOCK = re.compile(
    r"(?:`(?P<file>[\w/]+\.\w+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def run(folder, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy of the package in which somebody has done what the page says, and what the commands printed."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "epsdpo", folder / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    save_official_model(folder / "my-model")
    printed = ""
    for file, language, text in BLOCK.findall(PAGE):
        if language == "diff":
            context, _, added = text.partition("\n")
            before = (folder / file).read_text(encoding="utf-8")
            assert before.count(f"{context[1:]}\n") == 1
            lines = "".join(line.removeprefix("+") for line in added.splitlines(keepends=True))
            (folder / file).write_text(before.replace(context[1:] + "\n", f"{context[1:]}\n{lines}"), encoding="utf-8")
        elif file:
            (folder / file).write_text(text, encoding="utf-8")
        elif language == "python":
            printed += run(folder, sys.executable, "-c", text)
        else:
            assert language == "sh"
            printed += run(folder, "sh", "-ec", text)
    return folder, printed


def test_beta_moves_by_the_rule(followed):
    folder, printed = followed
    assert "margin_dpo" not in CATALOGUE  # what ran was the copy
    steps, pairs = read_steps(folder / "out" / "train"), read_pairs(folder / "out" / "train")
    assert steps["step"].tolist() == [1, 2, 3, 4] and len(pairs) == 32
    margins = pairs.groupby("step")["log_ratio_margin"].mean()
    expected = [0.1 * math.exp(0.5 * margin) for margin in margins]
    assert steps["beta_after"].tolist() == pytest.approx(expected, rel=1e-5)
    assert steps["beta_before"].tolist() == [0.1, *steps["beta_after"][:-1]]
    assert steps["beta_after"].nunique() > 1 and (pairs["decision"] != 0).any()
    assert "train.margin_rate  (float; default: 0.1)" in printed


def test_the_figure_is_saved_with_its_numbers(followed):
    folder, _ = followed
    table = pd.read_csv(folder / "out" / "beta_by_margin.csv")
    assert table["beta_after"].tolist() == pytest.approx(read_steps(folder / "out" / "train")["beta_after"].tolist())
    assert (folder / "out" / "beta_by_margin.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_of_the_method_is_refused_under_others_and_kept_by_a_resumed_run(followed, tmp_path):
    folder, _ = followed
    program = (
        "import sys\nfrom epsdpo.experiment import ConfigError, load_variant\n"
        "try: load_variant('margin_dpo.yaml', ['method=dpo', 'train.margin_rate=0.1'])\n"
        "except ConfigError as error: print(error)\n"
        "try: load_variant('margin_dpo.yaml', ['train.margin_rate=-1.0'])\n"
        "except ConfigError as error: print(error)\n"
        "from epsdpo.methods.catalogue import trainer_class\n"
        "print(trainer_class('margin_dpo').kept_settings)"
    )
    others, negative, kept = run(folder, sys.executable, "-c", program).splitlines()
    assert "train.margin_rate has no effect under method 'dpo'" in others
    assert "train.margin_rate=-1.0 must be at least 0" in negative and "'margin_rate'" in kept


def test_the_judge_prefers_the_shorter_output(followed):
    folder, printed = followed
    rows = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    assert [row["preference"] for row in rows] == [2.0, 1.0] and rows[0]["annotator"] == "shorter"
    assert len((folder / "answers" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert re.search(r"win_rate\W+50\b", printed)


def test_nothing_that_is_finished_is_due_for_it(followed, monkeypatch):
    """Neither a training of another method nor what was made of it."""
    folder, _ = followed

    def code():
        return {stage: code_digests(stage, NOTEBOOKS / STAGES[stage].notebook, "epsilon_dpo") for stage in STAGES}

    before = code()
    monkeypatch.setattr(reach, "PACKAGE", folder / "epsdpo")
    after = code()
    assert {stage for stage in STAGES if after[stage] != before[stage]} == set()
