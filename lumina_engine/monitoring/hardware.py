"""The machine: what it has (`detect`) and what it is doing (`Sampler`, `HardwareThread`). psutil, and NVML where there is one.

What cannot be measured is left out of a record, never guessed. In a container, memory and cores are those of its cgroup.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from . import cgroup as cgroup_memory
from . import record as rec
from .cgroup import core_count
from .say import say

if TYPE_CHECKING:
    from ..config.machine import Machine

_CGROUP = cgroup_memory.ROOT
_BF16_CAPABILITY = 8  # major compute capability from which bfloat16 is native (Ampere)


class Nvml:
    """The one place that talks to NVIDIA's management library.

    Args:
        library: the module `pynvml`, or something with its functions.

    Raises:
        OSError: there is no driver, or it does not answer.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._error: type[Exception] = library.NVMLError
        try:
            library.nvmlInit()
            self._handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        except self._error as error:
            raise OSError(f"NVML: {error}") from error

    @classmethod
    def open(cls) -> Nvml | None:
        """NVML of this machine, None without an NVIDIA driver."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            return cls(pynvml)
        except OSError:
            return None

    def visible(self, environment: str | None) -> list[int]:
        """The indices that CUDA_VISIBLE_DEVICES leaves, in its order; entries are numbers or the beginning of a UUID."""
        if environment is None:
            return list(range(len(self._handles)))
        chosen = []
        for entry in environment.split(","):
            entry = entry.strip()
            if re.fullmatch(r"\d+", entry) and int(entry) < len(self._handles):
                chosen.append(int(entry))
                continue
            matches = [index for index in range(len(self._handles)) if entry and self._uuid(index).startswith(entry)]
            if len(matches) != 1:
                break  # CUDA ignores what follows an invalid entry
            chosen += matches
        return chosen

    def driver_version(self) -> str | None:
        """The driver's version, None where it is not told."""
        return _decoded(self._system("nvmlSystemGetDriverVersion"))

    def cuda_version(self) -> tuple[int, int] | None:
        """(major, minor) of the newest CUDA that the driver runs, None where it is not told."""
        number = self._system("nvmlSystemGetCudaDriverVersion")
        return (number // 1000, number % 1000 // 10) if isinstance(number, int) else None

    def _system(self, function: str) -> Any:
        """One figure of the driver, None where it does not offer it."""
        try:
            return getattr(self._library, function)()
        except (self._error, AttributeError):
            return None

    def _uuid(self, index: int) -> str:
        return _decoded(self._value("nvmlDeviceGetUUID", index)) or ""

    def _value(self, function: str, index: int, *args: Any) -> Any:
        """One figure of a device, None where the device does not offer it."""
        try:
            return getattr(self._library, function)(self._handles[index], *args)
        except self._error:
            return None

    def name(self, index: int) -> str:
        """The product's name."""
        return _decoded(self._value("nvmlDeviceGetName", index)) or f"GPU {index}"

    def memory_bytes(self, index: int) -> int:
        """Total memory of a device."""
        memory = self._value("nvmlDeviceGetMemoryInfo", index)
        return int(memory.total) if memory is not None else 0

    def process_memory(self, pid: int) -> int | None:
        """Bytes that a process holds on all devices; None where that is not told (a container hides pids)."""
        found = [
            int(entry.usedGpuMemory)
            for index in range(len(self._handles))
            for entry in self._value("nvmlDeviceGetComputeRunningProcesses", index) or ()
            if entry.pid == pid and entry.usedGpuMemory is not None
        ]
        return sum(found) if found else None

    def has_bf16(self, index: int) -> bool:
        """Whether the device computes bfloat16 natively."""
        capability = self._value("nvmlDeviceGetCudaComputeCapability", index)
        return capability is not None and capability[0] >= _BF16_CAPABILITY

    def device(self, index: int) -> rec.Device:
        """What a device is doing now. Takes some 50 ms: PCIe throughput is measured while the call lasts."""
        library = self._library
        use = self._value("nvmlDeviceGetUtilizationRates", index)
        memory = self._value("nvmlDeviceGetMemoryInfo", index)
        power = self._value("nvmlDeviceGetPowerUsage", index)
        limit = self._value("nvmlDeviceGetEnforcedPowerLimit", index)
        temperature = self._value("nvmlDeviceGetTemperature", index, library.NVML_TEMPERATURE_GPU)
        received = self._value("nvmlDeviceGetPcieThroughput", index, library.NVML_PCIE_UTIL_RX_BYTES)
        sent = self._value("nvmlDeviceGetPcieThroughput", index, library.NVML_PCIE_UTIL_TX_BYTES)
        return rec.Device(
            index=index,
            name=self.name(index),
            utilisation=float(use.gpu) if use is not None else None,
            memory_used=int(memory.used) if memory is not None else None,
            memory_total=int(memory.total) if memory is not None else None,
            power=power / 1000 if power is not None else None,  # mW
            power_limit=limit / 1000 if limit is not None else None,
            temperature=float(temperature) if temperature is not None else None,
            link_rx=received * 1024.0 if received is not None else None,  # KiB/s
            link_tx=sent * 1024.0 if sent is not None else None,
        )


def _decoded(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def detect(path: str | os.PathLike[str] = ".", nvml: Nvml | None = None) -> Machine:
    """What this machine offers: visible GPUs, memory, usable cores, free disk at `path` (or its nearest existing parent)."""
    from ..config.machine import Accelerator, Machine

    nvml = nvml or Nvml.open()
    devices = []
    if nvml is not None:
        for index in nvml.visible(os.environ.get("CUDA_VISIBLE_DEVICES")):
            devices.append(Accelerator(nvml.name(index), nvml.memory_bytes(index), nvml.has_bf16(index)))
    return Machine(
        devices=devices, host_memory_bytes=memory_limit(), cpu_count=core_count(), disk_free_bytes=_disk(Path(path)).free
    )


def process_memory(name: str) -> int:
    """Bytes of this process by /proc: VmHWM, the peak of resident memory (getrusage would tell a large parent's), or VmPeak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def memory_limit(cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that this process may use: the machine's, or its cgroup's limit if that is lower."""
    total = int(psutil.virtual_memory().total)
    return min(total, cgroup_memory.limit(cgroup) or total)


def memory_in_use(cgroup: Path = _CGROUP) -> int | None:
    """Bytes in use of what `memory_limit` tells: the machine's, or its cgroup's if that has the lower limit.

    None where the cgroup does not tell: what the whole machine uses says nothing about the room in a group.
    """
    memory = psutil.virtual_memory()
    lowest = cgroup_memory.limiting_folder(cgroup)
    if lowest is not None and lowest[0] < memory.total:
        return cgroup_memory.in_use(lowest[1])
    return int(memory.total - memory.available)


def _disk(path: Path) -> Any:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place)


class Sampler:
    """Measures devices and host. Rates and shares are over the time since the sample before; the first one has none.

    Args:
        path: whose file system is shown.
        root: the process whose tree (itself and all below) counts for `rss`.
        nvml: None looks for the machine's own.
        cgroup: top of the tree of control groups.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = ".",
        root: int | None = None,
        nvml: Nvml | None = None,
        cgroup: Path = _CGROUP,
    ) -> None:
        self._path = Path(path)
        self._root = root or os.getpid()
        self.nvml = nvml or Nvml.open()
        self._devices = self.nvml.visible(os.environ.get("CUDA_VISIBLE_DEVICES")) if self.nvml is not None else []
        self._cores = core_count()
        self._cgroup = cgroup
        self._memory = memory_limit(cgroup)
        self._before: tuple[float, float, float, int, int] | None = None

    def sample(self) -> rec.Hardware:
        """One record, not yet emitted."""
        disk = _disk(self._path)
        now = self._counters()
        cpu = net_rx = net_tx = None
        if self._before is not None and now[0] > self._before[0]:
            seconds = now[0] - self._before[0]
            total = now[2] - self._before[2]
            cpu = min(100.0, max(0.0, 100.0 * (now[1] - self._before[1]) / total)) if total > 0 else None
            net_rx, net_tx = (max(0.0, (now[i] - self._before[i]) / seconds) for i in (3, 4))
        self._before = now
        return rec.Hardware(
            devices=[self.nvml.device(index) for index in self._devices] if self.nvml is not None else [],
            cpu=cpu,
            cpu_count=self._cores,
            memory_used=memory_in_use(self._cgroup),
            memory_total=self._memory,
            rss=tree_rss(self._root),
            disk_free=disk.free,
            disk_total=disk.total,
            net_rx=net_rx,
            net_tx=net_tx,
        )

    @staticmethod
    def _counters() -> tuple[float, float, float, int, int]:
        """(monotonic s, busy CPU s, all CPU s, bytes in, bytes out); loopback does not count as network."""
        times = psutil.cpu_times()
        total = sum(times[:8])  # what follows (guest) is contained in user
        idle = times.idle + getattr(times, "iowait", 0.0)
        cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        received, sent = sum(card.bytes_recv for card in cards), sum(card.bytes_sent for card in cards)
        return time.monotonic(), total - idle, total, received, sent


def tree_rss(root: int) -> int | None:
    """Resident bytes of a process and everything below it; None if it is gone. Shared pages count once per process."""
    try:
        top = psutil.Process(root)
        processes = [top, *top.children(recursive=True)]
    except psutil.Error:
        return None
    return sum(_rss(processes))


def _rss(processes: Iterable[psutil.Process]) -> list[int]:
    sizes = []
    for process in processes:
        try:
            sizes.append(int(process.memory_info().rss))
        except psutil.Error:
            continue  # ended in between: it holds nothing any more
    return sizes


class HardwareThread:
    """Emits a `hardware` record every `interval` seconds from a daemon thread. Rank 0 runs one; it alone writes the log.

    The tree whose memory counts starts at the supervisor (LUMINA_SUPERVISOR), or at this process without one.

    Args:
        emit: takes a record, from any thread (MetricLog.emit).
        interval: seconds between records.
        path: the run's folder, for the disk.
        sampler: something with `sample()`; None makes a Sampler.
    """

    def __init__(
        self,
        emit: Callable[[rec.Record], object],
        interval: float,
        path: str | os.PathLike[str] = ".",
        sampler: Sampler | None = None,
    ) -> None:
        self._emit = emit
        self._interval = interval
        self._sampler = sampler or Sampler(path, root=int(os.environ.get("LUMINA_SUPERVISOR") or os.getpid()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hardware", daemon=True)
        self._told = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; no record comes after this returns."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                record = self._sampler.sample()
            except (OSError, psutil.Error) as error:
                if not self._told:
                    self._told = True
                    say(f"lumina: the machine cannot be measured: {error}")
            else:
                self._emit(record)
            self._stop.wait(self._interval)
