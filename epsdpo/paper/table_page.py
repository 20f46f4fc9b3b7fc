"""A table of the paper in its own layout, each number with what was measured under it: HTML, all text escaped."""

from __future__ import annotations

import html

import pandas as pd

from epsdpo.paper.published import Published
from epsdpo.paper.table_cells import MEASURED, in_words, made_differently
from epsdpo.plots.style import NEUTRAL, OUTCOME_COLOURS

_CELL = "text-align: left; vertical-align: top; padding: .4rem .7rem; border-bottom: 1px solid #ddd"
_INSIDE = f"<span style='color: {OUTCOME_COLOURS['good']}'>✓ inside</span>"
_OUTSIDE = f"<span style='color: {OUTCOME_COLOURS['bad']}'>✗ outside</span>"


def page(table: Published, cells: pd.DataFrame) -> str:
    """The table, what is to know of it, and what was different from the paper."""
    parts = [f"<h3>{html.escape(table.title)}</h3>"]
    if table.scale:
        parts.append(
            f"<p style='color: {OUTCOME_COLOURS['bad']}'><b>Another scale: {html.escape(table.scale)}.</b> Whether the "
            "paper's numbers lie inside says nothing for or against them.</p>"
        )
    if len(cells):
        parts += [f"<p>{html.escape(in_words(cells))}</p>", _grid(table, cells), _LEGEND]
    parts.append(f"<p>{html.escape(table.note)}</p>")
    if differences := made_differently(cells):
        items = "".join(
            f"<li>{html.escape(what)}{html.escape(f' ({chr(44).join(rows)})' if rows else '')}</li>"
            for what, rows in differences
        )
        parts.append(f"<p>What was different from the paper here:</p><ul>{items}</ul>")
    return "".join(parts)


_LEGEND = (
    "<p style='font-size: 90%'>Bold: as printed. Under it what these runs came to with its 95 % interval, the "
    "difference, and whether the printed number lies in the 95 % interval of prediction, in square brackets after it: "
    "where one more run would come to lie (Student's t over runs), or for a single run one more evaluation, on other "
    "prompts, which knows nothing of other trainings.</p>"
)


def _grid(table: Published, cells: pd.DataFrame) -> str:
    if table.columns:
        groups = [(f"{table.columns} = {name}", cells["column"] == name) for name in cells["column"].unique()]
    else:
        groups = [(kind.prints, cells["metric"] == name) for name, kind in table.metrics.items()]
    heads = "".join(f"<th style='{_CELL}'>{html.escape(name)}</th>" for name in (table.rows, *(g for g, _ in groups)))
    rows = []
    for row in dict.fromkeys(cells["row"]):
        columns = [cells[(cells["row"] == row) & chosen] for _, chosen in groups]
        said = "".join(f"<td style='{_CELL}'>{_cell(table, found)}</td>" for found in columns)
        name = f"{table.rows} = {row}" if table.columns else row
        rows.append(f"<tr><th style='{_CELL}'>{html.escape(name)}</th>{said}</tr>")
    return f"<table class='published'><tr>{heads}</tr>{''.join(rows)}</table>"


def _cell(table: Published, found: pd.DataFrame) -> str:
    several = bool(table.columns)
    return "<br>".join(_number(row, several) for row in found.to_dict("records")) or "–"


def _number(cell: dict, with_name: bool) -> str:
    digits = cell["digits"]
    name = f"{html.escape(cell['prints'])}: " if with_name else ""
    text = f"{name}<b>{cell['published']:.{digits}f}</b>"
    if cell["state"] != MEASURED:
        return f"{text}<br><span style='color: {NEUTRAL}'>{html.escape(cell['state'])}</span>"
    text += f"<br>{cell['measured']:.{digits}f}"
    if cell["low"] == cell["low"]:
        text += f" ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})"
    text += f", {cell['difference']:+.{digits}f}"
    if cell["inside"] is None:
        return f"{text}<br>one run, no interval"
    verdict = _INSIDE if cell["inside"] else _OUTSIDE
    return f"{text}<br>{verdict} [{cell['prediction_low']:.{digits}f}, {cell['prediction_high']:.{digits}f}]"
