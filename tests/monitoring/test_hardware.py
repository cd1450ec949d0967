"""What the machine has and does, with NVML behind a fake."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lumina_engine.monitoring import hardware
from lumina_engine.monitoring import record as rec
from lumina_engine.monitoring.hardware import HardwareThread, Nvml, Sampler, core_count, detect, memory_limit, tree_rss
from lumina_engine.monitoring.health.watch import HealthWatch


class FakeError(Exception):
    pass


class FakeNvml:
    """The functions of pynvml that are used. Device 1 is old and offers neither power nor PCIe figures."""

    NVMLError = FakeError
    NVML_TEMPERATURE_GPU = 0
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1

    def __init__(self, count: int = 2, broken: bool = False) -> None:
        self.count, self.broken = count, broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise FakeError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"NVIDIA H100" if handle == 0 else "Tesla V100"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ["GPU-aaaa-1", "GPU-bbbb-2"][handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80_000_000_000, used=(handle + 1) * 1_000_000)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return [(9, 0), (7, 0)][handle]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=97 - handle, memory=3)

    def _only_new(self, handle: int, value: int) -> int:
        if handle == 1:
            raise FakeError("Not Supported")
        return value

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._only_new(handle, 351_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._only_new(handle, 700_000)

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 61

    def nvmlDeviceGetPcieThroughput(self, handle: int, counter: int) -> int:
        return self._only_new(handle, [2, 3][counter])


def test_c131_devices_in_the_record_s_units() -> None:
    first, second = Sampler(nvml=Nvml(FakeNvml())).sample().devices
    assert first == rec.Device(
        index=0,
        name="NVIDIA H100",
        utilisation=97.0,
        memory_used=1_000_000,
        memory_total=80_000_000_000,
        power=351.5,
        power_limit=700.0,
        temperature=61.0,
        link_rx=3072.0,
        link_tx=2048.0,
    )
    assert (second.name, second.power, second.link_rx, second.temperature) == ("Tesla V100", None, None, 61.0)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1]), ("", []), ("1", [1]), ("1,0", [1, 0]), ("0,7,1", [0]), ("GPU-bbbb", [1]), ("GPU-", []), ("-1", [])],
)
def test_visible_devices(visible: str | None, indices: list[int]) -> None:
    assert Nvml(FakeNvml()).visible(visible) == indices


def test_c139_detect_with_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    machine = detect(tmp_path / "not" / "yet", Nvml(FakeNvml()))
    assert [(device.name, device.memory_bytes, device.bf16) for device in machine.devices] == [
        ("NVIDIA H100", 80_000_000_000, True),
        ("Tesla V100", 80_000_000_000, False),
    ]
    assert machine.host_memory_bytes > 0 and machine.cpu_count >= 1 and (machine.disk_free_bytes or 0) > 0


def test_no_driver_is_no_device() -> None:
    with pytest.raises(OSError, match="Driver Not Loaded"):
        Nvml(FakeNvml(broken=True))


def test_cgroup_limits(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory_limit(tmp_path) == 1_000_000
    assert core_count(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert core_count(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert core_count(tmp_path) == 1


def test_c093_in_a_group_with_a_limit_memory_in_use_is_the_group_s_and_not_the_host_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = SimpleNamespace(total=512 * 10**9, available=300 * 10**9)  # others use 212 GB of it
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    files = {"max": "64000000000\n", "current": "60000000000\n", "stat": "inactive_file 40000000000\nactive_file 5000000000\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    found = Sampler(cgroup=tmp_path).sample()
    assert (found.memory_used, found.memory_total) == (15 * 10**9, 64 * 10**9)
    assert HealthWatch().replay([found]) == []
    (tmp_path / "memory.stat").unlink()
    unknown = Sampler(cgroup=tmp_path).sample()
    assert (unknown.memory_used, unknown.memory_total) == (None, 64 * 10**9) and HealthWatch().replay([unknown]) == []
    (tmp_path / "memory.max").write_text("max\n")
    assert Sampler(cgroup=tmp_path).sample().memory_used == 212 * 10**9


def test_host_figures_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([(0.0, 10.0, 100.0, 1000, 0), (2.0, 11.0, 104.0, 3000, 500), (3.0, 10.0, 104.0, 0, 0)])
    monkeypatch.setattr(Sampler, "_counters", lambda self: next(counters))
    sampler = Sampler()
    first = sampler.sample()
    assert (first.cpu, first.net_rx) == (None, None), "no rate without a time before"
    second = sampler.sample()
    assert (second.cpu, second.net_rx, second.net_tx) == (25.0, 1000.0, 250.0)
    third = sampler.sample()
    assert (third.cpu, third.net_rx) == (None, 0.0), "a counter that starts again is no negative rate"
    assert second.memory_total and second.disk_free and second.rss and second.cpu_count


def test_rss_is_that_of_the_whole_tree() -> None:
    script = "import sys; held = bytearray(64 << 20); print(len(held), flush=True); sys.stdin.read()"
    before = tree_rss(os.getpid()) or 0
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        assert (tree_rss(os.getpid()) or 0) - before > 60 << 20
    finally:
        child.communicate()
    assert tree_rss(child.pid) is None


def test_thread_emits_until_stopped() -> None:
    got: list[rec.Record] = []
    enough = threading.Event()

    def emit(record: rec.Record) -> None:
        got.append(record)
        if len(got) >= 3:
            enough.set()

    thread = HardwareThread(emit, 0.001)
    thread.start()
    assert enough.wait(20)
    thread.stop()
    count = len(got)
    assert all(isinstance(record, rec.Hardware) for record in got)
    assert len(got) == count


def test_thread_survives_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    tried = threading.Event()

    class Broken(Sampler):
        calls = 0

        def sample(self) -> rec.Hardware:
            self.calls += 1
            if self.calls == 3:
                tried.set()
            raise psutil.AccessDenied(1)

    thread = HardwareThread(lambda record: pytest.fail("nothing to emit"), 0.001, sampler=Broken())
    thread.start()
    assert tried.wait(20)
    thread.stop()
    assert capsys.readouterr().err.count("cannot be measured") == 1


def test_a_machine_without_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.Nvml, "open", classmethod(lambda cls: None))
    assert detect().devices == []
    assert Sampler().sample().devices == []
