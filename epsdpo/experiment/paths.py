"""Where the kit lies, and how a path given by a user is found.

Apart from what runs stages, so that commands which run nothing do not wait for papermill.
"""

from __future__ import annotations

from pathlib import Path

from epsdpo.methods.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


def looks_local(name: str) -> bool:
    """Whether a name that may be a hub id, owner/name, can only be meant as a path: by its form, or since its folder is
    here."""
    path = Path(name)
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith(".gguf")
        or name.count("/") > 1
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def resolve_path(path: str | Path, made_by: str = "") -> Path:
    """`path` as given if it exists from the working directory, else relative to the repository root.

    For a notebook that was opened where it lies it is the other way round: there all paths begin at the root.

    Args:
        made_by: the notebook that makes it, for the error.

    Raises:
        ConfigError: if it exists in neither place.
    """
    places = list(dict.fromkeys([Path.cwd(), REPOSITORY]))
    if _in_notebooks():
        places.reverse()
    for place in places:
        if (place / path).exists():
            return Path(path) if place == Path.cwd() else place / path
    remedy = f". Run {made_by} first, or give the folder that it wrote" if made_by else ""
    raise ConfigError(f"{path}: no such file or folder in {' or in '.join(map(str, places))}{remedy}")


def output_path(path: str | Path) -> Path:
    """Where a notebook writes: `path` as given, from the repository root if the notebook was opened where it lies.

    JupyterLab starts a notebook in its own folder. So its paths mean there what they mean to commands.
    """
    return REPOSITORY / path if _in_notebooks() else Path(path)


def _in_notebooks() -> bool:
    return Path.cwd() == REPOSITORY / "notebooks"
