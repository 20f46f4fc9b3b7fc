"""A Dockerfile as its instructions, for tests on machines without a container engine."""

import re
from pathlib import Path


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, rest) in order: comments are left out, continued lines joined."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(None, 1)[1]) for line in whole.splitlines() if line.strip()]


def copied(rest: str) -> tuple[list[str], str]:
    """Sources and destination of a COPY."""
    *sources, destination = [word for word in rest.split() if not word.startswith("--")]
    return sources, destination
