"""`python -m epsdpo conform MODULE:TRAINER`: the clauses as a table, and whether one is broken."""

import gc
import logging
import tempfile
import textwrap
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import transformers

from epsdpo.experiment import ConfigError
from epsdpo.paper.conformance.clauses import BROKEN, HOLDS, NOT_ASKED, Answer, Examination
from epsdpo.paper.conformance.ranks import two_ranks
from epsdpo.paper.conformance.subject import load_subject
from epsdpo.paper.conformance.vectors import read_vectors

COLUMNS, WIDTH = (23, 22), 118


def conform(name: str, config: Path | None = None) -> int:
    """Print an answer for each clause of the paper as it comes.

    Returns:
        0 if no clause is broken, 1 otherwise.

    Raises:
        ConfigError: if there is no such trainer, or none that trains on the vectors at all.
    """
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("epsdpo").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    subject = load_subject(name, config)
    gc.freeze()  # accelerate collects garbage after each training, which takes longer than that over all of torch
    print(f"{name}, with args of {subject.args_class.__name__}\n")
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="conform-") as folder:
        try:
            examination = Examination(subject, read_vectors(), Path(folder))
        except Exception as error:
            raise ConfigError(
                f"conform: {name} does not train on the vectors: {type(error).__name__}: {error}\n"
                "docs/conformance.md says how it is called, and what --config can say of it"
            ) from error
        last = ("two ranks", "Algorithm 1, line 5", lambda: two_ranks(examination, name, config))
        for answer in chain(examination.answers(), (examination.ask(*each) for each in [last])):
            print(row(answer), flush=True)
            found[answer.verdict] += 1
    print(f"\n{found[HOLDS]} hold, {found[BROKEN]} broken, {found[NOT_ASKED]} could not be asked")
    return int(found[BROKEN] > 0)


def row(answer: Answer) -> str:
    """Clause, where the paper says it, and the verdict with its detail, wrapped."""
    # A combining tilde takes no place.
    widths = (width + text.count("\u0303") for text, width in zip(answer, COLUMNS, strict=False))
    head = "".join(text.ljust(width) for text, width in zip(answer, widths, strict=False))
    detail = f"{answer.verdict}: {answer.detail}"
    return textwrap.fill(detail, WIDTH, initial_indent=head, subsequent_indent=" " * sum(COLUMNS))
