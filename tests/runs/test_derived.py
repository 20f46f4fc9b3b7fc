"""Folders that are made once: what is being built stays, and what killed builds have left goes.

That they are found again, and built anew where they are damaged, is tested with the embedded world.
"""

import subprocess
import sys

from epsdpo.runs import derived


def test_what_killed_builds_have_left_in_the_cache_goes_and_what_is_being_built_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("EPSDPO_CACHE", str(tmp_path))
    (tmp_path / ".pairs-killed" / "new").mkdir(parents=True)
    with derived._scratch("pairs") as building:
        assert not (tmp_path / ".pairs-killed").exists()
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                "from epsdpo.runs import derived\nwith derived._scratch('pairs') as own: print(own.is_dir())",
            ],
            capture_output=True,
            text=True,
        )
        assert other.stdout == "True\n" and building.is_dir()
        assert [path.name for path in tmp_path.glob(".pairs-*")] == [building.name]
    assert not list(tmp_path.glob(".pairs-*"))
