"""Two machines on this machine: network namespaces joined by a veth pair, each with an address and an sshd (root only).

Nothing of them touches the real network: there is no way out of the pair. Names carry the pid of the test; `Machines.close`
removes them, also after a failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.waiting import until

_NEEDED = ("ip", "ssh", "ssh-keygen")
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)


def missing() -> str | None:
    """Why there can be no such machines here, None if there can."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    absent = [name for name in _NEEDED if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
    if absent:
        return f"needs {', '.join(absent)} (apt install iproute2 openssh-server)"
    probe = f"lt{os.getpid()}p"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "needs network namespaces: `ip netns add` is refused"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Machines:
    """The machines 10.77.0.1 and 10.77.0.2, which reach each other by ssh without a question.

    Args:
        folder: for keys and configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"lt{os.getpid()}n{number}" for number in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            self._wire()
            self._keys()
            for name in self.names:
                self._sshd(name)
            for address in self.addresses:
                until(lambda address=address: self._answers(address), f"sshd of {address}")
        except BaseException:
            self.close()
            raise

    def _ip(self, *words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    def _wire(self) -> None:
        for name in self.names:
            self._ip("netns", "add", name)
        one, two = self.names  # born in the namespaces: the real one never has them
        self._ip("-n", one, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", two)
        for name, address in zip(self.names, self.addresses, strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def _keys(self) -> None:
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        public = (self.folder / "host.pub").read_text().split()[:2]
        known = "".join(f"{address} {' '.join(public)}\n" for address in self.addresses)
        (self.folder / "known").write_text(known)
        lines = [f"UserKnownHostsFile {self.folder}/known", f"IdentityFile {self.folder}/user", "IdentitiesOnly yes"]
        (self.folder / "config").write_text("Host *\n" + "".join(f"  {line}\n" for line in lines))
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "ssh"  # ssh takes its configuration from the passwd home, not from $HOME
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/config "$@"\n')
        wrapper.chmod(0o700)
        server = [
            "Port 22",
            f"HostKey {self.folder}/host",
            f"AuthorizedKeysFile {self.folder}/user.pub",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
        ]
        (self.folder / "sshd").write_text("".join(f"{line}\n" for line in server))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)

    def _sshd(self, name: str) -> None:
        assert SSHD is not None
        log = (self.folder / f"{name}.log").open("wb")
        argv = ["ip", "netns", "exec", name, SSHD, "-D", "-e", "-f", str(self.folder / "sshd")]
        self._children.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))
        log.close()

    def _answers(self, address: str) -> bool:
        command = self.inside(0, ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", address, "true"])
        return subprocess.run(command, env=self.environment(), capture_output=True).returncode == 0

    def inside(self, number: int, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on a machine."""
        return ["ip", "netns", "exec", self.names[number], *words]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Ours, with an ssh that knows the machines."""
        return {**os.environ, "PATH": f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}", **(more or {})}

    def cut(self, how: str) -> None:
        """Part the machines. `link`: the second one's interface goes down. `silent`: the wire swallows all, nobody is told."""
        if how == "link":
            self._ip("-n", self.names[1], "link", "set", "eth0", "down")
            return
        for name, other in zip(self.names, reversed(self.addresses), strict=True):  # frames for a card that nobody has
            self._ip("-n", name, "neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")

    def processes(self, number: int) -> list[int]:
        """The processes of a machine, by their network namespace."""
        answer = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        return [int(word) for word in answer.stdout.split()]

    def running(self, number: int, module: str) -> list[int]:
        """The processes on a machine that run this module: an agent, a rank."""
        found = []
        for pid in self.processes(number):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if module.encode() in words:
                found.append(pid)
        return found

    def close(self) -> None:
        """Kill everything on the machines and remove them."""
        for number in range(len(self.names)):
            for pid in self.processes(number):
                try:
                    os.kill(pid, signal.SIGKILL)  # in a namespace that we made: nobody else's
                except ProcessLookupError:
                    continue
        for child in self._children:
            child.kill()
            child.wait()
        for name in self.names:
            self._ip("netns", "del", name, check=False)
