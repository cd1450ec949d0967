"""Checks of what could end a run together with the login: systemd-logind, control groups, containers."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator

from .row import Result, ok, skipped, warn
from .system import System

_CONFIGS = ("/usr/lib/systemd/logind.conf", "/etc/systemd/logind.conf")
_DROP_INS = ("/usr/lib/systemd/logind.conf.d", "/run/systemd/logind.conf.d", "/etc/systemd/logind.conf.d")


def kills_user_processes(system: System) -> bool:
    """Whether logind ends a user's processes at logout; the last setting read wins, as with logind."""
    files = [
        *_CONFIGS,
        *(f"{folder}/{name}" for folder in _DROP_INS for name in system.names(folder) if name.endswith(".conf")),
    ]
    value = "no"  # logind's own default
    for file in files:
        for match in re.finditer(r"^\s*KillUserProcesses\s*=\s*(\S+)", system.read(file) or "", re.MULTILINE):
            value = match[1].lower()
    return value in ("yes", "true", "1", "on")


def logout(system: System) -> Iterator[Result]:
    """Whether a run outlives its login: KillUserProcesses of logind, and lingering of this user."""
    if not system.has("/run/systemd/system"):
        yield ok("no systemd here: nothing ends runs at logout")
        return
    user = system.environ.get("USER") or _user()
    lingers = system.has(f"/var/lib/systemd/linger/{user}")
    if not kills_user_processes(system):
        yield ok(f"KillUserProcesses=no, lingering {'on' if lingers else 'off'}: runs outlive the login")
    elif lingers:
        yield ok("KillUserProcesses=yes, but lingering is on: runs outlive the login")
    else:
        yield warn("KillUserProcesses=yes without lingering: runs are killed at logout", f"loginctl enable-linger {user}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        return ""


def control_group(system: System) -> Iterator[Result]:
    """Limits of this process's control group: memory, processor and number of processes."""
    line = next((line for line in (system.read("/proc/self/cgroup") or "").splitlines() if line.startswith("0::")), "")
    own = line.removeprefix("0::").strip()
    folder = next(
        (f for f in (f"/sys/fs/cgroup{own}".rstrip("/"), "/sys/fs/cgroup") if system.has(f"{f}/cgroup.controllers")), None
    )
    if folder is None:
        yield skipped("no control groups of version 2 here")
        return
    figures = {name: (system.read(f"{folder}/{name}") or "").strip() for name in ("memory.max", "cpu.max", "pids.max")}
    said = []
    if figures["memory.max"].isdigit():
        said.append(f"memory {int(figures['memory.max']) / 1e9:.1f} GB")
    quota, _, period = figures["cpu.max"].partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        said.append(f"{int(quota) / int(period):.1f} cores")
    if figures["pids.max"].isdigit():
        said.append(f"{int(figures['pids.max']):,} processes")
    events = dict(
        line.split()[:2] for line in (system.read(f"{folder}/memory.events") or "").splitlines() if len(line.split()) > 1
    )
    kills = events.get("oom_kill", "0")
    text = ", ".join(said) or "no limits"
    if kills.isdigit() and int(kills):
        yield warn(f"{text}; {kills} processes were killed for memory", "raise the limit, or lower batch_size or seq_length")
    else:
        yield ok(text)


def container(system: System) -> Iterator[Result]:
    """Whether this is a container: a run ends with it."""
    groups = system.read("/proc/1/cgroup") or ""
    environment = system.environ.get("container", "")
    name = (
        "docker"
        if system.has("/.dockerenv")
        else "podman"
        if system.has("/run/.containerenv")
        else "kubernetes"
        if "KUBERNETES_SERVICE_HOST" in system.environ or "kubepods" in groups
        else environment
    )
    first = (system.read("/proc/1/comm") or "").strip()
    if not name:
        yield ok("none")
    elif first in ("bash", "sh", "zsh", "python", "python3"):
        yield ok(
            f"{name}, process 1 is {first}: runs end when it ends",
            "start the container with --init and leave it running (docker run -d)",
        )
    else:
        yield ok(f"{name}; runs end with the container")
