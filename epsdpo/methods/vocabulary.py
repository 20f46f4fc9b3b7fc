"""Whether a model has an embedding for every token that its data and tokenizer write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from epsdpo.methods.errors import ConfigError

TOKENISED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def require_known_tokens(tables: Iterable[Any], tokenizer: Any, embeddings: int, model: str) -> None:
    """Refuse token ids for which the model has no embedding: of the data, and of what fills up a batch.

    Args:
        tables: data sets, whose columns of prepared pairs are looked at.
        embeddings: rows of the model's embedding.
        model: its name, for the message.

    Raises:
        ConfigError: naming the largest of them, and the remedy.
    """
    import pyarrow.compute as pc

    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    largest = -1 if padding is None else padding
    for table in tables:
        for name in filter(table.column_names.__contains__, TOKENISED_COLUMNS if len(table) else ()):
            ids = table.select_columns([name]).with_format("arrow")[:].column(name)
            found = pc.max(pc.list_flatten(ids)).as_py()
            largest = max(largest, -1 if found is None else found)
    if problem := token_problem(largest, tokenizer, embeddings, model):
        raise ConfigError(problem)


def token_problem(largest: int, tokenizer: Any, embeddings: int, model: str) -> str | None:
    """What is wrong if the largest token id in use is `largest`; None if the model has an embedding for it."""
    if largest < embeddings:
        return None
    return (
        f"model.name_or_path: the tokenizer of {model!r} writes token {largest} "
        f"({tokenizer.convert_ids_to_tokens(largest)!r}; it knows {len(tokenizer)}), and the model's embedding has "
        f"{embeddings} rows. Use the tokenizer that belongs to the model, or enlarge the model "
        "(resize_token_embeddings(len(tokenizer)), then save_pretrained) and name that"
    )
