"""Where preference pairs come from: one split of a file, a folder, a hub data set or the embedded world, as rows."""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from epsdpo.experiment import ON_POLICY, WORLD, ConfigError, DataSection
from epsdpo.experiment.paths import looks_local
from epsdpo.files import text_of
from epsdpo.methods.beside import MEDIA, QUESTION, REST_OF_QUESTION, WRITTEN, has_value
from epsdpo.models.hub import commit_of

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "pair_id")
GOLD_COLUMNS = ("chosen_gold", "rejected_gold")
WORLD_SPLITS = ("train", "eval")

_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<total>\d{5})(?:-[0-9a-f]+)?$")
_SAVED_SPLITS, _SAVED_STATE = "dataset_dict.json", "state.json"  # what `save_to_disk` leaves beside the data
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".arrow")


class DataError(ConfigError):
    """Data that cannot be prepared as the config says. The message names the place, the value and the remedy."""


@dataclass(frozen=True)
class Source:
    """A source that was found: its `kind` is "world", "file", "folder" or "hub"; `revision` is a hub commit."""

    kind: str
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Rows:
    """One split as read: plain Python values, each row with all of `columns`, which are our names.

    `source_columns` are all columns of the source by its own names; `beside` are those among them that are not read,
    with the places in `values` of the rows that have a value there; `where` names source and split in messages.
    `numbers` are those of the rows in the source, from 0.
    """

    where: str
    source_columns: list[str]
    columns: tuple[str, ...]
    values: list[dict[str, Any]]
    beside: dict[str, list[int]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self):
        if not self.numbers:
            object.__setattr__(self, "numbers", list(range(len(self.values))))

    @property
    def not_used(self) -> dict[str, int]:
        """Columns that are not read, with the number of rows that have a value there."""
        return {name: len(places) for name, places in self.beside.items()}

    def part(self, places: list[int]) -> "Rows":
        """Some of the rows, by their places."""
        place_in_part = {place: number for number, place in enumerate(places)}
        return replace(
            self,
            values=[self.values[place] for place in places],
            beside={
                name: [place_in_part[place] for place in filled if place in place_in_part]
                for name, filled in self.beside.items()
            },
            numbers=[self.numbers[place] for place in places],
        )


class Table(NamedTuple):
    """A part of a source: the names of all columns, rows of the wanted ones, and for each row of the others whether it
    has a value there."""

    names: list[str]
    rows: list[dict[str, Any]]
    filled: dict[str, list[bool]]


def find_source(section: DataSection) -> Source:
    """Decide what `data.source` names. A local path wins over a hub id of the same name.

    Raises:
        DataError: if it names a path that does not exist, a hub data set that cannot be reached, or if `revision`,
            `subset` or `eval_split` is set where it has no meaning.
    """
    path = Path(section.source).expanduser()
    if section.source == ON_POLICY:
        raise DataError(
            "data.source is 'on_policy', and no sampled pairs are named. Run the stage `sample` first and give its "
            "folder as pairs_dir; `python -m epsdpo run` does both"
        )
    if section.source == WORLD:
        source = Source("world", WORLD)
    elif path.is_file():
        source = Source("file", section.source)
    elif path.is_dir():
        source = Source("folder", section.source)
    elif _looks_like_path(section.source):
        raise DataError(
            f"data.source {section.source!r}: no such file or folder, seen from {Path.cwd()}. "
            "Check the path; a hub id has the form owner/name"
        )
    else:
        return Source("hub", section.source, _resolve_revision(section))
    if section.revision is not None:
        raise DataError(
            f"data.revision is {section.revision!r}, but data.source {section.source!r} is no hub data set. Remove it"
        )
    if source.kind == "file" and section.eval_split is not None:
        raise DataError(
            f"data.eval_split is {section.eval_split!r}, but data.source {section.source!r} is a file, and a file is "
            "one split. Name its folder, with train_split and eval_split after the files in it; or remove eval_split, "
            "and hold a share of the file out by data.eval_share"
        )
    if section.subset is not None and source.kind != "folder":
        raise DataError(
            f"data.subset is {section.subset!r}, but data.source {section.source!r} is no folder and no hub data set. "
            "Remove it"
        )
    return source


def read_split(source: Source, section: DataSection, split: str, limit: int | None) -> Rows:
    """Read the first `limit` rows (None: all) of a split, with the columns renamed as `data.columns` says.

    Raises:
        DataError: for a missing split or column (naming those that exist), or a file that cannot be read.
    """
    # A column that the config gives another meaning has none of its own.
    own = [name for name in WRITTEN if name in section.columns or name not in section.columns.values()]
    wanted = {ours: section.columns.get(ours, ours) for ours in (*PAIR_COLUMNS, *GOLD_COLUMNS, *own)}
    noticed = [*MEDIA, *(REST_OF_QUESTION if wanted["prompt"] == QUESTION else ())]
    theirs = list(wanted.values())
    present, rows, beside = [], [], defaultdict(list)
    for names, more, filled in _tables(source, section, split, theirs):
        present += [name for name in names if name not in present]
        more = more[: None if limit is None else limit - len(rows)]
        for name, values in filled.items():
            if name not in noticed:
                beside[name] += [len(rows) + place for place, value in enumerate(values[: len(more)]) if value]
        for name in filter(filled.__contains__, noticed):
            more = [{**row, name: value or None} for row, value in zip(more, filled[name], strict=False)]
        rows += more
    where = f"data.source {source.name!r}, split {split!r}"
    for ours in ("chosen", "rejected", *section.columns):
        if wanted[ours] not in present:
            raise DataError(missing_column(where, ours, wanted[ours], present))
    wanted |= {name: name for name in noticed}
    columns = tuple(ours for ours in wanted if wanted[ours] in present)
    values = [{ours: row.get(wanted[ours]) for ours in columns} for row in rows]
    return Rows(where, present, columns, values, dict(beside))


def _tables(source: Source, section: DataSection, split: str, wanted: list[str]) -> Iterator[Table]:
    """The tables that a split consists of."""
    if source.kind == "world":
        yield _read_world(section, split)
        return
    for subset in section.subset if isinstance(section.subset, list) else [section.subset]:
        if source.kind == "hub":
            yield _read_hub(source, subset, split, wanted)
        else:
            yield from (read_file(file, wanted) for file in _files_of(source, subset, split))


def missing_column(where: str, ours: str, theirs: str, present: list[str]) -> str:
    """The message for a column that a split should have and has not."""
    return (
        f"{where}: no column {theirs!r} among {', '.join(present) or 'none at all'}. "
        f"Name the one that holds it in the config, e.g. data: {{columns: {{{ours}: its_name}}}}"
    )


def _looks_like_path(source: str) -> bool:
    return looks_local(source) or source.endswith(_SUFFIXES)


# ------------------------------------------------------------------------------------------------------------- world


def _read_world(section: DataSection, split: str) -> Table:
    if split not in WORLD_SPLITS:
        raise DataError(f"data.source 'world' has no split {split!r}; it has {', '.join(WORLD_SPLITS)}")
    from epsdpo.world.build import preference_pairs

    pairs = preference_pairs(section.world, split)
    filled = {name: [True] * len(pairs) for name in pairs.columns if name not in (*PAIR_COLUMNS, *GOLD_COLUMNS)}
    return Table(list(pairs.columns), pairs.to_dict("records"), filled)


# ------------------------------------------------------------------------------------------------------- local files


def _files_of(source: Source, subset: str | None, split: str) -> list[Path]:
    """Files of a split: the file named; of a folder `<split>.<ext>`, the hub's `<split>-00000-of-00004-<hash>.<ext>`,
    or what `save_to_disk` of `datasets` wrote."""
    path = Path(source.name).expanduser()
    if source.kind == "file":
        return [path]
    folder = path / subset if subset else path
    if not folder.is_dir():
        raise DataError(f"data.subset {subset!r}: no such folder in {path}")
    splits = _splits_in(folder)
    if split not in splits:
        below = [place.name for place in sorted(folder.iterdir()) if place.is_dir() and split in _splits_in(place)]
        remedy = (
            f"{' and '.join(below)} below it {'has' if len(below) == 1 else 'have'} one: set data.subset: "
            f"{below[0] if len(below) == 1 else '[' + ', '.join(below) + '], or one of them'}"
            if below and subset is None
            else f"A split is a file {split}.<ext>, with <ext> one of {', '.join(s[1:] for s in _SUFFIXES)}"
        )
        raise DataError(
            f"data.source {source.name!r}: no split {split!r} in {folder}, but {', '.join(splits) or 'no data files'}. "
            f"{remedy}"
        )
    files = splits[split]
    _require_all_shards(files)
    if len({file.name.partition(".")[2] for file in files}) > 1:
        raise DataError(
            f"data.source {source.name!r}: split {split!r} is there in several formats "
            f"({', '.join(file.name for file in files)}). Keep one, or name the file itself"
        )
    return files


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """The splits that lie in a folder itself, with their files in order."""
    if (folder / _SAVED_SPLITS).is_file():
        names = _parse_json(_text(folder / _SAVED_SPLITS), str(folder / _SAVED_SPLITS))["splits"]
        return {name: _saved_files(folder / name) for name in names}
    if (folder / _SAVED_STATE).is_file() and (folder / "dataset_info.json").is_file():
        state = _parse_json(_text(folder / _SAVED_STATE), str(folder / _SAVED_STATE))
        return {state.get("_split") or "train": _saved_files(folder)}
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in _SUFFIXES if file.name.endswith(suffix)), None)
        if suffix is not None and file.is_file():
            splits.setdefault(_SHARD.sub("", file.name.removesuffix(suffix)), []).append(file)
    return splits


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that `Dataset.save_to_disk` wrote, in their order."""
    path = folder / _SAVED_STATE
    if not path.is_file():
        raise DataError(f"{folder}: {_SAVED_STATE} is missing, which save_to_disk writes. Save the data set again")
    try:
        files = [folder / entry["filename"] for entry in _parse_json(_text(path), str(path))["_data_files"]]
    except (LookupError, TypeError) as error:
        raise DataError(f"{path}: does not name the data files ({error!r}). Save the data set again") from error
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, and {path.name} beside it names it. Save the data set again")
    return files


def _require_all_shards(files: list[Path]) -> None:
    """Refuse a split of which the names say that shards are missing."""
    found = [match for match in (_SHARD.search(file.name.partition(".")[0]) for file in files) if match]
    for total in {int(match["total"]) for match in found}:
        have = {int(match["number"]) for match in found if int(match["total"]) == total}
        missing = sorted(set(range(total)) - have)
        if missing and files[0].suffix != ".arrow":
            names = ", ".join(f"{number:05d}" for number in missing[:3])
            raise DataError(
                f"{files[0].parent}: {len(missing)} of {total} shards missing, beside {files[0].name}: {names}. Fetch "
                "the whole folder"
            )


def read_file(path: Path, wanted: list[str]) -> Table:
    """A file, its rows reduced to the wanted columns; what a row lacks is None.

    Raises:
        DataError: if the file is of no kind that can be read, or is damaged.
    """
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path}: not a data file that can be read; known are {', '.join(s[1:] for s in _SUFFIXES)}")
    if path.name.endswith(_JSON_SUFFIXES):
        rows = _read_json(path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        filled = {name: [has_value(row.get(name)) for row in rows] for name in names if name not in wanted}
        return Table(names, [{name: row.get(name) for name in wanted} for row in rows], filled)
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_arrow(path)
        table.validate(full=True)  # neither format holds its writer to UTF-8
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as {path.suffix[1:]}: {error}") from error
    rows = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    return _of_arrow(table, rows, wanted)


def _of_arrow(table: pa.Table, rows: list[dict[str, Any]], wanted: list[str]) -> Table:
    """A table whose wanted columns are `rows` already. Arrow gives every object the keys of all, null where they were
    not: these are taken out again, since a template would write them."""
    filled = {name: _filled(table.column(name)) for name in table.column_names if name not in wanted}
    rows = [{name: _without_nulls(value) for name, value in row.items()} for row in rows]
    return Table(table.column_names, rows, filled)


def _filled(column: pa.ChunkedArray) -> list[bool]:
    """For each row whether it has a value, as `has_value` says, without making it one of Python."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        filled = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        filled = pc.greater(pc.list_value_length(column), 0)
    else:
        filled = pc.is_valid(column)
    return pc.fill_null(filled, False).to_pylist()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = text_of(file.read())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 or UTF-16 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path}: not readable as UTF-8 or UTF-16 text: it is empty")
    return text


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A JSON array of objects, or one object per line, whatever the file is called."""
    text = _text(path)
    if text.lstrip().startswith("["):
        rows = enumerate(_parse_json(text, str(path)), start=1)
        unit = "element"
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        rows = ((number, _parse_json(line, f"{path}, line {number}")) for number, line in lines)
        unit = "line"
    objects = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {unit} {number}: expected an object with columns, got {type(row).__name__}")
        objects.append(row)
    return objects


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error}. The file may be cut off; fetch or write it again"
        ) from error


def _read_arrow(path: Path) -> pa.Table:
    """An Arrow file (Feather) or an Arrow stream (what `datasets` writes)."""
    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()


# --------------------------------------------------------------------------------------------------------------- hub


def _resolve_revision(section: DataSection) -> str:
    """The commit that `data.revision` (a branch, a tag, a commit; None is the default branch) stands for now."""
    try:
        return commit_of(section.source, section.revision, "dataset")
    except Exception as error:  # see `commit_of`
        raise DataError(_unreachable(section.source, error)) from error


def _read_hub(source: Source, subset: str | None, split: str, wanted: list[str]) -> Table:
    import datasets

    try:
        table = datasets.load_dataset(
            source.name, data_dir=subset, split=split, revision=source.revision, trust_remote_code=False
        )
    except ValueError as error:  # its text names the splits or configurations that exist
        raise DataError(f"data.source {source.name!r}, split {split!r}: {error}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_unreachable(source.name, error)) from error
    rows = table.select_columns([name for name in wanted if name in table.column_names]).to_list()
    return _of_arrow(table.data.table, rows, wanted)


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"data.source {name!r} is no local path, and the hub did not give it: {type(error).__name__}: {error}. "
        "If this machine is offline (no network, or HF_HUB_OFFLINE is set), fetch the files elsewhere and name their "
        "path; otherwise check the id, the revision and your access"
    )
