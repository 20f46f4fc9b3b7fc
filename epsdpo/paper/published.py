"""Numbers that the paper prints, from the `_published*.yaml` beside the configs whose runs are compared with them.

Each number is typed once, in `configs/paper`; other folders extend those files. A run folder gets a copy of the tables
that its batch is compared with.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from epsdpo.experiment import ConfigError
from epsdpo.experiment.load import read_extended
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.experiment.sections.base import Section
from epsdpo.files import read_text, written_whole

PUBLISHED_FILE = "published.yaml"  # in a run folder: the tables that its runs are compared with
_PATTERN = "_published*.yaml"
_TABLE_5 = REPOSITORY / "configs" / "paper" / "table5_two_epsilons" / "_published.yaml"


class Metric(Section):
    """One kind of number of a table; a key of an evaluation's summary or of a trajectory's, unless not measured."""

    prints: str = Field(description="What the paper calls it, with its unit.")
    digits: int = Field(description="Decimals that the paper prints.")
    not_measured: str = Field("", description="Why no run of this kit has it.")


class Printed(Section):
    """The numbers of one cell, or of one row where a table has no further columns."""

    row: str
    column: str = Field("", description="Of a table that is a grid of two settings.")
    printed: dict[str, float] = Field(description="Metric -> number.")
    spread: dict[str, float] = Field(default_factory=dict, description="Metric -> standard error, where one is given.")
    made_with: dict[str, Any] = Field(default_factory=dict, description="What differs from row to row of `made_with`.")


class Published(Section):
    """A table or figure of the paper: what it prints, and which runs are to stand beside it."""

    table: str = Field(description="What the paper calls it.")
    part: str = Field("", description="Which part of it.")
    rows: str = Field("", description="What tells its rows apart.")
    columns: str = Field("", description="What tells its columns apart, of a grid.")
    metrics: dict[str, Metric] = Field(default_factory=dict)
    values: list[Printed] = Field(default_factory=list)
    runs: dict[str, str | None | dict[str, str]] = Field(
        default_factory=dict, description="Row, and in a grid column -> name of an experiment, without its -seedN."
    )
    minus: dict[str, str | None] = Field(default_factory=dict, description="Row -> the run whose number is taken off.")
    without_run: dict[str, str] = Field(default_factory=dict, description="Row -> why it has no run.")
    made_with: dict[str, Any] = Field(default_factory=dict, description="Dotted key of a config -> value in the paper.")
    judge: str = Field("", description="Who judged.")
    scale: str = Field("", description="What the runs are of, where that is another scale than the paper's.")
    note: Annotated[str, Field(min_length=1)] = Field(description="How the printed numbers came about.")

    @model_validator(mode="after")
    def _belongs_together(self) -> Published:
        for value in self.values:
            if unknown := sorted((value.printed.keys() | value.spread.keys()) - self.metrics.keys()):
                raise ValueError(f"{value.row}: {', '.join(unknown)} is none of the metrics")
            if self.run_of(value) is None and value.row not in self.without_run:
                raise ValueError(f"{value.row}: name its run in `runs`, or in `without_run` why it has none")
        return self

    @property
    def title(self) -> str:
        return f"{self.table}, {self.part}" if self.part else self.table

    @property
    def file_name(self) -> str:
        """As files of its figure are called: `beside_table_1_llama_3_8b_instruct`."""
        return "beside_" + re.sub(r"[^a-z0-9]+", "_", self.title.lower())

    def run_of(self, value: Printed) -> str | None:
        run = self.runs.get(value.row)
        return run.get(value.column) if isinstance(run, dict) else run


def published_beside(paths: Iterable[Path]) -> list[Published]:
    """The tables that lie beside config files, or in their folders, each folder once.

    Raises:
        ConfigError: if one cannot be read, or does not hold together.
    """
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    return [read_published(file) for folder in folders for file in sorted(folder.glob(_PATTERN))]


def read_published(path: Path) -> Published:
    """Read and check one file of printed numbers, on top of those that it extends.

    Raises:
        ConfigError: naming the file, each key and what is wrong with it.
    """
    return _checked(path, read_extended(path))


def leave_published(tables: Iterable[Published], run_dir: Path) -> None:
    """Write the tables into a run folder, for its pages, beside others that a batch has left there; none, nothing."""
    tables = list(tables)
    titles = {table.title for table in tables}
    if tables:
        before = [table for table in published_in(run_dir) if table.title not in titles]
        content = [table.model_dump(exclude_defaults=True) for table in [*before, *tables]]
        with written_whole(run_dir / PUBLISHED_FILE) as partial:
            partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def published_in(run_dir: Path) -> list[Published]:
    """The tables that the runs of a folder are compared with.

    Raises:
        ConfigError: if its file of them cannot be read.
    """
    path = run_dir / PUBLISHED_FILE
    if not path.exists():
        return []
    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error}). Delete it; `epsdpo run` writes it") from error
    if not isinstance(content, list):
        raise ConfigError(f"{path}: not a list of tables. Delete it; `epsdpo run` writes it")
    return [_checked(path, values) for values in content]


@functools.cache
def table_5() -> tuple[tuple[float, float, float, float], ...]:
    """Table 5: ε_c, ε_s, win rate by PairRM (%), mean step; Anthropic-HH, gemma-2-2b, β = 0.05, one run each."""
    return tuple(_rows_of_table_5())


def _rows_of_table_5() -> Iterator[tuple[float, float, float, float]]:
    for value in read_published(_TABLE_5).values:
        yield float(value.row), float(value.column), value.printed["win_rate"], value.printed["mean_step"]


def _checked(path: Path, values: Any) -> Published:
    try:
        return Published.model_validate(values)
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError("\n".join(problems)) from None
