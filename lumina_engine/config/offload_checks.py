"""Rules of offload (R19, R26, C56, C57): what a configuration and a machine must have for it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lumina_engine.config.counts import largest_parameter, parameter_counts
from lumina_engine.config.finding import Finding, finding
from lumina_engine.config.machine import Machine, gb_text
from lumina_engine.config.offload import Offload, least_stage, offload_of
from lumina_engine.config.resolve import model_config, ranks_per_node, resolved_precision, world_size
from lumina_engine.config.schema import Config, infos_of
from lumina_engine.mounts import file_system

_HOST_KEYS = ("cpu_offload", "cpu_offload_optimizer", "cpu_offload_parameters")
_NVME_KEYS = ("nvme_offload_optimizer", "nvme_offload_parameters")
_SHORT = ("bf16", "fp16")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_AIO_PROGRAM = "#include <libaio.h>\nint main() { io_context_t c = 0; return io_setup(1, &c); }\n"


def offload(config: Config) -> Iterator[Finding]:
    """Rules that need no machine."""
    used = [name for name in (*_HOST_KEYS, *_NVME_KEYS) if getattr(config, name)]
    if config.nvme_path != infos_of(Config)["nvme_path"].default and not any(n in _NVME_KEYS for n in used):
        message = f"nvme_path = {config.nvme_path} has no effect without nvme_offload_optimizer or nvme_offload_parameters"
        yield finding("info", "nvme_path", "nvme_path", message, "set one of them, or leave nvme_path as it was")
    if not used:
        return
    keys, said = " ".join(used), " and ".join(used)
    if not config.use_deepspeed:
        message = f"{said}: offload needs DeepSpeed, but use_deepspeed is false"
        yield finding("error", "offload_off", f"{keys} use_deepspeed", message, f"set use_deepspeed=true, or {used[0]}=false")
        return
    if config.expert_parallel_size > 1 and config.use_moe:
        message = f"{said} with expert_parallel_size = {config.expert_parallel_size}: not available together"
        yield finding("error", "offload_experts", f"{keys} expert_parallel_size", message, "set expert_parallel_size=1")
    least, reason = least_stage(config)
    if config.zero_stage != "auto" and config.zero_stage < least:
        message = f"zero_stage = {config.zero_stage} with {said}: {reason}; DeepSpeed would say nothing and move nothing"
        yield finding("error", "offload_stage", f"zero_stage {keys}", message, f"set zero_stage={least} or auto")
    yield from _nvme_wins(config)
    if config.nvme_offload_parameters and config.precision not in ("auto", *_SHORT):
        yield _wide_weights(config.precision)


def _nvme_wins(config: Config) -> Iterator[Finding]:
    both = (
        ("nvme_offload_optimizer", ("cpu_offload", "cpu_offload_optimizer")),
        ("nvme_offload_parameters", ("cpu_offload_parameters",)),
    )
    for disk, hosts in both:
        for host in hosts:
            if getattr(config, disk) and getattr(config, host):
                message = f"{disk} and {host}: the disk is taken for what both would move"
                yield finding("info", "nvme_wins", f"{disk} {host}", message, f"set {host}=false")


def _wide_weights(precision: str) -> Finding:
    message = f"nvme_offload_parameters with precision = {precision}: DeepSpeed swaps 16-bit weights only"
    return finding("error", "nvme_weights", "nvme_offload_parameters precision", message, "set precision=bf16")


def offload_machine(config: Config, machine: Machine) -> Iterator[Finding]:
    """Rules that look at the machine: no device to free, room and kind of the disk, the library for it, memory locks."""
    places = offload_of(config, 3 if least_stage(config)[0] == 3 else 1)
    if not config.use_deepspeed or not places.any:
        return
    if not machine.devices and "cpu" in (places.optimizer, places.parameters):
        used = " ".join(name for name in _HOST_KEYS if getattr(config, name))
        message = "offload to host memory frees nothing here: without a GPU all of it is host memory already"
        yield finding("info", "offload_cpu", used, message, f"set {used.split()[0]}=false")
    if not places.nvme:
        return
    keys = " ".join(name for name in _NVME_KEYS if getattr(config, name))
    if config.nvme_offload_parameters and config.precision == "auto" and resolved_precision(config, machine) not in _SHORT:
        yield _wide_weights(resolved_precision(config, machine))
    if problem := async_io_problem():
        yield finding("error", "async_io", keys, f"offload to disk: {problem[0]}", problem[1])
    yield from _disk(config, machine, places, keys)


def _disk(config: Config, machine: Machine, places: Offload, keys: str) -> Iterator[Finding]:
    folder = existing_parent(Path(config.nvme_path).expanduser())
    model = model_config(config)
    share = -(-parameter_counts(model).stored // world_size(config, machine)) * ranks_per_node(config, machine)
    # fp32 masters, two moments and a gradient; 16-bit weights
    need = share * (16 * (places.optimizer == "nvme") + 2 * (places.parameters == "nvme"))
    free = shutil.disk_usage(folder).free
    if need > free:
        message = f"nvme_path = {config.nvme_path}: {gb_text(need)} needed (computed), {gb_text(free)} are free"
        yield finding("error", "nvme_room", f"nvme_path {keys}", message, "free some disk, or set nvme_path to another one")
    if (kind := file_system(folder)) in _MEMORY_FILE_SYSTEMS:
        message = f"nvme_path = {config.nvme_path}: {kind} is memory, so offload there frees nothing"
        yield finding("warning", "nvme_tmpfs", f"nvme_path {keys}", message, "set nvme_path to a folder on a local disk")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    largest = -(-largest_parameter(model) // world_size(config, machine))
    locked = largest * (16 * (places.optimizer == "nvme") + 10 * (places.parameters == "nvme"))  # 4 and 5 buffers
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY and locked > limit:
        message = f"offload to disk: {gb_text(locked)} of memory must be locked, ulimit -l allows {gb_text(limit)}"
        yield finding("error", "memlock", keys, message, "raise it: ulimit -l unlimited, or memlock in limits.conf")


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def async_io_problem() -> tuple[str, str] | None:
    """Why DeepSpeed's async_io cannot be had here, and what to do; None where it is built already, or can be."""
    package = find_spec("deepspeed")
    if package is None or package.origin is None:
        return "deepspeed is not installed", "pip install 'deepspeed>=0.19'"
    if list((Path(package.origin).parent / "ops" / "aio").glob("async_io_op*.so")):
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "async_io has to be compiled, and there is no g++ on PATH", "install g++"
    if find_spec("ninja") is None and shutil.which("ninja") is None:
        return "async_io has to be compiled, and there is no ninja", "pip install ninja"
    words = [compiler, "-x", "c++", "-", "-o", os.devnull, "-laio"]
    try:
        done = subprocess.run(words, input=_AIO_PROGRAM, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"async_io has to be compiled, and {compiler} fails: {error}", "mend the compiler"
    if done.returncode:
        return "async_io needs libaio with its header, and neither is found", "install libaio-dev (libaio-devel)"
    return None
