"""CSV that a spreadsheet opens as what it is."""

import csv

import pandas as pd
from matplotlib.figure import Figure

from epsdpo import plots
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.plots.csv_files import write_csv

TABLE = pd.DataFrame(
    {
        "title": ["=cmd|' /C calc'!A0", "+1+1", "-x", "@SUM(A1)", "\t=1", "a\r=1", "plain = text", "-0.5", None],
        "=loss": [-0.5, 1.0, 2.0, float("nan"), 0.0, 0.0, 0.0, 0.0, -1e-9],
        "step": range(9),
    }
)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_text_of_others_is_no_formula(tmp_path):
    write_csv(TABLE, tmp_path / "table.csv")
    head, *body = rows(tmp_path / "table.csv")
    assert head == ["title", "'=loss", "step"]
    assert [row[0] for row in body] == [
        *("'=cmd|' /C calc'!A0", "'+1+1", "'-x", "'@SUM(A1)", "'\t=1", "a\n=1", "plain = text", "-0.5", "")
    ]
    assert [row[1] for row in body] == ["-0.5", "1.0", "2.0", "", "0.0", "0.0", "0.0", "0.0", "-1e-09"]
    assert TABLE.columns[1] == "=loss"  # and the table that was given is as it was


def test_the_numbers_of_a_figure_are_written_so(tmp_path):
    plots.save(Figure(), tmp_path / "figure.png", data=TABLE, caption="none")
    assert rows(tmp_path / "figure.csv")[1][0].startswith("'=")


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    write_csv(pd.DataFrame({"a": [1]}), tmp_path / "of" / "a notebook" / "a.csv")
    assert (tmp_path / "of" / "a notebook" / "a.csv").read_text(encoding="utf-8") == "a\n1\n"


def test_nothing_writes_csv_past_it():
    """Numbers that are read back by the kit alone may be written as they are."""
    files = [*(REPOSITORY / "epsdpo").rglob("*.py"), *(REPOSITORY / "notebooks").glob("*.ipynb")]
    found = [path.name for path in files if ".to_csv(" in path.read_text(encoding="utf-8")]
    assert sorted(found) == ["bounds.py", "csv_files.py", "seal.py"]
