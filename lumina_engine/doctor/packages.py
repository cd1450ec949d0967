"""Checks of Python, the packages, torch, DeepSpeed and what it compiles with."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from .row import Result, fail, ok, skipped, warn
from .system import System

OLDEST_PYTHON = (3, 10)
PROBE_LIMIT = 110.0  # s for an import in a process of its own: on a cold network disk torch takes a minute
_PROGRAM_LIMIT = 10.0
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?")
_BOUND = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([\w.*+!-]+)")


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros: 2.10.0+cpu is (2, 10). A pre-release counts as its release."""
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def within(version: str, bounds: str) -> bool:
    """Whether a version meets bounds like `>=5.3.2,<6`; a kind of bound that is not known here is met."""
    have = release(version)
    compare = {
        ">=": lambda want: have >= want,
        "<=": lambda want: have <= want,
        "==": lambda want: have == want,
        "!=": lambda want: have != want,
        ">": lambda want: have > want,
        "<": lambda want: have < want,
    }
    return all(
        compare[sign](release(wanted)) for sign, wanted in _BOUND.findall(bounds) if sign in compare and "*" not in wanted
    )


def python(system: System) -> Iterator[Result]:
    """Python's version, and whether it runs in an environment of its own."""
    version = ".".join(map(str, system.python))
    where = sys.executable
    if system.python[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield fail(
            f"{version}, {where}", f"Lumina needs Python {oldest} or newer: make an environment with one and install there"
        )
    else:
        yield ok(f"{version}, {where}")


def packages(system: System) -> Iterator[Result]:
    """Each package that Lumina needs, against the bounds of its own metadata."""
    requirements = system.requirements()
    if requirements is None:
        yield warn("Lumina is not installed as a package: its bounds are not known", "pip install . in Lumina's folder")
        return
    for text in requirements:
        match = _REQUIREMENT.fullmatch(text.strip())
        if match is None or "extra ==" in (match[3] or ""):
            continue
        name, bounds = match[1], match[2].replace(" ", "")
        version = system.version(name)
        command = f"pip install '{name}{bounds}'"
        if version is None:
            yield fail(f"not installed, {bounds or 'any version'} is needed", command, name)
        elif not within(version, bounds):
            yield fail(f"{version}, {bounds} is needed", command, name)
        else:
            yield ok(f"{version} ({bounds})" if bounds else version, part=name)


def probe(system: System, what: str) -> tuple[dict[str, Any] | None, float, str]:
    """The facts of `training.probe` (None: no answer), the seconds it took, and its last line of error output."""
    began = time.monotonic()
    try:
        output = system.call([sys.executable, "-m", "lumina_engine.training.probe", what], PROBE_LIMIT)
    except OSError as error:
        return None, 0.0, str(error)
    seconds = time.monotonic() - began
    lines = output.out.strip().splitlines()
    try:
        facts = json.loads(lines[-1]) if output.code == 0 and lines else None
    except ValueError:
        facts = None
    return (facts if isinstance(facts, dict) else None), seconds, output.last_error or "it said nothing"


def torch(system: System) -> Iterator[Result]:
    """Imports torch in a process of its own, multiplies matrices in fp32 and bf16, and makes a gloo process group."""
    facts, seconds, error = probe(system, "torch")
    if facts is None:
        yield fail(
            f"import torch: {error}",
            "pip install --force-reinstall torch; the line above it is shown by: python -c 'import torch'",
        )
        return
    build = f"CUDA {facts['cuda']}" if facts.get("cuda") else f"ROCm {facts['hip']}" if facts.get("hip") else "CPU build"
    bad = [kind for kind, good in facts["products"].items() if not good]
    text = f"{facts['version']}, {build}, {facts['threads']} threads, imports in {seconds:.1f} s"
    if bad:
        yield fail(
            f"{text}; wrong product in {', '.join(bad)}", "this build of torch does not fit this processor: install another one"
        )
    else:
        yield ok(text)
    if facts["gloo"]:
        yield warn(
            f"no process group: {facts['gloo']}",
            "several ranks on CPU need gloo: see the network rows, or set num_gpus=1",
            "gloo",
        )
    else:
        yield ok("a process group of one rank works", part="gloo")


def deepspeed(system: System) -> Iterator[Result]:
    """Imports DeepSpeed in a process of its own, and asks which of its operators are compiled at first use."""
    facts, seconds, error = probe(system, "deepspeed")
    if facts is None:
        yield fail(f"import deepspeed: {error}", "pip install --force-reinstall deepspeed, or train with use_deepspeed=false")
        return
    yield ok(f"{facts['version']}, accelerator {facts['accelerator']}, imports in {seconds:.1f} s")
    operators = facts.get("operators") or {}
    lazy = [name for name, entry in operators.items() if not entry["built"] and entry["compatible"]]
    lost = [name for name, entry in operators.items() if not entry["built"] and not entry["compatible"]]
    if lost:
        yield warn(
            f"cannot be compiled here: {', '.join(lost)}",
            "only runs that use them fail; see compiler and cuda_home",
            "operators",
        )
    elif lazy:
        yield ok(f"compiled at first use: {', '.join(lazy)}", part="operators")
    else:
        yield ok("none has to be compiled", part="operators")


def compiler(system: System) -> Iterator[Result]:
    """The C++ compiler and ninja that DeepSpeed's operators need at their first use."""
    name = system.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if system.which(name)), "")
    path = system.which(name) if name else None
    advice = "apt install build-essential, or set CXX to a compiler"
    if path is None:
        yield warn(f"{name}: not found" if name else "no C++ compiler: operators cannot be compiled", advice)
    else:
        output = system.call([path, "--version"], _PROGRAM_LIMIT)
        first = output.out.strip().splitlines()
        if output.code == 0 and first:
            yield ok(f"{path}, {first[0]}")
        else:
            yield warn(f"{path} does not run: {output.last_error}", advice)
    ninja = system.which("ninja")
    if ninja or system.version("ninja"):
        yield ok(ninja or f"ninja {system.version('ninja')}", part="ninja")
    else:
        yield warn("not found: operators cannot be compiled", "pip install ninja", "ninja")


def cuda_home(system: System) -> Iterator[Result]:
    """The CUDA toolkit (nvcc) that operators for GPUs are compiled with. Nobody without a GPU needs it."""
    if system.nvml() is None:
        yield skipped("no GPU: nothing is compiled for one")
        return
    home = system.environ.get("CUDA_HOME") or system.environ.get("CUDA_PATH")
    nvcc = system.which(f"{home}/bin/nvcc") if home else system.which("nvcc") or system.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "CUDA_HOME is not set and nvcc is not on the PATH"
        yield warn(
            f"{where}: operators for GPUs cannot be compiled", "install the CUDA toolkit of torch's version and set CUDA_HOME"
        )
        return
    output = system.call([nvcc, "--version"], _PROGRAM_LIMIT)
    match = re.search(r"release ([\d.]+)", output.out)
    torch_version = system.version("torch") or ""
    wanted = re.search(r"\+cu(\d+)(\d)$", torch_version)
    found = f"{nvcc}, CUDA {match[1] if match else '-'}"
    if match and wanted and match[1].split(".")[0] != wanted[1]:
        yield warn(
            f"{found}; torch is built for CUDA {wanted[1]}.{wanted[2]}", f"set CUDA_HOME to a toolkit of CUDA {wanted[1]}"
        )
    else:
        yield ok(found)
