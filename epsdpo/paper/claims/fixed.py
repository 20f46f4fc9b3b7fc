"""Claims fixed before the runs: the copy of a claims file that a run folder gets, and keeps."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import yaml

from epsdpo.experiment import ConfigError
from epsdpo.files import written_whole
from epsdpo.paper.claims.settings import Claims

CLAIMS_FILE = "claims.yaml"  # in a run folder: the copy that was made before the first run


def fix_claims(claims: Claims, run_dir: Path) -> None:
    """Leave the claims in a run folder before its first run; later they can be reworded, but no longer changed.

    Raises:
        ConfigError: if the folder holds claims that are tested otherwise.
    """
    path = run_dir / CLAIMS_FILE
    fixed_at = datetime.now(UTC).isoformat(timespec="seconds")
    if path.exists():
        fixed_at, before = fixed_claims(run_dir)
        if before.decisive() != claims.decisive():
            tests = [claim.decisive() for claim in before.claims]
            changed = [claim.name for claim in claims.claims if claim.decisive() not in tests]
            raise ConfigError(
                f"{path}: claims were fixed at {fixed_at}, before the runs of this folder, and are now tested "
                f"otherwise ({', '.join(changed) or 'worlds, level or fewer claims'}). Restore them, or choose "
                "another folder with --output"
            )
    with written_whole(path) as partial:
        content = {"fixed_at": fixed_at, "claims": claims.model_dump()}
        partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def fixed_claims(run_dir: Path) -> tuple[str, Claims]:
    """When the claims of a run folder were fixed (UTC), and what they are.

    Raises:
        ConfigError: if the folder has none.
    """
    path = run_dir / CLAIMS_FILE
    if not path.exists():
        raise ConfigError(f"{path}: no such file. Give the folder of a batch that was run with --claims")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return content["fixed_at"], Claims.model_validate(content["claims"])
    except (IsADirectoryError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as the claims that were fixed before the runs ({' '.join(str(error).split())}). "
            "Restore it: what they were cannot be known otherwise"
        ) from error
