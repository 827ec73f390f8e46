"""The oldest versions are written down twice: as pyproject.toml's lower bounds, and as what `.ci/lowest` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()


def lower_bounds(lines: list[str]) -> dict[str, Version]:
    bounds = {}
    for requirement in map(Requirement, lines):
        (bound,) = (of.version for of in requirement.specifier if of.operator == ">=")
        bounds[requirement.name.lower()] = Version(bound)
    return bounds


def pinned(lines: list[str]) -> dict[str, Version]:
    pins = (re.fullmatch(r"([A-Za-z0-9-]+)==([0-9.]+)", line) for line in lines if not line.startswith("#"))
    return {pin[1].lower(): Version(pin[2]) for pin in pins if pin is not None}


def test_the_oldest_versions_are_the_lower_bounds():
    (not_ours,) = (number for number, line in enumerate(LINES) if line.startswith("# Not ours"))
    bounds = lower_bounds([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["s3"]])
    assert pinned(LINES[:not_ours]) == bounds
    assert not pinned(LINES[not_ours:]).keys() & bounds.keys()
    assert len(pinned(LINES)) == len([line for line in LINES if not line.startswith("#")]), "a line that is no version"


def test_tensorflow_for_gpus_has_the_range_of_tensorflow():
    (plain,) = (of for of in map(Requirement, PROJECT["dependencies"]) if of.name == "tensorflow")
    (for_gpus,) = map(Requirement, PROJECT["optional-dependencies"]["gpu"])
    assert (for_gpus.name, for_gpus.specifier) == (plain.name, plain.specifier)


def test_ci_runs_the_oldest_versions():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == ".ci/lowest"
    assert "-c .ci/lowest.txt" in (ROOT / ".ci" / "lowest").read_text()
