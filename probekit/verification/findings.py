"""What a verification found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = "probekit/verify/1"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written. problem: the end of a sentence that begins with the path."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}."


@dataclass(frozen=True)
class WeightsChecked:
    """The weights of one model of a run, held against the hash in its manifest.

    state: "same"; "other": hash and weights differ, which is a finding; "not reachable": `why` says so. role: "model"
    or "draft model".
    """

    model: str
    role: str
    reference: str
    state: Literal["same", "other", "not reachable"]
    why: str = ""


@dataclass(frozen=True)
class Verified:
    """The whole of it. files: how many were held against a checksum. Iterates over its findings."""

    folder: Path
    kind: Literal["run", "study", "export"]
    files: int
    weights: tuple[WeightsChecked, ...]
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether everything that can be checked is as it was written."""
        return not self.findings

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The document of `probekit verify --json`."""
        return {"schema": SCHEMA, **asdict(self), "folder": str(self.folder), "whole": self.whole}


class Notes:
    """Collects what a verification finds."""

    def __init__(self) -> None:
        self.files = 0
        self.weights: list[WeightsChecked] = []
        self.findings: list[Finding] = []

    def add(self, path: Path | str, problem: str) -> None:
        """problem: with or without the path that it begins with, and the stop that ends it."""
        name, said = str(path), " ".join(problem.split())
        self.findings.append(Finding(name, said.removeprefix(f"{name} ").rstrip(".")))
