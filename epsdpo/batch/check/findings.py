"""What a check has found: a line and how much it matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        return _block(self.file, self.names, self.findings)


def text_of(checks: Sequence[Checked]) -> str:
    """What was found in the files of one folder, each line once: first what all share, then what each has besides."""
    places: dict[Finding, list[int]] = {}
    for place, checked in enumerate(checks):
        for finding in checked.findings:
            places.setdefault(finding, []).append(place)
    blocks: dict[tuple[int, ...], list[Finding]] = {}
    for finding, found in places.items():
        blocks.setdefault(tuple(dict.fromkeys(found)), []).append(finding)
    texts = []
    for found, findings in sorted(blocks.items(), key=lambda block: -len(block[0])):
        files = {checks[place].file for place in found}
        where = files.pop() if len(files) == 1 else checks[found[0]].file.parent
        texts.append(_block(where, [name for place in found for name in checks[place].names], findings))
    return "\n".join(texts)


def _block(where: Path, names: Sequence[str], findings: Iterable[Finding]) -> str:
    count = f" ({len(names)} experiments)" if len(names) > 1 else ""
    return "\n".join([f"{where}: {', '.join(names)}{count}", *(f"  {each.level:<8}{each.text}" for each in findings)])
