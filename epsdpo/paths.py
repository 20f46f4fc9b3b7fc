"""Where the kit lies, and how a path given by a user is found.

Apart from `epsdpo.stages`, so that commands which run nothing do not wait for papermill.
"""

from __future__ import annotations

from pathlib import Path

from epsdpo.experiment import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]


def looks_local(name: str) -> bool:
    """Whether a name that may be a hub id, owner/name, can only be meant as a path: by its form, or since its folder is
    here."""
    path = Path(name)
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (len(path.parts) > 1 and path.parent.is_dir())


def resolve_path(path: str | Path) -> Path:
    """`path` as given if it exists from the working directory, else relative to the repository root.

    Raises:
        ConfigError: if it exists in neither place.
    """
    places = list(dict.fromkeys([Path.cwd(), REPOSITORY]))
    for place in places:
        if (place / path).exists():
            return Path(path) if place == Path.cwd() else place / path
    raise ConfigError(f"{path}: no such file or folder in {' or in '.join(map(str, places))}")
