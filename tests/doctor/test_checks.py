"""Each check of the machine, sound and with a fault put into what it looks at."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lumina_engine.doctor import devices, disk, host, network, packages, sockets, supervision
from lumina_engine.doctor.checks import CHECKS
from lumina_engine.doctor.row import GROUPS
from lumina_engine.doctor.system import Output, System

UNLIMITED = resource.RLIM_INFINITY
GB = 10**9


def system_at(tmp_path: Path, files: dict[str, str] | None = None, **changes) -> System:
    """A machine whose /proc, /sys and /etc are `files` below a folder of the test; sound where nothing is changed."""
    root = tmp_path / "root"
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root.mkdir(parents=True, exist_ok=True)
    (tmp_path / "s").mkdir(mode=0o755, exist_ok=True)
    sound = {
        "environ": {"PATH": str(tmp_path / "bin"), "USER": "ada"},
        "runs": tmp_path / "runs",
        "cache": tmp_path / "cache",
        "tmp": tmp_path,
        "sockets": tmp_path / "s" / "sockets",
        "root": root,
        "nvml": lambda: None,
        "rlimit": lambda what: (UNLIMITED, UNLIMITED),
        "statvfs": lambda path: space(500 * GB),
        "clock_status": lambda: 0,
    }
    return System(**{**sound, **changes})


def space(free: int, files: int = 10**6) -> os.statvfs_result:
    return os.statvfs_result((4096, 1, 1000 * GB, free, free, 10**6, files, files, 0, 255))


def results(function, system: System) -> dict[str, tuple[str, str, str]]:
    """(status, value, fix) by part."""
    return {result.part: (result.status, result.value, result.fix) for result in function(system)}


def program(tmp_path: Path, name: str, text: str = "#!/bin/sh\necho fine 1.0\n") -> None:
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# python and packages


def test_python_is_old(tmp_path):
    assert results(packages.python, system_at(tmp_path))[""][0] == "ok"
    status, value, fix = results(packages.python, system_at(tmp_path, python=(3, 9, 7)))[""]
    assert status == "fail" and "3.9.7" in value and "3.10" in fix


@pytest.mark.parametrize(
    ("version", "bounds", "good"),
    [
        ("2.10.0+cpu", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("5.3.2", "<6,>=5.3.2", True),
        ("6.0", "<6,>=5.3.2", False),
        ("8.2.8", "==8.2.8", True),
        ("8.2.9", "==8.2.8", False),
        ("1.0", "", True),
        ("3.0rc1", ">=3", True),
        ("v2.0.0", "==2", True),
        ("2.1", "!=2.1", False),
        ("nonsense", ">=1", False),
    ],
)
def test_c114_versions_against_bounds(version, bounds, good):
    assert packages.within(version, bounds) is good


def test_versions_agree_with_packaging():
    specifiers = pytest.importorskip("packaging.specifiers")
    for bounds in (">=2.10", "<6,>=5.3.2", "==8.2.8", ">1,<=2.5", "!=3"):
        for version in ("0.9", "1", "1.0.1", "2.5", "2.10", "2.10.3", "3", "5.3.2", "5.99", "6", "8.2.8", "10"):
            assert packages.within(version, bounds) is (version in specifiers.SpecifierSet(bounds)), (version, bounds)


def test_c111_a_package_is_missing_or_old(tmp_path):
    requirements = ["torch>=2.10", "numpy>=1.26", "pytest>=8; extra == 'test'", "textual==8.2.8"]
    versions = {"torch": "2.9.0", "textual": "8.2.8"}
    found = results(packages.packages, system_at(tmp_path, requirements=lambda: requirements, version=versions.get))
    assert set(found) == {"torch", "numpy", "textual"}
    assert found["torch"] == ("fail", "2.9.0, >=2.10 is needed", "pip install 'torch>=2.10'")
    assert found["numpy"][0] == "fail" and "not installed" in found["numpy"][1]
    assert found["textual"][0] == "ok"
    assert results(packages.packages, system_at(tmp_path, requirements=lambda: None))[""][0] == "warn"


def test_the_bounds_checked_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    wanted = {packages._REQUIREMENT.fullmatch(line)[1].lower() for line in tomllib.loads(text)["project"]["dependencies"]}
    system = System.here()
    assert {result.part.lower() for result in packages.packages(system)} == wanted


def answering(**outputs: Output):
    """`call` that answers the probes."""
    return lambda argv, limit: outputs[argv[-1]]


TORCH = (
    '{"version": "2.13.0+cu128", "cuda": "12.8", "hip": null, "threads": 2, "products": {"float32": true, "bfloat16": true},'
    ' "gloo": "", "devices": [{"name": "H100", "capability": [9, 0], "product": 16.0}], "nccl": "2.27.3", "flash": true}'
)


@pytest.mark.parametrize(
    ("output", "status", "part", "word"),
    [
        (Output(0, "noise\n" + TORCH, ""), "ok", "", "CUDA 12.8"),
        (Output(1, "", "Traceback\nModuleNotFoundError: No module named 'torch'"), "fail", "", "No module named 'torch'"),
        (Output(None, "", "no end after 110 s"), "fail", "", "no end after"),
        (Output(-11, "", ""), "fail", "", "it said nothing"),
        (Output(0, "[1]", ""), "fail", "", "import torch"),
        (Output(0, TORCH.replace('"bfloat16": true', '"bfloat16": false'), ""), "fail", "", "wrong product in bfloat16"),
        (Output(0, TORCH.replace('"gloo": ""', '"gloo": "no address"'), ""), "warn", "gloo", "no address"),
    ],
)
def test_torch(tmp_path, output, status, part, word):
    found = results(packages.torch, system_at(tmp_path, call=answering(torch=output)))[part]
    assert found[0] == status and word in found[1]


def test_deepspeed_and_its_operators(tmp_path):
    def check(text, code=0, err=""):
        return results(packages.deepspeed, system_at(tmp_path, call=answering(deepspeed=Output(code, text, err))))

    head = '{"version": "0.19.8", "accelerator": "cuda", "operators": %s}'
    assert check(head % "{}")["operators"][0] == "ok"
    lazy = check(head % '{"cpu_adam": {"built": false, "compatible": true}}')["operators"]
    assert lazy[0] == "ok" and "compiled at first use: cpu_adam" in lazy[1]
    lost = check(head % '{"cpu_adam": {"built": false, "compatible": false}}')["operators"]
    assert lost[0] == "warn" and "cpu_adam" in lost[1]
    assert check("", 1, "ImportError: libcuda.so")[""][0] == "fail"
    gone = results(packages.deepspeed, system_at(tmp_path, call=lambda argv, limit: (_ for _ in ()).throw(OSError("no fork"))))
    assert gone[""][0] == "fail" and "no fork" in gone[""][1]


def test_compiler_and_ninja(tmp_path):
    found = results(packages.compiler, system_at(tmp_path, version=lambda name: None))
    assert found[""][0] == found["ninja"][0] == "warn" and "build-essential" in found[""][2]
    program(tmp_path, "g++")
    program(tmp_path, "ninja")
    found = results(packages.compiler, system_at(tmp_path))
    assert found[""][:2] == ("ok", f"{tmp_path}/bin/g++, fine 1.0") and found["ninja"][0] == "ok"
    program(tmp_path, "g++", "#!/bin/sh\necho broken >&2; exit 3\n")
    assert "broken" in results(packages.compiler, system_at(tmp_path))[""][1]


class Library:
    """Two GPUs as pynvml tells them."""

    NVML_TEMPERATURE_GPU = NVML_PCIE_UTIL_RX_BYTES = NVML_PCIE_UTIL_TX_BYTES = 0

    class NVMLError(Exception):
        pass

    def __init__(self, used: int = 2 * GB, capability: tuple[int, int] = (9, 0)) -> None:
        self.used, self.capability = used, capability

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GB, used=self.used),
            "nvmlDeviceGetCudaComputeCapability": self.capability,
            "nvmlDeviceGetTemperature": 50,
            "nvmlSystemGetDriverVersion": "570.1",
            "nvmlSystemGetCudaDriverVersion": 12080,
        }
        if name not in answers:
            raise_it = self.NVMLError

            def refused(*args):
                raise raise_it("not supported")

            return refused
        return lambda *args: answers[name]


def nvml(**changes):
    from lumina_engine.monitoring.hardware import Nvml

    return lambda: Nvml(Library(**changes))


CARD = {"/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n", "/sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n"}


def test_driver(tmp_path):
    assert results(devices.driver, system_at(tmp_path))[""][:2] == ("ok", "no NVIDIA GPU: runs use the processor")
    found = results(devices.driver, system_at(tmp_path, nvml=nvml()))
    assert found[""][:2] == ("ok", "driver 570.1, CUDA 12.8, 2 GPUs") and "78 of 80 GB free" in found["gpu1"][1]
    assert results(devices.driver, system_at(tmp_path, nvml=nvml(used=60 * GB)))["gpu0"][0] == "warn"
    old = results(devices.driver, system_at(tmp_path, nvml=nvml(capability=(7, 5))))["gpu0"]
    assert old[0] == "warn" and "no bf16" in old[1]
    hidden = results(devices.driver, system_at(tmp_path, nvml=nvml(), environ={"CUDA_VISIBLE_DEVICES": ""}))[""]
    assert hidden[0] == "warn" and "CUDA_VISIBLE_DEVICES" in hidden[1]
    silent = results(devices.driver, system_at(tmp_path, CARD))[""]
    assert silent[0] == "fail" and "1 NVIDIA card on the bus" in silent[1]


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        (("", ""), "ok", "works on 1 GPU, flash attention built in"),
        (('"cuda": "12.8"', '"cuda": "13.0"'), "fail", "the driver offers 12.8"),
        (('"cuda": "12.8"', '"cuda": null'), "fail", "without CUDA"),
        (('[{"name": "H100", "capability": [9, 0], "product": 16.0}]', "[]"), "fail", "sees no GPU"),
        (("16.0", "3.0"), "fail", "wrong products on GPU 0"),
    ],
)
def test_cuda_build_against_the_driver(tmp_path, change, status, word):
    output = Output(0, TORCH.replace(*change) if change[0] else TORCH, "")
    found = results(devices.cuda, system_at(tmp_path, nvml=nvml(), call=answering(torch=output)))
    assert found[""][0] == status and word in found[""][1]
    assert results(devices.cuda, system_at(tmp_path))[""][0] == "skipped"


def test_nccl_is_missing(tmp_path):
    two = TORCH.replace("[{", '[{"name": "H100", "capability": [9, 0], "product": 16.0}, {')
    found = results(devices.cuda, system_at(tmp_path, nvml=nvml(), call=answering(torch=Output(0, two, ""))))
    assert found["nccl"][:2] == ("ok", "NCCL 2.27.3")
    none = two.replace('"2.27.3"', "null")
    assert (
        results(devices.cuda, system_at(tmp_path, nvml=nvml(), call=answering(torch=Output(0, none, ""))))["nccl"][0] == "fail"
    )


def test_cuda_home(tmp_path):
    assert results(packages.cuda_home, system_at(tmp_path))[""][0] == "skipped"
    environ = {"PATH": "", "CUDA_HOME": str(tmp_path / "nothing")}
    found = results(packages.cuda_home, system_at(tmp_path, nvml=nvml(), environ=environ))[""]
    assert found[0] == "warn" and "has no bin/nvcc" in found[1]
    program(tmp_path, "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old = system_at(tmp_path, nvml=nvml(), version=lambda name: "2.13.0+cu128")
    assert results(packages.cuda_home, old)[""][0] == "warn"
    same = system_at(tmp_path, nvml=nvml(), version=lambda name: "2.13.0+cu118")
    assert results(packages.cuda_home, same)[""][:2] == ("ok", f"{tmp_path}/bin/nvcc, CUDA 11.8")


def test_processor(tmp_path):
    fast = {"/proc/cpuinfo": "model name\t: Big\nflags\t\t: sse avx2 avx512f avx512_bf16 amx_bf16\n"}
    found = results(devices.cpu, system_at(tmp_path, fast))[""]
    assert found[0] == "ok" and "AVX2, AVX-512, bf16, AMX" in found[1]
    slow = results(devices.cpu, system_at(tmp_path, {"/proc/cpuinfo": "model name\t: Old\nflags\t\t: sse2\n"}))[""]
    assert slow[0] == "warn" and "AVX2" in slow[2]
    assert results(devices.cpu, system_at(tmp_path / "arm", {"/proc/cpuinfo": "Features\t: fp asimd bf16\n"}))[""][0] == "ok"
    assert results(devices.cpu, system_at(tmp_path / "none"))[""][0] == "ok"


# host


@pytest.mark.parametrize(
    ("total", "free", "limit", "status"),
    [(64, 60, "max", "ok"), (8, 7, "max", "warn"), (64, 1, "max", "fail"), (64, 60, str(4 * GB), "warn")],
)
def test_memory(tmp_path, total, free, limit, status, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total * GB))
    files = {
        "/proc/meminfo": f"MemTotal: {total * GB // 1024} kB\nMemAvailable: {free * GB // 1024} kB\n",
        "/sys/fs/cgroup/memory.max": limit,
    }
    found = results(host.memory, system_at(tmp_path, files))[""]
    assert found[0] == status and ("container" in found[1]) is (limit != "max")


def test_shared_memory(tmp_path):
    assert results(host.shared_memory, system_at(tmp_path))[""][0] == "ok"
    small = results(host.shared_memory, system_at(tmp_path, statvfs=lambda path: space(64 << 20)))[""]
    assert small[0] == "warn" and "--shm-size" in small[2]
    none = results(host.shared_memory, system_at(tmp_path, statvfs=os.statvfs))[""]
    assert none[0] == "warn" and "No such file" in none[1]


def test_limits(tmp_path):
    assert {entry[0] for entry in results(host.limits, system_at(tmp_path)).values()} == {"ok"}
    tight = {resource.RLIMIT_NOFILE: (100, 200), resource.RLIMIT_MEMLOCK: (65536, 65536), resource.RLIMIT_NPROC: (100, 100)}
    found = results(host.limits, system_at(tmp_path, {"/sys/class/infiniband/mlx5_0/x": ""}, rlimit=tight.__getitem__))
    assert [found[part][0] for part in ("files", "locked", "processes")] == ["fail", "warn", "warn"]
    assert "ulimit -n" in found["files"][2]
    few = results(host.limits, system_at(tmp_path, {"/sys/fs/cgroup/pids.max": "64\n"}))["processes"]
    assert few[0] == "warn" and few[1].startswith("64 ")
    assert results(host.limits, system_at(tmp_path, rlimit=lambda what: (1000, 1000)))["files"][0] == "warn"


class Clock:
    """Time as a test wants it; the wall clock moves by `jump` more than the steady one in each sleep."""

    def __init__(self, wall: float, jump: float = 0.0) -> None:
        self.wall, self.steady, self.jump = wall, 0.0, jump

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def sleep(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds + self.jump


def test_clock(tmp_path):
    now = Path(host.__file__).stat().st_mtime + 1000
    good = results(host.clock, system_at(tmp_path, now=Clock(now)))
    assert good[""][0] == good["ntp"][0] == "ok"
    jumping = results(host.clock, system_at(tmp_path, now=Clock(now, 30.0)))[""]
    assert jumping[0] == "fail" and "jumped by 30.0 s" in jumping[1]
    assert results(host.clock, system_at(tmp_path, now=Clock(0.0)))[""][0] == "fail"
    assert results(host.clock, system_at(tmp_path, clock_status=lambda: 0x40))["ntp"][0] == "warn"
    assert results(host.clock, system_at(tmp_path, clock_status=lambda: None))["ntp"][0] == "skipped"
    daemon = {"/run/systemd/timesync/synchronized": ""}
    assert results(host.clock, system_at(tmp_path, daemon, clock_status=lambda: 0x40))["ntp"][:2] == (
        "ok",
        "synchronised by timesyncd",
    )


# disk


def mounts(tmp_path: Path, kind: str) -> dict[str, str]:
    here = os.path.realpath(tmp_path)
    table = f"21 1 8:1 / / rw - ext4 /dev/sda rw\n22 21 0:5 / {here} rw,nosuid shared:3 - {kind} x rw\n"
    return {"/proc/self/mountinfo": table}


@pytest.mark.parametrize(
    ("kind", "free", "files", "status", "word"),
    [
        ("ext4", 500 * GB, 10**6, "ok", "write, fsync, rename and lock work"),
        ("ext4", 5 * GB, 10**6, "warn", "5.0 of"),
        ("ext4", GB // 2, 10**6, "fail", "0.5 of"),
        ("ext4", 500 * GB, 50, "fail", "50 more files"),
        ("nfs4", 500 * GB, 10**6, "warn", "network file system"),
        ("fuse.sshfs", 500 * GB, 10**6, "warn", "network file system"),
        ("tmpfs", 500 * GB, 10**6, "warn", "in memory"),
        ("overlay", 500 * GB, 10**6, "warn", "inside the container"),
    ],
)
def test_disk_of_the_runs(tmp_path, kind, free, files, status, word):
    system = system_at(tmp_path, mounts(tmp_path, kind), statvfs=lambda path: space(free, files))
    found = results(disk.runs_folder, system)[""]
    assert found[0] == status and word in found[1] and kind in found[1]
    assert status == "ok" or "LUMINA_RUNS" in found[2]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".lumina-doctor*"))


def test_cache_and_tmp_may_be_in_memory(tmp_path):
    system = system_at(tmp_path, mounts(tmp_path, "tmpfs"))
    assert results(disk.cache_folder, system)[""][0] == results(disk.tmp_folder, system)[""][0] == "ok"


@pytest.mark.parametrize("step", ["open", "fsync", "rename", "lockf"])
def test_a_folder_that_cannot_be_used(tmp_path, step, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    target = {"open": "os.open", "fsync": "os.fsync", "rename": "pathlib.Path.rename", "lockf": "fcntl.lockf"}[step]
    monkeypatch.setattr(target, refuse)
    found = results(disk.tmp_folder, system_at(tmp_path))[""]
    assert found[0] == "fail" and "Read-only file system" in found[1]
    monkeypatch.undo()
    assert not list(tmp_path.glob(".lumina-doctor*"))


def test_a_lock_that_others_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", lambda *args: None)
    found = results(disk.tmp_folder, system_at(tmp_path))[""]
    assert found[0] == "fail" and "not seen by others" in found[1]


# sockets, supervision, network


def test_sockets(tmp_path):
    short = Path("/tmp") / f"lumina-test-doctor-{os.getpid()}"
    system = system_at(tmp_path, sockets=short)
    assert results(sockets.socket_path, system)[""][0] == "ok"
    assert results(sockets.socket_round_trip, system)[""][0] == "ok"
    assert not short.exists()
    long = system_at(tmp_path, sockets=tmp_path / ("x" * 100))
    assert results(sockets.socket_path, long)[""][0] == results(sockets.socket_round_trip, long)[""][0] == "fail"
    assert "LUMINA_SOCKETS" in results(sockets.socket_path, long)[""][2]
    assert results(sockets.socket_path, replace(system, sockets=Path("/nowhere/s")))[""][0] == "fail"
    short.mkdir(mode=0o777)
    try:
        short.chmod(0o777)
        opened = results(sockets.socket_round_trip, system)[""]
        assert opened[0] == "fail" and "open to other users" in opened[1]
        inside = replace(system, sockets=short / "s")
        assert results(sockets.socket_path, inside)[""][0] == "warn"
    finally:
        short.rmdir()


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({}, "ok"),
        ({"/run/systemd/system/x": ""}, "ok"),
        ({"/run/systemd/system/x": "", "/etc/systemd/logind.conf": "#KillUserProcesses=yes\n"}, "ok"),
        ({"/run/systemd/system/x": "", "/etc/systemd/logind.conf": "[Login]\nKillUserProcesses=yes\n"}, "warn"),
        (
            {
                "/run/systemd/system/x": "",
                "/etc/systemd/logind.conf": "KillUserProcesses=yes\n",
                "/etc/systemd/logind.conf.d/a.conf": "KillUserProcesses=no\n",
            },
            "ok",
        ),
        (
            {
                "/run/systemd/system/x": "",
                "/etc/systemd/logind.conf": "KillUserProcesses=yes\n",
                "/var/lib/systemd/linger/ada": "",
            },
            "ok",
        ),
    ],
)
def test_logout_and_lingering(tmp_path, files, status):
    found = results(supervision.logout, system_at(tmp_path, files))[""]
    assert found[0] == status
    assert status == "ok" or found[2] == "loginctl enable-linger ada"


def test_control_group_and_container(tmp_path):
    assert results(supervision.control_group, system_at(tmp_path))[""][0] == "skipped"
    files = {
        "/proc/self/cgroup": "0::/user.slice\n",
        "/sys/fs/cgroup/user.slice/cgroup.controllers": "",
        "/sys/fs/cgroup/user.slice/memory.max": f"{8 * GB}\n",
        "/sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/user.slice/pids.max": "max\n",
        "/sys/fs/cgroup/user.slice/memory.events": "oom 0\noom_kill 0\n",
    }
    assert results(supervision.control_group, system_at(tmp_path, files))[""][:2] == ("ok", "memory 8.0 GB, 1.5 cores")
    files["/sys/fs/cgroup/user.slice/memory.events"] = "oom 3\noom_kill 2\n"
    killed = results(supervision.control_group, system_at(tmp_path, files))[""]
    assert killed[0] == "warn" and "2 processes were killed" in killed[1]
    assert results(supervision.container, system_at(tmp_path))[""][1] == "none"
    inside = results(supervision.container, system_at(tmp_path, {"/.dockerenv": "", "/proc/1/comm": "bash\n"}))[""]
    assert inside[1].startswith("docker, process 1 is bash") and "--init" in inside[2]


def test_hostname_and_launchers(tmp_path):
    name = {"/proc/sys/kernel/hostname": "node7\n"}
    assert results(network.hostname, system_at(tmp_path, name))[""][0] == "warn"
    hosts = {**name, "/etc/hosts": "127.0.0.1 localhost\n10.0.0.7 node7.lan NODE7 # node8\n"}
    assert results(network.hostname, system_at(tmp_path, hosts))[""][:2] == ("ok", "node7 is 10.0.0.7")
    switch = {**name, "/etc/hosts": "", "/etc/nsswitch.conf": "passwd: files\nhosts: files myhostname dns\n"}
    assert results(network.hostname, system_at(tmp_path, switch))[""][0] == "ok"
    assert results(network.launchers, system_at(tmp_path))["pdsh"][0] == "skipped"
    program(tmp_path, "pdsh")
    assert results(network.launchers, system_at(tmp_path))["pdsh"][:2] == ("ok", f"{tmp_path}/bin/pdsh")


def test_loopback_only(tmp_path, monkeypatch):
    seen = []
    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: seen.append(address) or original(self, address))
    assert results(network.loopback, system_at(tmp_path))[""][0] == "ok"
    assert seen and all(address[0] == "127.0.0.1" for address in seen)

    def refuse(*args, **kwargs):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert results(network.loopback, system_at(tmp_path))[""][0] == "fail"


def test_ssh_hint(tmp_path):
    assert results(network.ssh, system_at(tmp_path))[""] == ("ok", "no SSH login", "")
    found = results(network.ssh, system_at(tmp_path, environ={"SSH_CONNECTION": "10.0.0.1 5 10.0.0.2 22"}))[""]
    assert "10.0.0.1" in found[1] and "ssh -C" in found[2] and "tmux" in found[2]


@pytest.mark.parametrize(
    ("environ", "term", "charset"),
    [
        ({"TERM": "xterm-256color", "LANG": "de_DE.UTF-8"}, "ok", "ok"),
        ({"TERM": "dumb"}, "skipped", "warn"),
        ({"TERM": "vt100", "LANG": "en_US.UTF-8", "LC_ALL": "C"}, "ok", "warn"),
        ({}, "skipped", "warn"),
    ],
)
def test_terminal_without_a_screen(tmp_path, environ, term, charset):
    system = system_at(tmp_path, environ=environ)
    assert results(network.term, system)[""][0] == term
    assert results(network.charset, system)[""][0] == charset


def test_the_table(tmp_path):
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids)) and not any("." in id for id in ids)
    for check in CHECKS:
        assert check.group in GROUPS and check.about.endswith("."), check.id
