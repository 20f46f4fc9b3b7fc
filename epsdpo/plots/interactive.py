"""The interactive figure of β: point at a step, and see what it did to β and which pairs moved it.

One piece of HTML without any outside help: the data as JSON, and the script in `interactive.js`. It works in JupyterLab
and in a page opened from disk. Where scripts do not run it says so, and the static figure stands in for it.
"""

import html
import json
from pathlib import Path
from typing import Any

from epsdpo.plots.looks import Look
from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS

_SCRIPT = Path(__file__).with_name("interactive.js")

# What could end the script element or, in old browsers, a line of JavaScript. All may be written so within JSON texts,
# and occur nowhere else in it.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title} · β step by step</title></head>
<body style="font-family: sans-serif">{back}<h1 style="font-size: 120%">{title}: β step by step</h1>{figure}</body>
</html>
"""


def json_in_html(content: Any) -> str:
    """`content` as JSON that may stand inside a script element: no text in it can end the element.

    Raises:
        ValueError: if it holds NaN or an infinity, which are no JSON.
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def beta_step_by_step(content: dict[str, Any], look: Look) -> str:
    """HTML of the figure.

    Args:
        content: from `step_by_step`.
        look: of the run's line, from `run_looks`.
    """
    style = {"colour": look.colour, "decisions": DECISION_COLOURS, "labels": DECISION_LABELS}
    return (
        '<figure data-beta-steps style="margin: 0; max-width: 60rem">'
        "<p>Pointing at steps needs a script, which does not run here; the figure of β above shows the same line.</p>"
        f'<script type="application/json">{json_in_html({**content, "style": style})}</script>'
        f"<script>{_SCRIPT.read_text(encoding='utf-8')}</script>"
        "</figure>"
    )


def as_page(figure: str, title: str, to_index: str = "") -> str:
    """A figure of `beta_step_by_step` as an HTML file of its own, with a link to the index of its batch, if any."""
    back = f'<nav><a href="{html.escape(to_index)}">← all runs of this folder</a></nav>' if to_index else ""
    return _PAGE.format(title=html.escape(title), figure=figure, back=back)
