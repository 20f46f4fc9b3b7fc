"""How figures are saved and set for print, and that a method looks the same in every figure."""

import importlib
import inspect
import itertools
import math
import pkgutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from epsdpo import paper, plots
from epsdpo.experiment import Experiment
from epsdpo.methods.kernels import ARITHMETICS
from epsdpo.paper.claims.verdicts import VERDICTS
from epsdpo.paper.published import Published
from epsdpo.plots import style
from epsdpo.plots.displacement import apart_by_group, apart_of_runs, apart_over_training
from epsdpo.plots.looks import FAMILIES, STARTING_MODEL, family_of, run_looks
from epsdpo.plots.publication import DOUBLE_COLUMN, SINGLE_COLUMN, fit_for_print
from epsdpo.plots.report import decisions_of_runs, win_rate_against_kl
from epsdpo.plots.trajectory import beta_trajectory, training_curves

STEPS = pd.DataFrame(
    {"step": range(1, 25), "beta_before": 0.1, "loss": 0.69, "log_ratio_margin": 1.0, "reward_accuracy": 0.5}
)
STEPS = STEPS.assign(chosen_log_ratio=-1.0, rejected_log_ratio=-2.0)
APART = pd.DataFrame(
    [
        {"measure": measure, "group": group, "step": step, "value": value, "low": value - 0.1, "high": value + 0.1}
        for measure, value in (("chosen", -1.0), ("rejected", -2.0), ("displaced", 0.6))
        for step, group in ((4.5, "relaxed"), (12.5, "tied"), (20.5, "tightened"))
    ]
)


def judged(titles):
    """What `report.win_rates_and_kl` has of runs."""
    numbers = {"win_rate": 55.0, "reverse_kl_per_response": 1.0, "forward_kl_per_response": 2.0}
    ends = {
        f"{name}_{end}": value + shift
        for name, value in numbers.items()
        for end, shift in (("low", -0.5), ("high", 0.5))
    }
    return pd.DataFrame([{"title": title, **numbers, **ends} for title in titles])


def assert_nothing_is_cropped(figure):
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02  # inches


def test_a_saved_figure_lies_beside_what_a_paper_needs(tmp_path):
    figure = beta_trajectory({"run": STEPS}, {"run": "dpo"}, "title β̃")
    picture = plots.save(figure, tmp_path / "new" / "beta.png", data=STEPS, caption="β over the steps.")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"beta.png", "beta.pdf", "beta.csv", "beta.txt"}
    assert (tmp_path / "new" / "beta.txt").read_text(encoding="utf-8") == "β over the steps.\n"
    pdf = (tmp_path / "new" / "beta.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, and none of matplotlib's own kind
    assert b"/CreationDate" not in pdf
    assert picture.alt == "title β̃"


def test_published_repeats_lie_behind_their_run_in_its_colour():
    band = pd.DataFrame({"step": STEPS["step"], "low": 0.09, "high": 0.12})
    runs = {"one": STEPS, "other": STEPS}
    figure = beta_trajectory(runs, {"one": "dpo", "other": "ipo"}, "title", {"one": band, "other": None})
    (drawn,) = figure.axes[0].collections
    assert drawn.get_label() == "one, published" and to_hex(drawn.get_facecolor()[0]) == FAMILIES["dpo"].colour.lower()
    assert drawn.get_datalim(figure.axes[0].transData).intervaly.tolist() == [0.09, 0.12]
    assert_nothing_is_cropped(figure)


def test_a_picture_shows_its_caption_under_it_and_no_markup_of_it(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("epsdpo.plots.saving.display", shown.append)
    figure = beta_trajectory({"run": STEPS}, {"run": "dpo"}, "title")
    plots.show(figure, "beta", STEPS, "<script>β & co</script>", folder=tmp_path)
    assert (tmp_path / "beta.png").exists()
    assert shown[0].data.startswith(b"\x89PNG")
    assert "<script>" not in shown[1].data and "&lt;script&gt;β &amp; co" in shown[1].data


def test_figures_for_print():
    """Width of a column, legible letters, no title and nothing cropped, with as many runs as a folder may have."""
    titles = [f"ε-DPO, learning_rate=0.0006, seed={number}" for number in range(30)]
    families = {title: "dpo" if place % 2 else "ipo" for place, title in enumerate(titles)}
    steps = dict.fromkeys(titles, STEPS)
    shares = pd.DataFrame({"title": titles, "relaxed": 0.5, "tied": 0.3, "tightened": 0.2})
    figures = {
        "beta": (beta_trajectory(steps, families, "the title"), SINGLE_COLUMN),
        "training": (training_curves(steps, families), DOUBLE_COLUMN),
        "gain": (win_rate_against_kl(judged(titles), families, "the title"), DOUBLE_COLUMN),
        "decisions": (decisions_of_runs(shares, "the title"), DOUBLE_COLUMN),  # names beside bars take room
        "apart": (apart_of_runs(dict.fromkeys(titles, APART), families, "the title"), DOUBLE_COLUMN),
    }
    for name, (figure, width) in figures.items():
        assert_nothing_is_cropped(figure)
        labels = {text.get_text() for text in figure.findobj(Text)} & set(titles)
        fit_for_print(figure)
        assert_nothing_is_cropped(figure)
        assert figure.get_figwidth() == width, name
        drawn = {text.get_text(): text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()}
        assert "the title" not in drawn and labels == set(titles) <= set(drawn)
        assert all(7.0 <= size <= 8.0 for size in drawn.values()), name


def test_figures_of_one_run_apart_for_print():
    groups = {"decision": APART, "likeness of the responses (1: equal), in thirds": APART}
    for figure in (
        apart_over_training(APART, (1, 8), "the title"),
        apart_over_training(APART[APART["measure"] != "displaced"], None, "the title"),
        apart_by_group(groups, "the title"),
    ):
        assert_nothing_is_cropped(figure)
        fit_for_print(figure)
        assert_nothing_is_cropped(figure)
        assert figure.get_figwidth() == DOUBLE_COLUMN
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        named = {text.get_text() for text in figure.legends[0].get_texts()}
        assert {"chosen", "rejected"} <= named and "the title" not in {text.get_text() for text in figure.findobj(Text)}


def test_a_name_longer_than_the_figure_is_wide_is_broken_between_its_words():
    name = " ".join(f"learning_rate={number}e-7" for number in range(12))
    figure = beta_trajectory(dict.fromkeys((name, "short"), STEPS), {name: "dpo", "short": "ipo"}, "the title")
    for _ in range(2):  # on the page, and in print
        assert_nothing_is_cropped(figure)
        broken, short = (text.get_text() for text in figure.legends[0].get_texts())
        assert "\n" in broken and " ".join(broken.split()) == name and short == "short"
        fit_for_print(figure)


def experiment(method, **train):
    train = {"beta": 0.1, "epsilon": 0.01, "learning_rate": 1.0e-6, **train}
    return Experiment.model_validate({"name": "run", "title": "run", "method": method, "train": train})


def test_families_follow_from_method_and_settings():
    assert family_of(experiment("dpo", criterion_dtype="bfloat16")) == "dpo"
    assert family_of(experiment("epsilon_dpo")) == "epsilon_dpo float32"
    assert family_of(experiment("epsilon_dpo", criterion_dtype="bfloat16")) == "epsilon_dpo bfloat16"
    for arithmetic in ARITHMETICS:  # each that a run may have is drawn
        assert family_of(experiment("epsilon_dpo", criterion_dtype=arithmetic)) in FAMILIES
    assert family_of(experiment("tr_dpo", ref_model_mixup_alpha=1.0)) == "tr_dpo hard"
    assert family_of(experiment("tr_dpo")) == "tr_dpo soft"
    assert family_of(experiment("hinge")) == "other"


def hue(colour):
    """The direction of a colour from grey, which shades keep."""
    red, green, blue = to_rgb(colour)
    return math.atan2(math.sqrt(3.0) * (green - blue), 2 * red - green - blue)


def test_a_method_has_one_look_and_its_runs_stay_apart():
    alone = run_looks({"a": "ipo", "b": "epsilon_dpo float32"})
    assert alone == {"a": FAMILIES["ipo"], "b": FAMILIES["epsilon_dpo float32"]}
    assert len(set(FAMILIES.values())) == len(FAMILIES)
    families = {f"{family} {seed}": family for seed in range(5) for family in ("ipo", "beta_dpo", "dpo")}
    looks = run_looks(families)
    assert len(set(looks.values())) == 15
    for title, family in families.items():
        assert len({looks[other].marker for other in families if families[other] == family}) == 5
        if family != "dpo":  # grey has no hue
            assert hue(looks[title].colour) == pytest.approx(hue(FAMILIES[family].colour), abs=0.02)
    assert looks["ipo 0"] == FAMILIES["ipo"]


# --------------------------------------------------------------------------------------- one colour, one meaning

TITLES = {
    "run a": "dpo",
    "run b": "epsilon_dpo bfloat16",
    "run c": "epsilon_dpo float32",
    "run d": "ipo",
    "run e": "epsilon_dpo bfloat16_logits",
}
LOOKS = {title: FAMILIES[family].colour for title, family in TITLES.items()}
OURS = FAMILIES["epsilon_dpo bfloat16"].colour
RUNS = {title: STEPS.assign(reward_margin=0.3, mean_step=0.1, share_of_run=0.5, beta_ratio=1.0) for title in TITLES}
SHARES = pd.DataFrame(
    [
        {"decision": decision, "step": step, "centre": step, "left": -1, "right": 1, "bin": step, "epsilon": step}
        | {"share": 0.3, "low": 0.2, "high": 0.4, "predicted": 0.3, "arithmetic": arithmetic, "bound": 0.01}
        | {"share_at_largest": 0.5, "largest_epsilon": 0.02}
        for arithmetic in ("float32", "bfloat16")
        for decision in style.DECISION_COLOURS
        for step in (1.0, 2.0)
    ]
)
OVER_WORLDS = {"low": 0.4, "high": 0.6, "mean": 0.5, "worlds": 3, "world_1": 0.5, "world_2": 0.4, "world_3": 0.6}


def recipes(measures, **settings):
    """A table of the claims page: two β of each run, which stands for a group and for two recipes."""
    return pd.DataFrame(
        [
            {"group": title, "title": title, "recipe": f"{title} {beta}", "family": family, "measure": measure}
            | {"beta": beta, **settings, **OVER_WORLDS}
            for title, family in TITLES.items()
            for measure in measures
            for beta in (0.1, 0.3)
        ]
    )


def main_table():
    table = recipes(["win_rate", "length_controlled_win_rate", "forward_kl_per_response"]).query("beta == 0.1")
    start = table[table["title"] == "run a"].assign(title="SFT model", family="")
    return pd.concat([start, table])


def twins():
    rows = [
        {"setting": "one", "precision": precision, "run": run, "step": step, "beta_before": 0.1}
        for precision in ("float32", "bfloat16", "bfloat16_logits")
        for run in "ab"
        for step in (1, 2)
    ]
    return pd.DataFrame(rows)


def bounds():
    rows = SHARES[SHARES["decision"] != "tied"]
    return rows.assign(group="DPO", criterion_dtype="bfloat16", share_of_epoch=rows["step"] / 2, **OVER_WORLDS)


def verdict_table():
    ends = {
        "effect": 0.5,
        "low": 0.4,
        "high": 0.6,
        "above": 0.0,
        "below": None,
        "unit": "points",
        "why": "",
        "margin": 0.7,
    }
    return pd.DataFrame([{"name": verdict, "says": verdict, "verdict": verdict, **ends} for verdict in VERDICTS])


RATES = pd.DataFrame({"label": ["raw"], "win_rate": [60.0], "low": [55.0], "high": [65.0], "difference": [1.0]})
RATES = RATES.assign(step=1, win_rate_low=55.0, win_rate_high=65.0, forward_kl_per_response=1.0)
RATES = RATES.assign(forward_kl_per_response_low=0.9, forward_kl_per_response_high=1.1)
RESPONSES = pd.DataFrame({"policy_tokens": [3, 4, 5], "reference_tokens": [4, 4, 4], "preference": [1.2, 1.5, 1.9]})
RESPONSES = RESPONSES.assign(policy_gold=[0.2, 0.5, 0.9], reference_gold=0.5)
LENGTHS = pd.DataFrame(
    [{"split": "train", "part": part, "tokens": count} for part in ("prompt", "chosen", "rejected") for count in (3, 5)]
)
SCORES = pd.DataFrame({"score": [0.1, 0.4, 0.9], "chosen_score": [0.9] * 3, "rejected_score": [0.1] * 3})
CHANGES = pd.DataFrame(
    [
        {"precision": precision, "setting": "one", "measure": measure, "change": 0.1, "low": 0.0, "high": 0.2}
        for precision in ("bfloat16", "bfloat16_logits")
        for measure in ("mean_step", "beta_final", "forward_kl_per_response", "win_rate")
    ]
)
FITTED = pd.DataFrame({"epsilon": [0.01, 0.02], "relaxed": 0.5, "tied": 0.3, "tightened": 0.2})
TABLE_5 = pd.DataFrame({"epsilon": [0.01, 0.02], "reported": 0.2, "exact": 0.2})
CASES = pd.DataFrame({"case": list("abc"), "shift": 0.5, "chance": 0.1, "simulated": 0.1})
COSTS = pd.DataFrame([{"contender": "ε-DPO", "peer": "DPO", "mean": 1.0, "low": 0.5, "high": 1.5, "round_1": 1.0}])
EPSILONS = pd.DataFrame({"source": ["these runs"] * 2, "measure": ["win_rate", "mean_step"], "epsilon": 0.01})
EPSILONS = EPSILONS.assign(epsilon_step=0.01, **OVER_WORLDS)

PAPERS = Published(table="Table 9", note="One run each.")
BESIDE = pd.DataFrame({"row": list("abcd"), "column": "", "metric": "win_rate", "prints": "win rate (%)"})
BESIDE = BESIDE.assign(published=60.0, measured=61.0, low=60.0, high=62.0, prediction_low=58.0, prediction_high=64.0)
BESIDE = BESIDE.assign(state=["measured"] * 3 + ["not run"], inside=[True, False, None, None])

RUN, DECISION, OUTCOME, START = "runs", "decisions", "outcomes", "starting model"
# Every drawing function -> how it is called, and what it shows: nothing else may have colours of its own.
MEAN_STEPS = pd.DataFrame(
    {"arithmetic": ["float32", "bfloat16_logits", "bfloat16"], "policy": "a", "epsilon": 0.01}
).assign(mean_step=0.1, low=0.0, high=0.2, predicted=[np.nan, 0.1, 0.0])
FIGURES = {
    "paper.claims.drawing.frontier": (lambda draw: draw(recipes(["win_rate", "forward_kl_per_response"])), {RUN}),
    "paper.claims.drawing.initial_beta": (lambda draw: draw(recipes(["beta_final", "win_rate"])), {RUN}),
    "paper.claims.drawing.label_noise": (
        lambda draw: draw(recipes(["gold_gain", "win_rate"]).assign(label_temperature=lambda rows: rows["beta"])),
        {RUN},
    ),
    "paper.claims.drawing.main": (lambda draw: draw(main_table()), {RUN, START}),
    "paper.claims.drawing.nothing_to_show": (lambda draw: draw(), set()),
    "paper.claims.drawing.step_cost": (lambda draw: draw(COSTS), {"epsilon_dpo float32"}),
    "paper.claims.drawing.two_epsilons": (lambda draw: draw(EPSILONS), set()),
    "paper.claims.drawing_within.bound": (lambda draw: draw(bounds()), {DECISION}),
    "paper.claims.drawing_within.dynamics": (
        lambda draw: draw(
            recipes(["win_rate", "forward_kl_per_response", "relaxed", "tightened"]).assign(share_of_epoch=0.5)
        ),
        {RUN},
    ),
    "paper.claims.drawing_within.margins": (
        lambda draw: draw(SHARES.assign(group="DPO", beta=SHARES["step"], **OVER_WORLDS)),
        {DECISION},
    ),
    "paper.claims.drawing_verdicts.all_verdicts": (lambda draw: draw(verdict_table(), "title"), {OUTCOME}),
    "paper.drawing_table.beside_the_paper": (lambda draw: draw(PAPERS, BESIDE), {OUTCOME}),
    "data.length_histogram": (lambda draw: draw(LENGTHS), {OUTCOME}),
    "paper.drawing_bound.epsilon_bounds": (lambda draw: draw(SHARES, "title"), {DECISION}),
    "displacement.apart_by_group": (lambda draw: draw({"a": APART, "b": APART}, "title"), {OUTCOME}),
    "displacement.apart_of_runs": (lambda draw: draw(dict.fromkeys(TITLES, APART), TITLES, "title"), {RUN}),
    "displacement.apart_over_training": (lambda draw: draw(APART, (1, 8), "title"), {OUTCOME}),
    "evaluation.gold_differences": (lambda draw: draw(RESPONSES), {OUTCOME}),
    "evaluation.preference_histogram": (lambda draw: draw(RESPONSES, OURS), {RUN}),
    "evaluation.response_lengths": (lambda draw: draw(RESPONSES, OURS), {RUN, START}),
    "evaluation.two_judges": (lambda draw: draw(pd.DataFrame({"official": [1.2], "judged": [1.3]}), "title"), set()),
    "evaluation.win_rate_by_length": (lambda draw: draw(RATES, "title", OURS), {RUN}),
    "evaluation.win_rates": (lambda draw: draw(RATES, "title", OURS), {RUN}),
    "evaluation.within_training": (lambda draw: draw(RATES, "title", OURS), {RUN}),
    "on_policy.score_histograms": (lambda draw: draw(SCORES, SCORES), {OUTCOME}),
    "paper.precision.drawing.beta_by_precision": (lambda draw: draw(twins(), "title"), {RUN}),
    "paper.precision.drawing.by_precision": (lambda draw: draw(CHANGES, "title"), {RUN}),
    "paper.precision.drawing.chance_curves": (lambda draw: draw(CASES, "title"), set()),
    "paper.precision.drawing.shares_over_epsilon": (lambda draw: draw({"pairs": SHARES}, "title"), {DECISION}),
    "paper.precision.drawing.shares_over_quantities": (lambda draw: draw({"tokens": SHARES}, "title"), {DECISION}),
    "paper.precision.drawing.table_5": (lambda draw: draw(TABLE_5, FITTED, "title"), {RUN, DECISION}),
    "paper.real_text.pictures.mean_steps_over_epsilon": (lambda draw: draw(MEAN_STEPS, {"a": "A"}, "title"), {RUN}),
    "report.decisions_of_runs": (lambda draw: draw(FITTED.assign(title=["run a", "run b"]), "title"), {DECISION}),
    "report.win_rate_against_kl": (lambda draw: draw(judged(list(TITLES)), TITLES, "title"), {RUN}),
    "sft.loss_curve": (lambda draw: draw(STEPS, "title"), {START}),
    "trajectory.beta_trajectory": (lambda draw: draw(RUNS, TITLES, "title"), {RUN}),
    "trajectory.decision_fractions": (lambda draw: draw(SHARES, "title"), {DECISION}),
    "trajectory.decisions_by": (lambda draw: draw({"length": SHARES}, "title"), {DECISION}),
    "trajectory.live": (lambda draw: draw(RUNS["run b"], "title", OURS), {RUN, OUTCOME}),
    "trajectory.logged_curves": (lambda draw: draw(RUNS, TITLES), {RUN}),
    "trajectory.relative_trajectory": (lambda draw: draw(RUNS, TITLES, "title"), {RUN}),
    "trajectory.training_curves": (lambda draw: draw(RUNS, TITLES), {RUN}),
}


def drawing_functions():
    """Every public function that returns a figure, by module and name."""
    found = {}
    rooms = (
        pkgutil.iter_modules(plots.__path__, "epsdpo.plots."),
        pkgutil.walk_packages(paper.__path__, "epsdpo.paper."),
    )
    for module in itertools.chain(*rooms):
        for name, function in vars(importlib.import_module(module.name)).items():
            own = inspect.isfunction(function) and function.__module__ == module.name and name[0] != "_"
            if own and inspect.signature(function).return_annotation is Figure:
                found[f"{module.name.removeprefix('epsdpo.').removeprefix('plots.')}.{name}"] = function
    return found


def colours_of(artist):
    """The colours in which a line, a patch or a collection is drawn, without those that no letter of it shows."""
    if isinstance(artist, Line2D):
        drawn = [artist.get_color()] if artist.get_linestyle() != "None" or artist.get_marker() != "None" else []
    elif isinstance(artist, Patch):
        drawn = [artist.get_facecolor()] if artist.get_fill() else [artist.get_edgecolor()]
    else:
        drawn = [*artist.get_facecolor(), *artist.get_edgecolor()]
    return {to_hex(colour) for colour in drawn}


def drawn_in(figure):
    """(artist, its colours) of all that is drawn in the panels of a figure."""
    kinds = (Line2D, Patch, Collection)
    for axes in figure.axes:
        frame = {axes.patch, *axes.spines.values(), *axes.get_xgridlines(), *axes.get_ygridlines()}
        ticks = {line for axis in (axes.xaxis, axes.yaxis) for line in axis.get_ticklines()}
        for artist in axes.get_children():
            if isinstance(artist, kinds) and artist not in frame | ticks:
                yield artist, colours_of(artist)


def test_every_figure_is_looked_at():
    assert set(drawing_functions()) == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_colour_means_one_thing_in_every_figure(name):
    """Runs have those of their methods, decisions and outcomes theirs, and all else none."""
    call, shown = FIGURES[name]
    figure = call(drawing_functions()[name])
    allowed = {
        RUN: set(map(to_hex, LOOKS.values())),
        DECISION: set(map(to_hex, style.DECISION_COLOURS.values())),
        OUTCOME: set(map(to_hex, style.OUTCOME_COLOURS.values())),
        START: {to_hex(FAMILIES[STARTING_MODEL].colour)},
        "epsilon_dpo float32": {to_hex(FAMILIES["epsilon_dpo float32"].colour)},
    }
    known = set().union({to_hex(style.NEUTRAL), "#ffffff"}, *(allowed[kind] for kind in shown))
    seen = set()
    for artist, colours in drawn_in(figure):
        assert colours <= known, f"{artist} is {colours}"
        seen |= colours
    for kind in shown:
        assert seen & allowed[kind], f"nothing shows {kind}"
    # What has a name in the legend has the colour of that name.
    labels = {label: decision for decision, label in style.DECISION_LABELS.items()}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            artist = handle[0] if isinstance(handle, tuple) else handle
            if label in TITLES:
                assert colours_of(artist) == {to_hex(LOOKS[label])}, label
            if label in labels:
                assert colours_of(artist) == {to_hex(style.DECISION_COLOURS[labels[label]])}, label


# Machado, Oliveira and Fernandes (2009), on linear RGB: how those see who lack one kind of cone.
SEEN_BY = {
    "all cones": np.eye(3),
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def as_lab(colour, cones):
    """CIE L*a*b* of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN_BY[cones]) @ linear, 0.0, 1.0)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ seen / [0.9505, 1.0, 1.0888])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", SEEN_BY)
def test_colours_can_be_told_apart_without_red_or_green_cones(cones):
    """Those of one table, which lie beside each other; methods differ in line and marker as well."""
    tables = ((style.DECISION_COLOURS, 45), (style.OUTCOME_COLOURS, 19), (style.METHOD_COLOURS, 7))
    for table, least in tables:
        for one, other in itertools.combinations(table, 2):
            distance = np.linalg.norm(as_lab(table[one], cones) - as_lab(table[other], cones))
            assert distance > least, f"{one} and {other}: {distance:.0f}"
    everywhere = [*style.METHOD_COLOURS.values(), *style.DECISION_COLOURS.values(), *style.OUTCOME_COLOURS.values()]
    assert len(set(everywhere)) == len(everywhere)
