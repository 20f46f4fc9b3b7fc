"""The columns of a batch's pairs, by their names."""

import pytest
import torch

from epsdpo.methods.metrics import PAIR_COLUMNS, pair_table, stack_columns


def test_columns_are_stacked_by_name_whatever_their_order():
    columns = {name: torch.tensor([float(place), -1.0]) for place, name in enumerate(PAIR_COLUMNS)}
    table = pair_table(torch.tensor([7, 3]), stack_columns(dict(reversed(columns.items()))))
    assert table.columns.tolist() == ["pair_index", *PAIR_COLUMNS] and table["pair_index"].tolist() == [7, 3]
    assert [table[name][0] for name in PAIR_COLUMNS] == list(range(len(PAIR_COLUMNS)))


def test_a_missing_and_an_unknown_column_are_refused():
    columns = dict.fromkeys([*PAIR_COLUMNS[1:], "los"], torch.zeros(2))
    with pytest.raises(ValueError, match="missing or unknown: los, loss"):
        stack_columns(columns)
