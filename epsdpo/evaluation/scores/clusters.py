"""Which measurements stand together because they are about one prompt.

Twenty answers to six prompts are six observations, not twenty: what is resampled, and what a standard error counts, are
**conversations**. Two prompts are of one conversation if their first user turns are the same text, whatever whitespace
surrounds it and whatever turns follow.
"""

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

# Several turns as they are written for judges and people.
_TURNS = re.compile(r"(?:System: .*?\n\n)?User: (.*?)(?:\n\nAssistant: .*)?", re.DOTALL)


def conversation_of(prompt: str) -> str:
    """The first user turn of a prompt, by which its conversation is told; a prompt of one turn is that turn."""
    turns = _TURNS.fullmatch(prompt)
    return (prompt if turns is None else turns[1]).strip()


def conversations_of_rendered(prompts: Sequence[str]) -> list[str]:
    """The conversation of each prompt that was written by a chat template: the shortest prompt which it continues.

    A template ends each prompt with the header of the next turn. Texts that do not all end alike are no such prompts:
    there one that begins with another may ask for something else, and each text is a conversation of its own.
    """
    header = os.path.commonprefix([prompt[::-1] for prompt in prompts])
    if header.isalnum() or not header:
        return list(prompts)
    roots: dict[str, str] = {}
    root = None
    for prompt in sorted(set(prompts)):  # directly behind a text come those that begin with it
        if root is None or not prompt.startswith(root):
            root = prompt
        roots[prompt] = root
    return [roots[prompt] for prompt in prompts]


def clusters_of(prompts: Sequence[str] | None, size: int) -> np.ndarray:
    """The number of each value's conversation, (size,) int64 from 0 in the order in which they first occur.

    Args:
        prompts: what each value is about, as text; None if each is about another prompt.
        size: how many values there are.

    Raises:
        ValueError: if there are more or fewer prompts than values.
    """
    if prompts is None:
        return np.arange(size)
    if len(prompts) != size:
        raise ValueError(f"{len(prompts)} prompts and {size} values; they must belong together")
    return pd.factorize(np.array([conversation_of(prompt) for prompt in prompts], dtype=object))[0]


def distinct(prompts: Sequence[str]) -> int:
    """How many conversations the prompts are of."""
    return len({conversation_of(prompt) for prompt in prompts})


def counted(prompts: Sequence[str]) -> str:
    """ "20 prompts, 6 distinct", or "20 prompts" where none repeats."""
    different = distinct(prompts)
    return f"{len(prompts)} prompts" + (f", {different} distinct" if different < len(prompts) else "")


def resamples(clusters: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of as many conversations as there are, drawn with replacement, `samples` times.

    The same ones for the same clusters and seed; none at all of several rows of one conversation, which do not say what
    another would.
    """
    if clusters.size > 1 and not clusters.any():
        return
    members = np.split(np.argsort(clusters, kind="stable"), np.cumsum(np.bincount(clusters))[:-1])
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        drawn = generator.integers(len(members), size=len(members))
        yield drawn if len(members) == clusters.size else np.concatenate([members[number] for number in drawn])
