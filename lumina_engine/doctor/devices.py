"""Checks of GPUs, their driver, CUDA and NCCL, and of the processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .packages import probe
from .row import Result, fail, ok, skipped, warn
from .system import System

if TYPE_CHECKING:
    from ..monitoring.hardware import Nvml

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, class of graphics and compute cards
_INSTALL_CUDA = "pip install torch from https://pytorch.org/get-started for the driver's CUDA version"


def cards(system: System) -> int:
    """NVIDIA cards on the PCI bus, whether or not a driver knows them."""
    found = 0
    for name in system.names("/sys/bus/pci/devices"):
        vendor = (system.read(f"/sys/bus/pci/devices/{name}/vendor") or "").strip()
        kind = (system.read(f"/sys/bus/pci/devices/{name}/class") or "").strip()
        found += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return found


def driver(system: System) -> Iterator[Result]:
    """The NVIDIA driver, the CUDA version it offers, and the GPUs that this process may use."""
    nvml = system.nvml()
    there = cards(system)
    if nvml is None and there:
        yield fail(
            f"{there} NVIDIA card{'s' * (there > 1)} on the bus, but the driver does not answer",
            "install the NVIDIA driver or load it (nvidia-smi must work); in a container start it with --gpus all",
        )
        return
    if nvml is None:
        yield ok("no NVIDIA GPU: runs use the processor")
        return
    hidden = system.environ.get("CUDA_VISIBLE_DEVICES")
    visible = nvml.visible(hidden)
    versions = f"driver {nvml.driver_version() or '-'}, CUDA {_dotted(nvml.cuda_version())}"
    if not visible:
        yield warn(
            f"{versions}; CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES, or name GPUs in it"
        )
        return
    yield ok(f"{versions}, {len(visible)} GPU{'s' * (len(visible) > 1)}")
    for index in visible:
        yield _gpu(nvml, index)


def _dotted(version: tuple[int, int] | None) -> str:
    return "-" if version is None else f"{version[0]}.{version[1]}"


def _gpu(nvml: Nvml, index: int) -> Result:
    part = f"gpu{index}"
    found = nvml.device(index)
    total, used = found.memory_total, found.memory_used
    free = "-" if total is None or used is None else f"{(total - used) / 1e9:.0f} of {total / 1e9:.0f} GB free"
    hot = f", {found.temperature:.0f} C" if found.temperature is not None else ""
    text = f"{found.name}, {free}{hot}"
    if not nvml.has_bf16(index):
        return warn(
            f"{text}; no bf16 and no flash attention (older than Ampere)", "precision=fp16 works; memory needs are higher", part
        )
    if total and used is not None and used > 0.5 * total:
        return warn(
            f"{text}; other processes use it",
            "nvidia-smi names them: stop them, or choose others by CUDA_VISIBLE_DEVICES",
            part,
        )
    return ok(f"{text}, bf16, flash attention", part=part)


def cuda(system: System) -> Iterator[Result]:
    """Whether torch can use the GPUs: its build against the driver's CUDA version, a product on each, and NCCL."""
    nvml = system.nvml()
    if nvml is None or not nvml.visible(system.environ.get("CUDA_VISIBLE_DEVICES")):
        yield skipped("no GPU to use")
        return
    facts, _, error = probe(system, "torch")
    if facts is None:
        yield fail(f"import torch: {error}", "see the row torch")
        return
    offered = nvml.cuda_version()
    built = tuple(int(part) for part in str(facts.get("cuda") or "0").split(".")[:2])
    if built == (0,):
        yield fail(f"torch {facts['version']} is built without CUDA: GPUs stay unused", _INSTALL_CUDA)
    elif offered is not None and built[0] > offered[0]:
        yield fail(
            f"torch is built for CUDA {facts['cuda']}, the driver offers {_dotted(offered)}",
            "install a newer driver, or a torch built for an older CUDA",
        )
    elif not facts["devices"]:
        yield fail("torch sees no GPU", "python -c 'import torch; torch.zeros(1).cuda()' shows why")
    else:
        yield from _working(facts)


def _working(facts: dict[str, object]) -> Iterator[Result]:
    devices: list[dict[str, object]] = facts["devices"]  # type: ignore[assignment]
    wrong = [str(index) for index, device in enumerate(devices) if device["product"] != 16.0]
    text = f"torch's CUDA {facts['cuda']} works on {len(devices)} GPU{'s' * (len(devices) > 1)}"
    if wrong:
        yield fail(f"wrong products on GPU {', '.join(wrong)}", "the GPU or its memory is faulty: nvidia-smi -q shows errors")
    else:
        yield ok(f"{text}, flash attention {'built in' if facts['flash'] else 'not built in'}")
    if facts["nccl"]:
        yield ok(f"NCCL {facts['nccl']}", part="nccl")
    elif len(devices) > 1:
        yield fail("this build of torch has no NCCL: GPUs cannot work together", _INSTALL_CUDA, "nccl")


def cpu(system: System) -> Iterator[Result]:
    """Cores that may be used, and the vector instructions that decide how fast a run on the processor is."""
    from ..monitoring.hardware import core_count

    cores = core_count(system.root / "sys/fs/cgroup")
    info = system.read("/proc/cpuinfo") or ""
    lines = [line.partition(":") for line in info.splitlines()]
    flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unknown processor")
    abilities = [
        title
        for title, names in (
            ("AVX2", {"avx2"}),
            ("AVX-512", {"avx512f"}),
            ("bf16", {"avx512_bf16", "avx_ne_convert", "bf16"}),
            ("AMX", {"amx_bf16", "amx_tile"}),
            ("NEON", {"asimd"}),
            ("SVE", {"sve"}),
        )
        if names & flags
    ]
    text = f"{name}, {cores} core{'s' * (cores > 1)}, {', '.join(abilities) or 'no vector instructions known'}"
    if flags and not {"avx2", "asimd"} & flags:
        yield warn(text, "without AVX2 a run on this processor is many times slower: use another machine or a GPU")
    else:
        yield ok(text if "bf16" in abilities or not flags else f"{text}; bf16 is emulated (precision=fp32 is as fast)")
