"""What was answered is kept whole or not at all, for one process at a time, and asked for once."""

import json
import logging
import subprocess
import sys

import pytest

from epsdpo.models.kept import Kept, append_lines, ask_missing
from epsdpo.models.response import Failure


def by_number(record):
    """A record's number; one of nothing is no answer any more."""
    return record["number"] or None


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("together", [False, True])
def test_a_full_disk_leaves_whole_lines(tmp_path, together):
    """The limit on a file's size stands for the disk; it falls inside the third line. Of a batch no line is left."""
    script = """
import resource, signal, sys
from pathlib import Path
from epsdpo.models.kept import Kept
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
with Kept(Path(sys.argv[1]), dict) as kept:
    records = [{"key": key, "preference": 1.5, "text": "x" * 1000} for key in "01234"]
    for some in [records] if sys.argv[2] == "True" else [[record] for record in records]:
        kept.add(some)
"""
    arguments = [str(tmp_path / "kept.jsonl"), str(together)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True)
    assert b"in part" in done.stderr
    assert [record["key"] for record in lines(tmp_path / "kept.jsonl")] == ([] if together else ["0", "1"])
    assert (tmp_path / "kept.jsonl").read_bytes()[-1:] in (b"", b"\n")


def test_only_what_is_missing_is_asked_for_and_failures_are_asked_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="epsdpo")
    asked, told = [], []

    def answers(items, missing):
        asked.append([item for item, is_missing in zip(items, missing, strict=True) if is_missing])
        yield {0: 1, 1: Failure("busy", "later")}  # the first may not be missing
        yield {2: 3}

    def ask(keys):
        wanted = {key: 10 + number for number, key in enumerate(keys)}
        with Kept(tmp_path / "kept.jsonl", by_number) as kept:
            failures = ask_missing(
                wanted,
                kept,
                answers,
                lambda key, item, found: {"key": key, "number": found, "item": item},
                "numbers",
                lambda key, item, failure: told.append((key, item, failure.reason)),
            )
            return failures, {key: kept[key] for key in keys if key in kept}

    assert ask("abc") == ({"b": Failure("busy", "later")}, {"a": 1, "c": 3})
    assert ask("abc") == ({"b": Failure("busy", "later")}, {"a": 1, "c": 3})
    assert asked == [[10, 11, 12], [11]] and told == [("b", 11, "busy")] * 2
    assert [record["key"] for record in lines(tmp_path / "kept.jsonl")] == ["a", "c"]
    assert "numbers: 2 of 3 are answered already" in caplog.text
    assert "numbers: asked 3 of 3, 1 failed, about 0 s left" in caplog.text


def test_what_counts_no_longer_is_asked_again_and_the_last_line_stands(tmp_path, caplog):
    path = tmp_path / "kept.jsonl"
    append_lines(path, [{"key": "a", "number": 0}, {"key": "b", "number": 2}, {"key": "b", "number": 3}])
    with Kept(path, by_number) as kept:
        assert "a" not in kept and kept["b"] == 3
        kept.add([{"key": "a", "number": 1}])
    assert "1 lines are no answers by today's rules" in caplog.text
    with Kept(path, by_number) as kept:
        assert kept["a"] == 1


def test_a_torn_line_is_cut_off_and_no_more(tmp_path, caplog):
    for path in (tmp_path / "kept.jsonl", tmp_path / "log.jsonl"):
        append_lines(path, [{"key": "a", "number": 1}])
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"key": "b", "numb')
        if path.name == "log.jsonl":
            append_lines(path, [])
        else:
            with Kept(path, by_number) as kept:
                assert kept["a"] == 1
        assert path.read_bytes() == whole
    assert caplog.text.count("was cut off by the end of its writer") == 2


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Kept(None, by_number) as kept:
        kept.add([{"key": "a", "number": 1}])
        assert kept["a"] == 1
    assert not list(tmp_path.iterdir())
