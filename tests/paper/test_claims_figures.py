"""The figures of the claims page: tables by hand, and drawings that show every number and crop none."""

import json

import numpy as np
import pandas as pd
import pytest
from kit.claim_runs import write_run
from matplotlib.backends.backend_agg import FigureCanvasAgg

from epsdpo.experiment import ConfigError
from epsdpo.methods.record import read_pairs
from epsdpo.paper.claims import drawing, drawing_within
from epsdpo.paper.claims import figure_tables as tables
from epsdpo.paper.claims.drawing_verdicts import all_verdicts
from epsdpo.paper.claims.run_table import finished_runs
from epsdpo.plots import save
from epsdpo.trajectory.summary import decision_fractions

HALF = 2.484138  # of the 95 % interval of 1, 2, 3: t(2; 0.975) · 1 / √3
LONG = "ε-DPO with its criterion in bfloat16, β=0.3, ε_c=0.005"
FAMILIES = {"dpo": "dpo", "noisy_dpo": "dpo", "eps": "epsilon_dpo bfloat16", "eps_high": "epsilon_dpo bfloat16"}
TITLES = {"dpo": "DPO", "noisy_dpo": "DPO, noisy", "eps": LONG, "eps_high": f"{LONG}, β=1"}


def measures(worlds=3):
    """Recipes whose win rates are 60, 61, 62, …, each a point higher in each further world."""
    rows = []
    for place, recipe in enumerate(FAMILIES):
        for world in range(1, worlds + 1):
            rate = 60.0 + place + world
            rows.append(
                {
                    "name": f"{recipe}-seed{world}",
                    "recipe": recipe,
                    "world": world,
                    "title": TITLES[recipe],
                    "family": FAMILIES[recipe],
                    "beta": 1.0 if recipe == "eps_high" else 0.3,
                    "epsilon": 0.01,
                    "epsilon_step": 0.02 if recipe == "eps_high" else 0.01,
                    "label_temperature": 0.15 if recipe.startswith("noisy") else 0.05,
                    "win_rate": rate,
                    "length_controlled_win_rate": rate - 2.0,
                    "forward_kl_per_response": 0.5 + place + 0.1 * world,
                    "policy_gold": 0.6,
                    "reference_gold": 0.5 + 0.01 * world,
                    "policy_tokens": 6.0,
                    "reference_tokens": 5.0,
                    "gold_gain": 0.1,
                    "beta_final": 0.2,
                    "mean_step": 0.3,
                }
            )
    return pd.DataFrame(rows)


def numbers(row):
    return row[["mean", "low", "high", "worlds", "world_1", "world_3"]].tolist()


# ----------------------------------------------------------------------------------------------------------- tables


def test_worlds_are_joined_in_order_and_one_world_has_no_interval():
    values = pd.DataFrame(
        [("b", 3, 3.0), ("b", 1, 1.0), ("b", 2, 2.0), ("a", 2, 7.0), ("a", 3, np.nan)],
        columns=["key", "world", "value"],
    )
    b, a = (row for _, row in tables.over_worlds(values, ["key"], level=0.95).iterrows())
    assert b["key"] == "b" and numbers(b) == [2.0, pytest.approx(2 - HALF), pytest.approx(2 + HALF), 3, 1.0, 3.0]
    assert (a["mean"], a["worlds"], a["world_2"]) == (7.0, 1, 7.0)
    assert np.isnan([a["low"], a["high"], a["world_1"], a["world_3"]]).all()


def test_the_comparison_begins_with_the_model_that_training_starts_from():
    table = tables.main(measures(), {"compared": ["eps", "dpo", "none"]}, 0.95)
    assert list(dict.fromkeys(table["title"])) == [tables.SFT, LONG, "DPO"]  # as in the claims file
    rows = table.set_index(["recipe", "measure"])
    assert rows.loc[(tables.SFT, "win_rate"), ["mean", "low", "high"]].tolist() == [50.0, 50.0, 50.0]
    assert rows.loc[(tables.SFT, "policy_gold"), "mean"] == pytest.approx(0.52)
    assert numbers(rows.loc[("eps", "win_rate")]) == pytest.approx([64.0, 64 - HALF, 64 + HALF, 3, 63.0, 65.0])
    assert tables.main(measures(), {}, 0.95).empty


def test_the_maps_have_the_papers_numbers_and_tell_them_apart():
    table = tables.two_epsilons(measures(), {"grid": ["eps", "eps_high"]}, 0.95)
    here = table[(table["source"] == tables.HERE) & (table["measure"] == "win_rate")]
    assert here[["epsilon", "epsilon_step", "mean"]].to_numpy().tolist() == [[0.01, 0.01, 64.0], [0.01, 0.02, 65.0]]
    paper = table[table["source"] == tables.PAPER].pivot(
        index="measure", columns=["epsilon", "epsilon_step"], values="mean"
    )
    assert paper.loc["win_rate", (0.01, 0.01)] == 79.2 and paper.loc["win_rate"].max() == 79.2
    # The mean step grows with what is checked, whatever the size of the step.
    assert (np.diff(paper.loc["mean_step"].to_numpy().reshape(3, 3), axis=0) > 0).all()
    assert table.loc[table["source"] == tables.PAPER, "worlds"].isna().all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two recipes in two worlds: pairs tie in the first half and relax, tighten, tie in the second, or always relax."""
    batch = tmp_path_factory.mktemp("batch")
    for world in (1, 2):
        checkpoints = [(20, 50.0 + world, 0.1 * world), (40, 54.0 + world, 0.5)]
        write_run(
            batch,
            "moving",
            world,
            decide=lambda step: (0, 0, 0) if step <= 20 else (1, -1, 0),
            margin=2.0 * world,
            checkpoints=checkpoints,
        )
        write_run(batch, "relaxing", world, decide=lambda step: (1,), beta=0.3)
    return finished_runs(batch, ["moving", "relaxing"])


def test_what_happens_within_an_epoch_by_hand(runs):
    table = tables.dynamics(runs, {"ε": ["moving"], "none": ["missing"]}, 0.95)
    rows = table.set_index(["measure", "share_of_epoch"])
    assert rows.loc[("win_rate", 0.5), ["mean", "world_1", "world_2", "worlds"]].tolist() == [51.5, 51.0, 52.0, 2]
    assert rows.loc[("forward_kl_per_response", 1.0), "mean"] == 0.5
    relaxed = rows.loc["relaxed", "mean"]
    assert len(relaxed) == 20 and relaxed.index[0] == 0.025 and relaxed.index[-1] == 0.975
    assert relaxed.tolist() == pytest.approx([0.0] * 10 + [100 / 3] * 10)
    assert rows.loc["tightened", "mean"].tolist() == pytest.approx(relaxed.tolist())


def test_margins_by_hand(runs):
    """Log-ratio margins are 2 and 4 in the two worlds, half of that where pairs tighten, and β is 0.1."""
    table = tables.margins(runs, {"DPO": ["moving", "relaxing"]}, 0.95).set_index(["recipe", "decision"])
    assert table.loc[("moving", "relaxed"), "mean"] == pytest.approx(0.3)
    assert table.loc[("moving", "tightened"), "mean"] == pytest.approx(0.15)
    assert table.loc[("relaxing", "relaxed"), ["beta", "mean"]].tolist() == pytest.approx([0.3, 0.3])
    assert ("relaxing", "tightened") not in table.index  # no pair did


def bounds():
    return pd.DataFrame(
        [
            {
                "name": f"dpo-seed{world}",
                "world": world,
                "criterion_dtype": precision,
                "share_of_epoch": share,
                "decision": decision,
                "bound": np.nan if decision == "tied" else 0.006 + 0.001 * world + 0.001 * share,
                "share_at_largest": np.nan if decision == "tied" else (share == 1.0) * 0.1 * world,
                "largest_epsilon": 0.02,
            }
            for world in (1, 2, 3)
            for precision in ("bfloat16", "float32")
            for share in (0.1, 1.0)
            for decision in ("relaxed", "tied", "tightened")
        ]
    )


def test_bounds_by_hand():
    table = tables.bound(bounds(), {"DPO": ["dpo"]}, 0.95)
    assert len(table) == 8  # two precisions, decisions and checkpoints; ties have no bound
    assert table["mean"].tolist() == pytest.approx([0.0081, 0.0081, 0.009, 0.009] * 2)
    assert (table["high"] - table["mean"]).tolist() == pytest.approx([0.001 * HALF] * 8, rel=1e-5)
    assert table["share_at_largest"].tolist() == pytest.approx([0.0, 0.0, 0.2, 0.2] * 2)
    assert tables.bound(pd.DataFrame(), {"DPO": ["dpo"]}, 0.95).empty


def test_bounds_that_are_lower_limits_are_drawn_hollow():
    figure = drawing_within.bound(tables.bound(bounds(), SHOWN["bound"], 0.95))
    for axes in figure.axes:
        points = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
        hollow = {line.get_xdata()[0]: line.get_markerfacecolor() == "white" for line in points}
        assert hollow == {0.1: False, 1.0: True}
        assert axes.get_xlabel() == "share of training"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "largest ε tried: 0.02" in labels


def test_shares_within_training_are_those_of_the_trajectory(tmp_path):
    """50 steps, which no twentieth divides: each stretch stands at the middle of its own steps."""
    write_run(tmp_path, "odd", 1, steps=50, decide=lambda step: (1, -1) if step % 7 else (0, 0))
    runs = finished_runs(tmp_path, ["odd"])
    table = tables.dynamics(runs, {"ε": ["odd"]}, 0.95)
    fractions = decision_fractions(read_pairs(tmp_path / "odd-seed1" / "train"), windows=20)
    for decision in ("relaxed", "tightened"):
        expected = fractions[fractions["decision"] == decision]
        drawn = table[table["measure"] == decision]
        assert drawn["mean"].tolist() == pytest.approx((100 * expected["share"]).tolist())
        assert drawn["share_of_epoch"].tolist() == pytest.approx(((expected["step"] - 0.5) / 50).tolist(), abs=5e-4)


def rounds():
    rows = [("ε-DPO, full logits", 1.5), ("DPO, full logits", 1.0), ("ε-DPO, epsdpo", 1.0)]
    rows = [(name, 8, turn, seconds * turn) for name, seconds in rows for turn in (1, 2)]
    return pd.DataFrame([*rows, ("DPO, TRL", 8, 2, 4.0)], columns=["contender", "length", "round", "seconds"])


def test_step_costs_are_read_and_compared_round_by_round(tmp_path):
    path = tmp_path / "mini.json"
    assert tables.read_rounds(path).empty  # the benchmark has not run
    path.write_text(json.dumps({"results": []}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mini\.json: has no rounds.*Run benchmarks/step_cost\.py again"):
        tables.read_rounds(path)
    path.write_text(json.dumps({"rounds": rounds().to_dict("records")}), encoding="utf-8")
    full, ours = tables.step_cost(tables.read_rounds(path), 0.95).to_dict("records")
    assert (full["mean"], full["low"], full["high"], full["rounds"]) == (50.0, 50.0, 50.0, 2)
    assert (ours["peer"], ours["mean"], ours["rounds"], ours["round_2"]) == ("DPO, TRL", -50.0, 1, -50.0)


# --------------------------------------------------------------------------------------------------------- drawings


SHOWN = {
    "main": {"compared": list(FAMILIES)},
    "frontier": {"DPO": ["dpo"], "ε-DPO with its criterion in bfloat16": ["eps", "eps_high"]},
    "two_epsilons": {"grid": ["eps", "eps_high"]},
    "dynamics": {"ε = 0.005": ["moving"], "ε = 0.01": ["relaxing"]},
    "margins": {"DPO": ["moving", "relaxing"]},
    "bound": {"DPO": ["dpo"]},
    "initial_beta": {"DPO": ["dpo"], "ε-DPO": ["eps", "eps_high"]},
    "label_noise": {"DPO": ["dpo", "noisy_dpo"], "ε-DPO": ["eps"]},
}


def table_of(name, runs, worlds=3, groups=None):
    """The table of a figure, as the notebook makes it of the runs, their measures, or the bounds of ε."""
    made_of = {"dynamics": runs, "margins": runs, "bound": bounds()}.get(name, measures(worlds))
    return getattr(tables, name)(made_of, SHOWN[name] if groups is None else groups, 0.95)


def draw(name, table):
    room = drawing_within if name in ("dynamics", "margins", "bound") else drawing
    return getattr(room, name)(table)


def is_whole(figure):
    """Whether the canvas cuts nothing off, to a hundredth of an inch."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    return min(drawn.x0, drawn.y0) > -0.01 and drawn.x1 < width + 0.01 and drawn.y1 < height + 0.01


@pytest.mark.parametrize("name", [*SHOWN, "step_cost"])
def test_each_figure_is_whole_and_saved_with_its_numbers(runs, tmp_path, name):
    table = tables.step_cost(rounds(), 0.95) if name == "step_cost" else table_of(name, runs)
    figure = draw(name, table)
    assert is_whole(figure)
    assert all(axes.get_xlabel() for axes in figure.axes if name != "two_epsilons")
    save(figure, tmp_path / f"{name}.png", data=table, caption="what to see")
    written = pd.read_csv(tmp_path / f"{name}.csv")
    assert written["mean"].tolist() == pytest.approx(table["mean"].tolist())


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("two_epsilons", "bound")])
def test_what_has_not_run_is_left_out_and_named(runs, name):
    groups = {**SHOWN[name], "missing": ["never_run"]}
    some = tables.coverage(table_of(name, runs, groups=groups), groups, 0.95)
    assert some.startswith(" Intervals are 95%, Student's t over ")
    assert some.endswith("Without finished runs, and so not shown: never_run.")
    none = table_of(name, runs, groups={"missing": ["never_run"]})
    assert none.empty and "No finished run" in draw(name, none).axes[0].texts[0].get_text()
    assert tables.coverage(none, {}, 0.95) == ""


def test_means_with_intervals_are_drawn_where_the_table_has_them(runs):
    table = table_of("frontier", runs)
    (axes,) = drawing.frontier(table).axes
    lines, labels = axes.get_legend_handles_labels()
    assert labels == list(SHOWN["frontier"])
    line, (_, _, (xbars, ybars)) = lines[1], axes.containers[1]
    rows = table[table["group"] == labels[1]].set_index(["measure", "recipe"])
    for recipe, x, y, xbar, ybar in zip(
        ["eps", "eps_high"], line.get_xdata(), line.get_ydata(), xbars.get_segments(), ybars.get_segments(), strict=True
    ):
        divergence, wins = rows.loc[("forward_kl_per_response", recipe)], rows.loc[("win_rate", recipe)]
        assert (x, y) == (divergence["mean"], wins["mean"])
        assert xbar[:, 0].tolist() == pytest.approx([divergence["low"], divergence["high"]])
        assert ybar[:, 1].tolist() == pytest.approx([wins["low"], wins["high"]])
    assert sorted(text.get_text() for text in axes.texts) == ["β = 0.3"]  # of the first method alone


def test_one_world_is_drawn_without_bars(runs):
    for name in ("main", "frontier", "initial_beta", "label_noise", "two_epsilons"):
        table = table_of(name, runs, worlds=1)
        assert table["low"].isna().all() and is_whole(draw(name, table))
        here = table[table["source"] == tables.HERE] if name == "two_epsilons" else table
        assert "gives no interval" in tables.coverage(here, SHOWN[name], 0.95)


def test_an_interval_of_two_worlds_does_not_set_the_scale_of_the_margins():
    rows = [("relaxed", 0.1, 2.0, 5), ("relaxed", 1.0, 3.0, 5), ("tied", 0.1, 0.0, 5), ("tied", 1.0, -1.0, 2)]
    table = pd.DataFrame(rows, columns=["decision", "beta", "mean", "worlds"]).assign(group="DPO")
    table["high"] = table["mean"] + np.where(table["worlds"] < 3, 60.0, 0.1)
    figure = drawing_within.margins(table)
    (axes,) = figure.axes
    assert axes.get_ylim()[0] > -2 and axes.get_ylim()[1] < 5
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in hollow] == [[-1.0]]


def test_verdicts_are_labelled_by_the_words_of_the_table():
    says = "ε-DPO has a higher length-controlled win rate than TR-DPO that replaces its reference, in words."
    ends = {"effect": 0.5, "low": 0.4, "high": 0.6, "above": 0.0, "below": None, "margin": 0.7, "unit": "points"}
    figure = all_verdicts(
        pd.DataFrame([{"name": "beats_tr", "says": says, "verdict": "holds", "why": "", **ends}]), "title"
    )
    (label,) = figure.axes[0].get_yticklabels()
    assert " ".join(label.get_text().split()) == says and is_whole(figure)
