"""What a check has found: a line and how much it matters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OK = "ok"
NOTE = "note"  # what could not be verified here, or is only worth knowing
WARNING = "warning"
ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line, with its weight: OK, NOTE, WARNING, or ERROR, which alone says that a run would fail."""

    level: str
    text: str


@dataclass(frozen=True)
class Checked:
    """The experiments of one file on which the findings are the same."""

    file: Path
    names: list[str]
    findings: list[Finding]

    @property
    def fails(self) -> bool:
        return any(finding.level == ERROR for finding in self.findings)

    def text(self) -> str:
        """A heading with the experiments' names, and a line for each finding."""
        count = f" ({len(self.names)} experiments)" if len(self.names) > 1 else ""
        lines = [f"  {finding.level:<8}{finding.text}" for finding in self.findings]
        return "\n".join([f"{self.file}: {', '.join(self.names)}{count}", *lines])
