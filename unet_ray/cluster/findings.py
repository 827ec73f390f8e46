"""What the doctor has found out, line by line, and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a finding means for a job."""

    OK = "ok"
    NOTE = "note"
    """It works, and might be better."""
    FAILS = "FAIL"
    """A job that needs it will not work."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of a node's report."""

    topic: str
    text: str
    """What is there, without credentials."""
    verdict: Verdict = Verdict.OK
    remedy: str = ""
    """What to do where it is not well."""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """All that was found out on one node."""

    node: str
    """Its name, as messages have it."""
    findings: tuple[Finding, ...]

    @property
    def fails(self) -> bool:
        """Whether a job will not work there."""
        return any(finding.verdict is Verdict.FAILS for finding in self.findings)


def report_text(reports: Sequence[NodeReport]) -> str:
    """The lines of all nodes, each with its remedy, and a last one that says how many do not work.

    `FAIL  devices     Ray reserves 1 GPU, TensorFlow sees none -> pip install …`
    """
    lines = []
    for report in reports:
        lines.append(f"{report.node}:")
        lines += [_line(finding) for finding in report.findings]
    failing = [report.node for report in reports if report.fails]
    lines.append(f"will not work on: {', '.join(failing)}" if failing else "nothing is in the way of a job")
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.verdict.value:5} {finding.topic:15} {' '.join(finding.text.split())}{remedy}"
