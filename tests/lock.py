"""`requirements.lock` here: the versions that the tests were run with. `python -m tests.lock` writes it from what is installed.

It is a constraints file for pip, for one interpreter (`TARGET`): what `pyproject.toml` asks for with the extras `EXTRAS`, and
what that asks for in turn, one `name==version` a line. `faults/test_se_versions.py` audits it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "tests" / "requirements.lock"
NAME = "lumina"
EXTRAS = ("test",)  # which takes in parquet, tokenizers and ray
# Markers are read for the interpreter of the lock, whichever one reads them.
TARGET = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.7",
    "python_version": "3.11",
    "sys_platform": "linux",
}
# What torch asks for beside these differs between its builds for CPU and CUDA, and each build pins its own.
OF_A_BUILD = re.compile(r"nvidia-|cuda-|triton$|pytorch-triton")
HEADER = """\
# The versions that Lumina's tests were run with (Linux, Python 3.11): a constraints file for pip.
# Use:   pip install -c tests/requirements.lock -e '.[test]'
# Renew: python -m tests.lock     (in an environment with the versions that are to be pinned)
# Pinned is what lumina[test] needs, transitively: parquet, tokenizers and ray are in it. Not pinned: the extra trackers
# (wandb, mlflow, trackio, TensorBoard), pre-commit of the extra dev, and what the CUDA builds of torch bring (nvidia-*,
# cuda-*, triton). Python 3.10 needs older releases of some of these.
"""


class Distribution(NamedTuple):
    """What is known of a package: its version without a local part (`+cpu`), and its requirements as written."""

    version: Version
    requires: list[str]


class Wish(NamedTuple):
    """A requirement: who asks (normalised name), for which package (normalised name), in which versions."""

    by: str
    name: str
    specifier: SpecifierSet


Find = Callable[[str], "Distribution | None"]


def installed(name: str) -> Distribution | None:
    """The distribution of this name that is installed here."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return Distribution(Version(Version(found.version).public), found.requires or [])


def project() -> Distribution:
    """What `pyproject.toml` asks for, as an installed distribution would say it: extras as markers."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requires = list(table["dependencies"])
    for extra, texts in table["optional-dependencies"].items():
        for wish in map(Requirement, texts):
            own = f"({wish.marker}) and " if wish.marker else ""
            wish.marker = Marker(f'{own}extra == "{extra}"')
            requires.append(str(wish))
    return Distribution(Version(table["version"]), requires)


def wishes(find: Find) -> list[Wish]:
    """Every requirement that is reached from `pyproject.toml`; one of a package that `find` does not know ends there."""
    found: dict[Wish, None] = {}  # one without a marker is met once more with every extra
    seen = set()
    todo = [(NAME, extra) for extra in ("", *EXTRAS)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        there = project() if name == NAME else find(name)
        for wish in map(Requirement, there.requires if there else ()):
            asked = canonicalize_name(wish.name)
            if wish.marker and not wish.marker.evaluate({**TARGET, "extra": extra}):
                continue
            if name == "torch" and OF_A_BUILD.match(asked):
                continue
            todo += [(asked, more) for more in ("", *wish.extras)]
            if asked != NAME:
                found[Wish(name, asked, wish.specifier)] = None
    return list(found)


def pins(text: str) -> dict[str, Version]:
    """Package -> version, of a lock's text. Raises ValueError for a line that is not `name==version` or repeats a name."""
    found: dict[str, Version] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*)", line)
        if not match:
            raise ValueError(f"{LOCK.name}: {line!r} is not `name==version`: write it anew with `python -m tests.lock`")
        if match[1] in found:
            raise ValueError(f"{LOCK.name}: {match[1]} has two versions: write it anew with `python -m tests.lock`")
        found[match[1]] = Version(match[2])
    return found


def text_of(versions: Mapping[str, Version]) -> str:
    """The text of a lock with these pins."""
    return HEADER + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions))


def versions_of(find: Find) -> dict[str, Version]:
    """The versions to pin. Raises LookupError if a package that is needed is not known to `find`."""
    found = {name: find(name) for name in {wish.name for wish in wishes(find)}}
    absent = sorted(name for name, there in found.items() if there is None)
    if absent:
        raise LookupError(f"not installed: {', '.join(absent)}. Install what is to be pinned: pip install -e '.[test]'")
    return {name: there.version for name, there in found.items() if there}


def main() -> int:
    here = "{}.{}".format(*sys.version_info[:2])
    if (sys.platform, here) != (TARGET["sys_platform"], TARGET["python_version"]):
        print(
            f"the lock is one of Linux and Python {TARGET['python_version']}, this is {sys.platform} and {here}",
            file=sys.stderr,
        )
        return 1
    try:
        versions = versions_of(installed)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    LOCK.write_text(text_of(versions), encoding="utf-8")
    print(f"{LOCK.name}: {len(versions)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
