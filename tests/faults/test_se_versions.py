"""Dependencies (SE12): floors of what is installed, and the audit of `tests/requirements.lock`, which needs no network.

No release with a known hole that matters here may be installed beside Lumina, and the lock is complete, free of contradictions
and free of releases that `advisories.json` names. That list was drawn up in November 2026 from advisories whose first repaired
release is certain. It is a floor and no substitute for a scanner that asks a database: what was published later, what nobody
wrote down there, and advisories without a repaired release (such as the disputed CVE-2023-48022 of Ray) it does not know.

What is installed need not be what is locked. A distribution's requirements count where its version is the pinned one; those of
another version say nothing of the lock.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.lock import LOCK, NAME, Distribution, Find, Wish, installed, pins, project, text_of, versions_of, wishes

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
ADVISORIES = json.loads(Path(__file__).with_name("advisories.json").read_text(encoding="utf-8"))
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


def asked_of(text: str, find: Find) -> list[Wish]:
    """The requirements that bind the lock of this text: pyproject's, and those of distributions in their pinned versions."""
    locked = pins(text)

    def pinned(name: str) -> Distribution | None:
        there = find(name)
        return there if there and locked.get(name) == there.version else None

    return wishes(pinned)


def missing(text: str, find: Find = installed) -> list[str]:
    """The packages that somebody needs and the lock does not pin."""
    locked = pins(text)
    return sorted({f"{wish.name}, which {wish.by} needs" for wish in asked_of(text, find) if wish.name not in locked})


def refused(text: str, find: Find = installed) -> list[str]:
    """The pins that somebody's requirement does not admit."""
    locked = pins(text)
    return sorted(
        f"{wish.name} {locked[wish.name]}: {wish.by} wants {','.join(sorted(map(str, wish.specifier)))}"
        for wish in asked_of(text, find)
        if wish.name in locked and not wish.specifier.contains(locked[wish.name], prereleases=True)
    )


def vulnerable(text: str) -> list[str]:
    """The pins that lie in the range of an advisory."""
    locked = pins(text)
    return [
        f"{row['package']} {locked[row['package']]}: {row['id']}, {row['what']}"
        for row in ADVISORIES
        if row["package"] in locked and SpecifierSet(row["vulnerable"]).contains(locked[row["package"]], prereleases=True)
    ]


def altered(**versions: str | None) -> str:
    """The text of the lock with other versions; None takes a pin out."""
    locked: dict[str, Version] = pins(LOCK.read_text(encoding="utf-8"))
    for name, version in versions.items():
        locked.pop(name.replace("_", "-"))
        if version:
            locked[name.replace("_", "-")] = Version(version)
    return text_of(locked)


def nobody(name: str) -> Distribution | None:
    """Nothing is installed: pyproject.toml alone speaks."""
    return None


def made_up(name: str) -> Distribution | None:
    """DeepSpeed, and two that it needs, in the pinned version of each."""
    requires = {
        "deepspeed": ["numpy>=1.20", 'colorama; sys_platform == "win32"', "hjson[fast]>=3", 'tomli; python_version < "3.11"'],
        "hjson": ["six>=1", 'ninja>=1; extra == "fast"', 'wheel; extra == "slow"', "DeepSpeed"],
    }
    locked = pins(LOCK.read_text(encoding="utf-8"))
    return Distribution(locked[name], requires[name]) if name in requires else None


def test_se12_the_lock_is_complete_admitted_and_free_of_known_holes() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert missing(text) == []
    assert refused(text) == []
    assert vulnerable(text) == []


def test_se12_the_lock_is_what_its_writer_writes() -> None:
    text = LOCK.read_text(encoding="utf-8")
    locked = pins(text)
    assert text == text_of(locked), "not as `python -m tests.lock` writes it"
    assert set(locked) == {canonicalize_name(name) for name in locked}
    assert {wish.name for wish in wishes(nobody)} <= set(locked), "pyproject.toml asks for more"
    there = {name: installed(name) for name in locked}
    others = [name for name, found in there.items() if not found or found.version != locked[name]]
    if others:
        pytest.skip(f"other versions than the locked ones are installed: {', '.join(others)}")
    assert versions_of(installed) == locked, "packages in the lock that nobody needs, or the other way round"


def test_se12_extras_and_markers_are_followed_for_the_interpreter_of_the_lock() -> None:
    """`lumina[parquet]` in an extra leads to pyarrow, and a marker of another system or extra to nothing."""
    direct = {wish.name for wish in wishes(nobody)}
    assert {"torch", "pyarrow", "tokenizers", "ray", "pytest", "packaging"} <= direct
    assert direct.isdisjoint({NAME, "wandb", "trackio", "tensorboard", "pre-commit"})
    more = {wish.name for wish in wishes(made_up)} - direct
    assert more == {"hjson", "six", "ninja"}
    builds = Distribution(Version("2.13.0"), ["triton==3.8", "nvidia-cublas>=13", "cuda-bindings>=13", "sympy>=1.13"])
    assert {wish.name for wish in wishes(lambda name: builds if name == "torch" else None)} - direct == {"sympy"}


def test_se12_a_pin_that_is_taken_out_is_seen() -> None:
    assert missing(altered(torch=None), nobody) == ["torch, which lumina needs"]
    assert missing(altered(pyarrow=None), nobody) == ["pyarrow, which lumina needs"]
    assert missing(altered(hjson=None), made_up) == ["hjson, which deepspeed needs"]
    assert "six, which hjson needs" in missing(altered(), made_up)


def test_se12_a_pin_below_a_floor_or_above_a_ceiling_is_seen() -> None:
    assert refused(altered(torch="2.9.1"), nobody) == ["torch 2.9.1: lumina wants >=2.10"]
    assert refused(altered(plotext="6.0"), nobody) == ["plotext 6.0: lumina wants <6,>=5.3.2"]
    assert refused(altered(numpy="1.19"), made_up) == ["numpy 1.19: deepspeed wants >=1.20", "numpy 1.19: lumina wants >=1.26"]
    assert refused(altered(ninja="0.9"), made_up) == ["ninja 0.9: hjson wants >=1"]


def test_se12_another_version_than_the_pinned_one_says_nothing_of_the_lock() -> None:
    def newer(name: str) -> Distribution | None:
        return Distribution(Version("99"), ["numpy>=99", "brand-new"]) if name == "deepspeed" else None

    assert missing(altered(), newer) == refused(altered(), newer) == []


@pytest.mark.parametrize("row", ADVISORIES, ids=lambda row: f"{row['package']}{row['vulnerable']}-{row['id']}")
def test_se12_a_pin_in_a_vulnerable_range_is_seen(row: dict[str, str]) -> None:
    """Each advisory names a package of the lock; it is told of the first version of its range, and not of the repaired one."""
    assert set(row) == {"package", "vulnerable", "id", "what"} and all(row.values())
    assert re.fullmatch(r"CVE-20\d\d-\d{4,}|GHSA(-[0-9a-z]{4}){3}", row["id"])
    locked = pins(LOCK.read_text(encoding="utf-8"))
    below = [one for one in SpecifierSet(row["vulnerable"]) if one.operator == "<"]
    assert row["package"] in locked and len(below) == 1, "a package that nobody needs, or a range without an end"
    least = [one.version for one in SpecifierSet(row["vulnerable"]) if one.operator == ">="] or ["0.1"]
    text = altered(**{row["package"]: least[0]})
    assert any(f": {row['id']}, " in line for line in vulnerable(text))
    repaired = altered(**{row["package"]: below[0].version})
    assert not any(f": {row['id']}, " in line for line in vulnerable(repaired))


def test_se12_a_lock_that_is_none_is_refused() -> None:
    for line in ("torch>=2.13.0", "torch==2.13.0+cpu", "Torch==2.13.0", "torch @ https://example.org/torch.whl", "-e ."):
        with pytest.raises(ValueError, match=r"is not `name==version`"):
            pins(f"# a comment\n\nnumpy==2.4.6\n{line}\n")
    with pytest.raises(ValueError, match="numpy has two versions"):
        pins("numpy==2.4.6\nnumpy==2.4.5\n")


def test_se12_what_is_not_installed_cannot_be_locked() -> None:
    with pytest.raises(LookupError, match=r"not installed: .*\bnumpy\b.*pip install"):
        versions_of(lambda name: None if name == "numpy" else installed(name))


def test_se12_extras_of_pyproject_keep_their_markers() -> None:
    assert any(re.fullmatch(r'wandb>=[0-9.]+; extra == "wandb"', text) for text in project().requires)
