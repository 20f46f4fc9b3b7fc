"""What the claims page says in words and tables: HTML from verdicts, all text escaped."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from epsdpo.paper.claims.names import MEASURES
from epsdpo.paper.claims.power import MOST_WORLDS
from epsdpo.paper.claims.settings import NOT_IN_THE_PAPER, THIS_KIT, Claims
from epsdpo.paper.claims.verdicts import CANNOT_BE_TOLD, DOES_NOT_HOLD, HOLDS, NO_DIFFERENCE, VERDICTS, Verdict
from epsdpo.paper.epsilon_bound import with_limit
from epsdpo.plots.style import NEUTRAL, OUTCOME_COLOURS

# As in the figure of verdicts, but for grey that is dark enough for text; each verdict has a sign as well.
_LOOKS = {
    HOLDS: (OUTCOME_COLOURS["good"], "✓"),
    DOES_NOT_HOLD: (OUTCOME_COLOURS["bad"], "✗"),
    NO_DIFFERENCE: (OUTCOME_COLOURS["alike"], "≈"),
    CANNOT_BE_TOLD: (NEUTRAL, "?"),
}
_CELL = "text-align: left; vertical-align: top"


def summary(verdicts: Sequence[Verdict], claims: Claims, fixed_at: str, first_training: str) -> str:
    """How many claims got each verdict, by whose they are, by themselves and with Holm's correction; how often they
    were looked at, and that the tests were fixed before the first training."""
    whose = {THIS_KIT: "claims of this kit", NOT_IN_THE_PAPER: "questions that the paper leaves open"}
    groups: dict[str, list[Verdict]] = {name: [] for name in ("claims of the paper", *whose.values())}
    for verdict in verdicts:
        groups[whose.get(verdict.claim.place, "claims of the paper")].append(verdict)
    said = "".join(f"<li>{_counted(name, group)}</li>" for name, group in groups.items() if group)
    order = f"The tests were fixed at {_time(fixed_at)}; the first training began at {_time(first_training)}."
    if first_training and fixed_at > first_training:
        order = (
            f"<b>The tests were fixed at {_time(fixed_at)}, after the first training began at "
            f"{_time(first_training)}</b>: results may have been known."
        )
    return f"<ul>{said}</ul><p>{_looks(verdicts, claims)}{order}</p>"


def _counted(name: str, group: Sequence[Verdict]) -> str:
    plain, corrected = (Counter(values) for values in zip(*((v.verdict, v.family_wise) for v in group), strict=True))
    parts = [f"<b>{plain[verdict]}</b> {_looking(verdict, plural=True)}" for verdict in VERDICTS]
    stand = ", ".join(str(corrected[verdict]) for verdict in VERDICTS)
    return f"Of {len(group)} {name} {', '.join(parts)}; with Holm's correction {stand}."


def _looks(verdicts: Sequence[Verdict], claims: Claims) -> str:
    if not claims.looks:
        return ""
    counts = Counter(verdict.looked_at for verdict in verdicts if verdict.claim.measure != "step_cost")
    first = claims.first_world
    planned = ", ".join(f"{look.worlds} worlds ({1 - look.error:.1%})" for look in claims.looks)
    taken = "; ".join(f"after {look.worlds} worlds for {counts[look.worlds]}" for look in claims.looks)
    return (
        f"Looks were planned after {planned}, seeds {first} to {first + claims.worlds - 1}; in brackets is the "
        f"coverage of their intervals. The last look at a claim was {taken}. "
    )


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """One row per claim: where the paper says it, what it says, the effect with its interval, range and verdict."""
    head = "".join(
        f"<th style='{_CELL}'>{name}</th>"
        for name in ("place", "claim", "test", "effect", "claimed", "verdict", "by Holm")
    )
    rows = "".join(_row(verdict) for verdict in verdicts)
    return f"<table class='claims'><tr>{head}</tr>{rows}</table>"


def _row(verdict: Verdict) -> str:
    claim, measure = verdict.claim, MEASURES[verdict.claim.measure]
    if verdict.effect != verdict.effect:
        effect = "–"
    else:
        effect = f"{verdict.effect:+.3g} [{verdict.low:+.3g}, {verdict.high:+.3g}] {measure.unit}"
        if verdict.is_lower_limit:
            effect = with_limit(effect, verdict.at_largest, verdict.largest)
        elif verdict.at_largest > 0.0:
            effect += f" ({verdict.at_largest:.1%} of pairs count with {verdict.largest:g}, the largest ε tried)"
        if claim.measure == "step_cost":  # the others' are over worlds
            effect += f", over {len(verdict.effects)} rounds on one machine"
        else:
            effect += f", over {len(verdict.effects)} worlds"
    outcome = _looking(verdict.verdict) + (f"<br><small>{html.escape(verdict.why)}</small>" if verdict.why else "")
    cells = [html.escape(claim.place), html.escape(claim.says), _test(verdict), html.escape(effect)]
    claimed = claimed_range(claim.above, claim.below)
    if verdict.margin is not None:
        claimed += f"; up to ±{verdict.margin:g} makes no practical difference"
    cells += [html.escape(claimed), outcome, _looking(verdict.family_wise)]
    return "<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells) + "</tr>"


def _test(verdict: Verdict) -> str:
    claim = verdict.claim
    how = {"mean": "", "sum": "", "range": "range over β of ", "frontier": "frontier over KL: "}[claim.combine]
    recipes = ", ".join(map(_code, claim.of))
    less = f" less {', '.join(map(_code, claim.minus))}" if claim.minus else ""
    return f"<small>{how}{html.escape(MEASURES[claim.measure].label)} of {recipes}{less}</small>"


def claimed_range(above: float | None, below: float | None) -> str:
    """The claimed range in words, such as "above 0" or "0.005 to 0.01"."""
    if above is not None and below is not None:
        return f"{above:g} to {below:g}"
    return f"above {above:g}" if below is None else f"below {below:g}"


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _looking(verdict: str, plural: bool = False) -> str:
    colour, sign = _LOOKS[verdict]
    text = {HOLDS: "hold", DOES_NOT_HOLD: "do not hold"}.get(verdict, verdict) if plural else verdict
    return f"<span style='color: {colour}; font-weight: 600'>{sign} {text}</span>"


def _time(moment: str) -> str:
    return html.escape(moment.replace("T", " ").split("+")[0]) + " UTC" if moment else "no time (nothing was trained)"


def what_it_would_take(table: pd.DataFrame) -> str:
    """The table of `power.what_it_would_take` as a page shows it."""
    if table.empty:
        return "<p>All claims were decided.</p>"
    head = ("claim", "worlds", "deviation over worlds", "smallest effect that could be told", "the paper's effect")
    rows = "".join(_wanting(row) for row in table.to_dict("records"))
    names = "".join(f"<th style='{_CELL}'>{name}</th>" for name in (*head, "worlds that it would need"))
    return f"<table class='claims'><tr>{names}</tr>{rows}</table>"


def _wanting(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "–" if pd.isna(value) else f"{value:.3g} {row['unit']}"

    needed = row["worlds_needed"]
    if pd.isna(needed):
        needed = "–" if pd.isna(row["printed"]) or pd.isna(row["smallest_told"]) else f"over {MOST_WORLDS:,}"
    numbers = (number(row[name]) for name in ("deviation", "smallest_told", "printed"))
    cells = (row["says"], str(row["worlds"]), *numbers, str(needed))
    return "<tr>" + "".join(f"<td style='{_CELL}'>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
