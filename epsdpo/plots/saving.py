"""How a figure reaches the disk and the page: PNG, PDF, its numbers as CSV, its caption as text."""

import html
import io
from pathlib import Path

import matplotlib
import pandas as pd
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from epsdpo.plots.csv_files import write_csv
from epsdpo.plots.publication import fit_for_print

SCREEN_DPI, PRINT_DPI = 160, 300


def save(figure: Figure, path: str | Path, data: pd.DataFrame, caption: str, publication: bool = False) -> Image:
    """Write a figure and what a paper's author needs beside it, and return the PNG as a notebook shows it.

    Beside `path`, a PNG, lie under the same name a PDF (vectors, fonts embedded as TrueType), a CSV with the numbers
    in the figure, and a TXT with the caption.

    Args:
        caption: what to see, in a sentence or two; plain text.
        publication: set for print, with the PNG at 300 dpi.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = alternative_text(figure)
    if publication:
        fit_for_print(figure)
    picture = as_image(figure, PRINT_DPI if publication else SCREEN_DPI, words)
    path.write_bytes(picture.data)
    figure.set_layout_engine("none")  # it is laid out by now, which takes as long as drawing
    # Without its time, a PDF of the same figure is the same file. Type 3 fonts, matplotlib's own choice, are refused by
    # many journals.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Title": words})
    write_csv(data, path.with_suffix(".csv"))
    path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return picture


def show(
    figure: Figure, name: str, data: pd.DataFrame, caption: str, *, folder: str | Path, publication: bool = False
) -> None:
    """Show a figure in a notebook, its caption under it, and `save` it as `name`.png and so on into a folder.

    A notebook binds the folder and `publication` once: `show = partial(plots.show, folder=…, publication=…)`.
    """
    # Two outputs: a picture inside of HTML would be taken out of a notebook that JupyterLab does not trust.
    display(save(figure, Path(folder) / f"{name}.png", data, caption, publication))
    display(HTML(f'<p style="max-width: 60rem"><i>{html.escape(caption)}</i></p>'))


def as_image(figure: Figure, dpi: int = SCREEN_DPI, words: str | None = None) -> Image:
    """The figure as a PNG that a notebook shows, with `words`, else its titles, as the alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    width = round(figure.get_figwidth() * 100)
    return Image(data=buffer.getvalue(), format="png", width=width, alt=words or alternative_text(figure))


def alternative_text(figure: Figure) -> str:
    """The titles of the figure and of its panels, for readers who do not see it."""
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    return "; ".join([figure.get_suptitle(), *titles]).strip("; ")
