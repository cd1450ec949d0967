"""Floors of the dependencies (SE12): no release with a known hole that matters here may be installed beside Lumina."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# package -> the first release that is free of what is named
FLOORS = {
    "torch": ((2, 10), "CVE-2025-32434, CVE-2026-24747: loading with weights_only=True ran code"),
    "deepspeed": ((0, 15, 1), "CVE-2024-43497"),
    "safetensors": ((0, 5), "header checks of the reader"),
    "textual": ((8,), "escape sequences in what is shown"),
    "pyyaml": ((6,), "CVE-2020-14343: full_load ran code"),
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def declared() -> dict[str, str]:
    """Package -> its least version in pyproject.toml."""
    block = PROJECT.read_text().partition("dependencies = [")[2].partition("]")[0]
    found = re.findall(r'"([A-Za-z0-9_-]+)(?:>=|==)([0-9.]+)', block)
    return {name.lower(): version for name, version in found}


@pytest.mark.parametrize("package", FLOORS)
def test_se12_the_floor_is_declared_and_installed(package: str) -> None:
    floor, why = FLOORS[package]
    assert numbers(declared()[package]) >= floor, f"pyproject.toml allows {package} {declared()[package]}: {why}"
    assert numbers(metadata.version(package)) >= floor, f"{package} {metadata.version(package)} is installed: {why}"


def test_se12_every_dependency_has_a_floor() -> None:
    block = PROJECT.read_text().partition("dependencies = [")[2].partition("]")[0]
    names = re.findall(r'"([A-Za-z0-9_-]+)', block)
    assert names and {name.lower() for name in names} == set(declared()), "a dependency without a least version"
