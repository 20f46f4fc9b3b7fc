"""The interactive figure of β in a real browser: pointing and keys show a step and its pairs, and texts stay texts."""

import pandas as pd
import pytest
from kit.hostile import ATTACKS, HOSTILE_TITLE, assert_harmless

from epsdpo.plots.interactive import as_page, beta_step_by_step
from epsdpo.plots.looks import FAMILIES
from epsdpo.trajectory.moved_pairs import step_by_step

PANEL = "document.querySelector('figure div').innerText"
# Of the drawing, in pixels of the window: where the axis of steps begins and ends, and a height within.
AXIS = """(() => {
  const box = document.querySelector('svg').getBoundingClientRect(), scale = box.width / 900;
  return [box.left + 70 * scale, box.right - 12 * scale, box.top + 60 * scale];
})()"""


@pytest.fixture
def page(tmp_path):
    """Eleven steps of ten pairs that all move; the texts of every pair are an attack, cut where the figure cuts."""
    steps = pd.DataFrame({"step": range(1, 12), "beta_before": [0.1 - 0.005 * n for n in range(11)]})
    steps["beta_after"] = steps["beta_before"] - 0.005
    rows = [
        {
            "step": step,
            "pair_id": f"pair-{step}-{place}",
            "decision": 1 if place else -1,
            "log_ratio_margin": place + 0.5,
        }
        for step in range(1, 12)
        for place in range(10)
    ]
    pairs = pd.DataFrame(rows).assign(chosen_tokens=3, rejected_tokens=4)
    texts = pairs[["pair_id"]].assign(prompt=ATTACKS[0], chosen=ATTACKS[1], rejected=ATTACKS[2])
    figure = beta_step_by_step(step_by_step(HOSTILE_TITLE, steps, pairs, texts), FAMILIES["dpo"])
    file = tmp_path / "page.html"
    file.write_text(as_page(figure, HOSTILE_TITLE), encoding="utf-8")
    return file


def move_to(tab, share):
    left, right, height = tab.evaluate(AXIS)
    place = {"x": left + share * (right - left), "y": height}
    tab.command("Input.dispatchMouseEvent", type="mouseMoved", **place)
    return place


def click(tab, share):
    place = move_to(tab, share)
    for kind in ("mousePressed", "mouseReleased"):
        tab.command("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)


def press(tab, key):
    for kind in ("keyDown", "keyUp"):
        tab.command("Input.dispatchKeyEvent", type=kind, key=key)


def test_pointing_at_a_step_shows_it(page, chromium):
    with chromium.tab(page.as_uri(), page.parent) as tab:
        assert "Step 1: β 0.1 → 0.095." in tab.evaluate(PANEL)
        move_to(tab, 0.5)
        shown = tab.evaluate(PANEL)
        assert "Step 6: β 0.075 → 0.07." in shown
        assert "9 relaxed (β⁻)" in shown and "0 tied (β)" in shown and "1 tightened (β⁺)" in shown
        assert "pair-6-9" in shown and "9.5" in shown and "3 / 4" in shown and "and 2 more" in shown
        click(tab, 0.5)
        move_to(tab, 1.0)
        assert "Step 6 (kept)" in tab.evaluate(PANEL)
        click(tab, 1.0)
        click(tab, 1.0)
        move_to(tab, 0.0)
        assert "Step 1:" in tab.evaluate(PANEL)


def test_it_opens_on_the_first_step_that_moved(chromium, tmp_path):
    steps = pd.DataFrame(
        {"step": [1, 2, 3, 4], "beta_before": [0.1, 0.1, 0.1, 0.09], "beta_after": [0.1, 0.1, 0.09, 0.08]}
    )
    decisions = [(1, 0), (2, 0), (3, 1), (4, 1)]
    pairs = pd.DataFrame([{"step": step, "pair_id": f"p{step}", "decision": decided} for step, decided in decisions])
    pairs = pairs.assign(log_ratio_margin=1.0, chosen_tokens=3, rejected_tokens=4)
    texts = pairs[["pair_id"]].assign(prompt="p", chosen="c", rejected="r")
    for beta_follows, level, said in (
        (True, steps, "No pair moved"),
        (False, steps.assign(beta_before=0.1, beta_after=0.1), "would have"),
    ):
        content = step_by_step("run", level, pairs, texts, beta_follows)
        page = tmp_path / "page.html"
        page.write_text(as_page(beta_step_by_step(content, FAMILIES["dpo"]), "run", "index.html"), encoding="utf-8")
        with chromium.tab(page.as_uri(), tmp_path) as tab:
            assert "Step 3:" in tab.evaluate(PANEL)
            move_to(tab, 0.0)
            assert said in tab.evaluate(PANEL)
            assert tab.evaluate("document.querySelector('nav a').getAttribute('href')") == "index.html"


def test_keys_do_what_pointing_does(page, chromium):
    with chromium.tab(page.as_uri(), page.parent) as tab:
        tab.evaluate("document.querySelector('svg').focus()")
        press(tab, "ArrowRight")
        assert "Step 2:" in tab.evaluate(PANEL)
        press(tab, "End")
        press(tab, "Enter")
        assert "Step 11 (kept)" in tab.evaluate(PANEL)
        move_to(tab, 0.0)
        assert "Step 11 (kept)" in tab.evaluate(PANEL)
        press(tab, "Escape")
        assert "Step 11:" in tab.evaluate(PANEL)
        assert tab.evaluate("document.querySelector('svg').getAttribute('aria-valuenow')") == "11"


def test_hostile_texts_stay_texts(page, chromium):
    for attack in ATTACKS[:3]:
        assert_harmless(chromium, page, attack)


def test_a_page_without_scripts_says_where_to_look(page, chromium):
    with chromium.tab("about:blank#", page.parent) as tab:
        tab.command("Emulation.setScriptExecutionDisabled", value=True)
        tab.command("Page.navigate", url=page.as_uri())
        tab.wait_for("document.querySelector('figure p')", 30)
        assert "the figure of β above shows the same line" in tab.evaluate("document.body.innerText")
        assert not tab.evaluate("Boolean(document.querySelector('svg'))")
