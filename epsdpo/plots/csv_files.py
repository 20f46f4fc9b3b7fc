"""Tables as CSV that opens in a spreadsheet as what it is: text of others must not be taken for a formula there."""

from pathlib import Path
from typing import Any

import pandas as pd

# What makes spreadsheets calculate, with what some of them skip before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\n")


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table without its index; text that a spreadsheet would calculate gets an apostrophe, which makes it text.

    Numbers stay as they are. The folder is made where it is not there yet.
    """
    safe = table.rename(columns=_as_text)
    for place, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(place, safe.iloc[:, place].map(_as_text, na_action="ignore"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    safe.to_csv(path, index=False)


def _as_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # which alone is not quoted, and would begin a row
    if not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value  # a number as text
