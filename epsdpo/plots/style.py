"""How every figure looks, and how it is saved: colours, sizes, a PNG and its numbers as CSV.

No number is made here. Figures are matplotlib objects without pyplot's global state, so they look the same in
JupyterLab, headless, and whatever backend a user has set.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; each decision has one of its own.
DECISION_COLOURS = {"relaxed": "#0072B2", "tied": "#999999", "tightened": "#D55E00"}
DECISION_LABELS = {"relaxed": "relaxed (β⁻)", "tied": "tied (β)", "tightened": "tightened (β⁺)"}
RUN_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RUN_LINES = ("--", "-", "-.", ":")
NEUTRAL = "#555555"


def new_figure(width: float = 9.0, height: float = 4.0, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its panels, in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def run_styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and line of each run: the first of several is the baseline, in dashed grey, a single one is in colour.

    Neighbours differ in both, so that a print in grey can be read too.
    """
    names = list(names)
    first = 0 if len(names) > 1 else 1
    return {
        name: {"color": RUN_COLOURS[place % len(RUN_COLOURS)], "linestyle": RUN_LINES[place % len(RUN_LINES)]}
        for place, name in enumerate(names, start=first)
    }


def save(figure: Figure, path: str | Path, data: pd.DataFrame) -> Image:
    """Write a figure as PNG and the numbers in it as CSV beside it, and return the picture for a notebook to show."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = as_image(figure)
    path.write_bytes(picture.data)
    data.to_csv(path.with_suffix(".csv"), index=False)
    return picture


def as_image(figure: Figure) -> Image:
    """The figure as a PNG that a notebook shows, with its titles as the alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    width = round(figure.get_figwidth() * 100)
    return Image(data=buffer.getvalue(), format="png", width=width, alt=_alternative_text(figure))


def _alternative_text(figure: Figure) -> str:
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    return "; ".join([figure.get_suptitle(), *titles]).strip("; ")
