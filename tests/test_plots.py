"""How figures are saved and set for print, and that a method looks the same in every figure."""

import math

import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from epsdpo import plots
from epsdpo.experiment import Experiment
from epsdpo.plots.publication import DOUBLE_COLUMN, SINGLE_COLUMN, fit_for_print
from epsdpo.plots.report import decisions_of_runs, win_rate_against_kl
from epsdpo.plots.runs import FAMILIES, family_of, run_looks
from epsdpo.plots.trajectory import beta_trajectory, training_curves

STEPS = pd.DataFrame(
    {"step": range(1, 25), "beta_before": 0.1, "loss": 0.69, "log_ratio_margin": 1.0, "reward_accuracy": 0.5}
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
    assert picture.image.alt == "title β̃"


def test_a_picture_shows_its_caption_under_it_and_no_markup_of_it(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("epsdpo.plots.saving.display", shown.append)
    figure = beta_trajectory({"run": STEPS}, {"run": "dpo"}, "title")
    plots.save(figure, tmp_path / "beta.png", data=STEPS, caption="<script>β & co</script>")._ipython_display_()
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


def experiment(method, **train):
    train = {"beta": 0.1, "epsilon": 0.01, "learning_rate": 1.0e-6, **train}
    return Experiment.model_validate({"name": "run", "title": "run", "method": method, "train": train})


def test_families_follow_from_method_and_settings():
    assert family_of(experiment("dpo", criterion_dtype="bfloat16")) == "dpo"
    assert family_of(experiment("epsilon_dpo")) == "epsilon_dpo float32"
    assert family_of(experiment("epsilon_dpo", criterion_dtype="bfloat16")) == "epsilon_dpo bfloat16"
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
