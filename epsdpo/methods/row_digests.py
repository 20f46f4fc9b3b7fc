"""Digests of the rows of a record, by which a checkpoint knows again which rows were written before it.

They are of content, not of files: rows that were moved into another file, or read in other portions, have the same one.
They grow with the rows, so that a checkpoint costs no second look at what was written long ago.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa


class LineDigest:
    """Of lines of a text file, as bytes with their ends."""

    def __init__(self, lines: Iterable[bytes] = ()):
        self.rows = 0
        self._hash = hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: bytes) -> None:
        self.rows += 1
        self._hash.update(line)

    def value(self) -> dict[str, Any]:
        return {"rows": self.rows, "sha256": self._hash.hexdigest()}


class TableDigest:
    """Of the rows of Arrow tables of one schema, whose columns, of numbers or strings, have a hash each."""

    def __init__(self, table: pa.Table):
        self.rows = 0
        self._columns = {name: hashlib.sha256(name.encode()) for name in table.column_names}
        self.add(table)

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        for name, digest in self._columns.items():
            column = table[name]
            if pa.types.is_string(column.type):
                digest.update("".join(f"{len(text or '')}:{text}" for text in column.to_pylist()).encode())
            else:
                digest.update(np.ascontiguousarray(column.to_numpy()))  # nulls as NaN, all with the same bits

    def value(self) -> dict[str, Any]:
        together = hashlib.sha256(b"".join(digest.digest() for digest in self._columns.values()))
        return {"rows": self.rows, "sha256": together.hexdigest()}
