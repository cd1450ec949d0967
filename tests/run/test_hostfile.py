"""The list of machines, the names that are allowed, and Slurm's short form."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from lumina_engine.run import slurm
from lumina_engine.run.directory import RunError
from lumina_engine.run.hostfile import Host, check_host, choose, is_here, read_hostfile

BAD_HOSTS = (
    "-oProxyCommand=touch x",
    "a;touch x",
    "$(touch x)",
    "`touch x`",
    "a b",
    "a\n",
    "a\0b",
    "../a",
    "a/b",
    "user@a",
    "",
    "ü",
    "a" * 254,
)


def listed(tmp_path: Path, text: str | bytes) -> list[Host]:
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_hostfile(path)


def test_c061_a_hostfile_as_deepspeed_writes_it(tmp_path: Path) -> None:
    text = "# machines\n\nworker-1 slots=4\n  10.0.0.2\tslots=8   # the new one\r\nplain\n"
    assert listed(tmp_path, text) == [Host("worker-1", 4), Host("10.0.0.2", 8), Host("plain")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=4\nb slot=4\n", "hosts:2: 'slot=4' is not understood"),
        ("a slots=4 slots=5\n", "hosts:1: 'slots=5' is not understood"),
        ("a slots=0\n", "hosts:1: slots=0"),
        ("a slots=-1\n", "hosts:1: 'slots=-1' is not understood"),
        ("a\nb\na\n", "hosts:3: a stands in line 1 already"),
        ("# nobody\n", "names no machine"),
        (b"\xff\xfe", "no text"),
        (b"a" * (1 << 20) + b"b", "larger than"),
        ("a\0b slots=1\n", "hosts:1: .* is no host name"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: '-oProxyCommand=x' is no host name"),
    ],
)
def test_c061_a_hostfile_that_is_none_names_the_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        listed(tmp_path, text)
    assert caught.value.exit_code == 2


def test_c061_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize("name", BAD_HOSTS)
def test_se08_bad_hosts_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="is no host name") as caught:
        check_host(name, "here")
    assert caught.value.exit_code == 2


def test_c061_this_machine_comes_first() -> None:
    hosts = [Host("a", 4), Host("b", 4), Host("c", 4)]
    assert [host.name for host in choose(hosts, 2, 4, "f", lambda name: name == "c")] == ["c", "a"]
    for nodes, ranks, here, words in (
        (4, 1, "a", "lists 3"),
        (2, 8, "a", "4 slots"),
        (2, 1, "x", "does not list this machine"),
    ):
        with pytest.raises(RunError, match=words):
            choose(hosts, nodes, ranks, "f", lambda name, here=here: name == here)


def test_c061_a_machine_knows_its_own_names() -> None:
    assert is_here("localhost") and is_here(socket.gethostname()) and is_here("127.0.0.1")
    assert not is_here("192.0.2.1") and not is_here("no-such-name.invalid")


def test_c061_names_of_a_slurm_job() -> None:
    assert slurm.expand("n[01-03,7],login") == ["n01", "n02", "n03", "n7", "login"]
    assert slurm.expand("a") == ["a"] and slurm.expand("r[1-2]-x,b") == ["r1-x", "r2-x", "b"]
    for text in ("n[1-", "n[1-2]m[3]", "n[2-1]", "n[a]", "n[]", "[1-9999999999]", "-x", "a,,b", "n[0-100001]"):
        with pytest.raises(RunError):
            slurm.expand(text)


def test_c061_any_list_survives_slurms_short_form(fault_random: random.Random) -> None:
    for _ in range(200):
        width = fault_random.randint(1, 4)
        numbers = sorted({fault_random.randint(0, 10**width - 1) for _ in range(fault_random.randint(1, 9))})
        parts, names = [], []
        while numbers:
            last = numbers[0]
            while last + 1 in numbers:
                last += 1
            first = numbers[0]
            parts.append(f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else ""))
            names += [f"n{number:0{width}d}" for number in range(first, last + 1)]
            numbers = [number for number in numbers if number > last]
        assert slurm.expand(f"n[{','.join(parts)}]") == names
