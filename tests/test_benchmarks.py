"""The benchmark itself: its contenders compute the same losses, and its table and figure say what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from kit.tiny_gguf import tiny_llama, write_gguf

from epsdpo.paper.claims.figure_tables import PEERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
H200 = BENCHMARKS / "results" / "gpu-nvidia-h200.json"


@pytest.fixture(scope="module")
def step_cost():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("step_cost")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu_check(step_cost):
    return importlib.import_module("gpu_check")


def test_contenders_of_one_objective_agree(step_cost):
    names = [name for name in step_cost.CONTENDERS if "Liger" not in name]
    measured = [step_cost.measure(name, "tiny", 16, steps=2) for name in names]
    losses = {result["contender"]: result["loss"] for result in measured}
    assert losses["ε-DPO, epsdpo"] == pytest.approx(losses["ε-DPO, full logits"], rel=1e-4)
    assert losses["DPO, full logits"] == pytest.approx(losses["DPO, TRL"], rel=1e-5)
    assert losses["ε-DPO, epsdpo"] != losses["DPO, TRL"]  # β̃ is in it
    assert all(len(result["seconds"]) == 2 and result["peak_mib"] >= 0 for result in measured)
    with pytest.raises(SystemExit, match="disagree about the loss at 16 tokens"):
        step_cost._require_agreement([{**result, "loss": index + 1.0} for index, result in enumerate(measured)])


def results_by_hand():
    return [
        {"contender": "DPO, TRL", "length": 8, "seconds": [2.0, 4.0, 3.0], "peak_mib": 100.0, "loss": 0.7},
        {"contender": "DPO, TRL", "length": 8, "seconds": [9.0], "peak_mib": 120.0, "loss": 0.7},
        {"contender": "ε-DPO, epsdpo", "length": 8, "seconds": [1.0, 1.5, 2.0], "peak_mib": 30.0, "loss": 0.7},
    ]


def test_summary_by_hand(step_cost):
    peer, ours = step_cost.summarise(results_by_hand()).itertuples()
    assert (peer.seconds, peer.seconds_min, peer.seconds_max, peer.peak_mib) == (3.5, 2.0, 9.0, 120.0)
    assert (ours.seconds, ours.time_ratio, ours.memory_ratio) == (1.5, pytest.approx(3 / 7), 0.25)


def test_rounds_by_hand(step_cost):
    """The median of a turn's steps, one row per turn: what two contenders are compared by."""
    measured = [{**result, "round": turn} for result, turn in zip(results_by_hand(), (1, 2, 1), strict=True)]
    assert step_cost.by_round(measured) == [
        {"contender": "DPO, TRL", "length": 8, "round": 1, "seconds": 3.0},
        {"contender": "DPO, TRL", "length": 8, "round": 2, "seconds": 9.0},
        {"contender": "ε-DPO, epsdpo", "length": 8, "round": 1, "seconds": 1.5},
    ]


def test_what_is_expected_of_a_gpu_by_hand_and_on_the_page(step_cost):
    expected = importlib.import_module("expected")
    step = expected.Expected(expected.SHAPES["Llama-3-8B"], 2048)
    assert step.layer_weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) == 6_979_321_856
    assert step.head_operations == 5 * 2 * 4080 * 4096 * 128_256
    assert step.layer_operations == 8 * 4096 * step.layer_weights + 4.5 * 32 * (2 * 2 * 2048**2 * 4096)
    assert step.passes_ms(0) == pytest.approx((14 * 4080 + 6 * 4096) * 128_256 / 4.32e9)
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for table in expected.tables():
        assert f"\n\n{table}\n\n" in page


def test_peers_are_contenders_of_the_two_objectives(step_cost):
    assert all(
        ours in step_cost.CONTENDERS and peer in step_cost.CONTENDERS and ours[0] == "ε" and peer[0] == "D"
        for ours, peer in PEERS.items()
    )


def test_figure_and_table_hold_every_number(step_cost):
    table = step_cost.summarise(results_by_hand())
    assert "| 8 | **ε-DPO, epsdpo** | 1.5 (1–2) | 0.43 | 30 | 0.25 |" in step_cost.as_markdown(table)
    figure = step_cost.draw(table, "a machine")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sorted(texts) == ["0.25×", "0.43×", "1.00×", "1.00×"]


def test_documents_quote_the_committed_results(step_cost):
    """A table that was measured and a table that is shown must be the same one."""
    content = json.loads((BENCHMARKS / "results" / "cpu.json").read_text(encoding="utf-8"))
    table = pd.DataFrame(content["results"])
    assert step_cost.as_markdown(table) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for row in table[table["contender"] == step_cost.OURS].itertuples():
        for ratio in (row.time_ratio, row.memory_ratio):
            assert f"{ratio:.2f}×" in page, f"docs/benchmarks.md does not quote {ratio:.2f}× at {row.length} tokens"


def test_documents_quote_what_a_gpu_gave(step_cost):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    costs = json.loads(H200.read_text(encoding="utf-8"))["cost"]
    for part in costs.values():
        assert step_cost.as_markdown(pd.DataFrame(part["costs"])) in page
    exact, rounded = (
        [row for part in costs.values() for row in part["costs"] if row["contender"] == name]
        for name in (step_cost.OURS, *step_cost.OURS_ROUNDED)
    )
    for rows in (exact, rounded):
        ratios = [row["time_ratio"] for row in rows]
        assert f"{min(ratios):.2f}× to {max(ratios):.2f}×" in page
    memory = [row["memory_ratio"] for row in exact]
    summary = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"{min(memory):.2f}× to {max(memory):.2f}×" in " ".join(summary.split())


def test_what_a_gpu_gave_in_words_and_as_a_figure(gpu_check, tmp_path):
    found = json.loads(H200.read_text(encoding="utf-8"))
    words = "\n".join(gpu_check.in_words(found))
    assert "NVIDIA H200, torch 2.11.0" in words and "0.97× TRL's DPO; memory 0.79×" in words
    assert not gpu_check.is_right(found)  # kernels and model are not in it
    whole = {
        **found,
        "kernels": {"tests": {"passed": 23}, "failed": []},
        "model": {"steps": 50, "resumed_steps": 50},
    }
    assert gpu_check.is_right(whole)
    assert not gpu_check.is_right({**whole, "kernels": {"tests": {"passed": 22, "failed": 1}, "failed": ["one"]}})
    assert not gpu_check.is_right({**whole, "model": {"steps": 50, "resumed_steps": 25}})
    assert gpu_check.write(found, tmp_path) == tmp_path / H200.name
    assert (tmp_path / "gpu-nvidia-h200.png").stat().st_size > 10_000


def test_memory_of_a_gpu_is_what_the_estimate_says(gpu_check):
    """Within a tenth of what torch allocated on an H200."""
    for setting, part in json.loads(H200.read_text(encoding="utf-8"))["cost"].items():
        measured = [
            {"contender": gpu_check.OURS, "length": row["length"], "models_mib": 0.0, "peak_mib": row["allocated_mib"]}
            for row in part["memory"]
        ]
        for row in gpu_check.memory_beside_estimate(setting, measured):
            assert row["estimated_mib"] == pytest.approx(row["allocated_mib"], rel=0.1)


def test_the_part_with_a_model_runs_without_a_gpu_too(gpu_check, tmp_path, monkeypatch):
    """On a tiny model: what is resumed goes on with the same bits, and both devices, here one, decide alike."""
    monkeypatch.setenv("EPSDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(BENCHMARKS.parent)
    for name, fewer in {"STEPS": 20, "INTERRUPTED_AT": 11, "COMPARED_PAIRS": 4}.items():
        monkeypatch.setattr(gpu_check, name, fewer)
    found = gpu_check.check_model(str(write_gguf(tmp_path / "tiny.gguf", tiny_llama())))
    assert found["steps"] == found["resumed_steps"] > gpu_check.INTERRUPTED_AT
    assert found["largest_difference_of_beta"] == found["largest_difference_of_loss"] == 0.0
    assert found["decisions"]["same"] == dict.fromkeys(found["decisions"]["same"], 4)


def test_without_a_gpu_it_says_so_and_what_to_do(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--model", "none", "--output", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
        assert gpu_check.main() == 1
        assert "CUDA wheels" in capsys.readouterr().err and not list(tmp_path.iterdir())
