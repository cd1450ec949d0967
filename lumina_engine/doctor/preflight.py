"""Before a run over several machines: can each be reached, is it the same there, do the ranks meet."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.launchers import REMOTE, agent_words
from .probe import probe
from .row import Row

if TYPE_CHECKING:
    from ..config.schema import Config

ANSWER_TIME = 60.0  # s that a machine gets to answer
MEET_TIME = 120.0  # s that the ranks get to meet
MOST_SKEW = 2.0  # s between two clocks: records and backups go by them
_SMOKE = "lumina_engine.training.smoke"


def preflight(config: Config, hosts: Sequence[str], root: Path, *, by: str, meet: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows as they are known.

    Args:
        config: resolved. hosts: names of the machines, this one first. root: folder of the runs.
        by: ssh or srun.
        meet: command that lets all ranks meet (`rank_argv` with `smoke_command`); None leaves that out.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = root.absolute() / f".preflight-{secrets.token_hex(6)}"
    token.touch(mode=0o600, exist_ok=False)
    order = {"config": config.to_dict(sectioned=False), "token": str(token)}
    failed = False
    try:
        mine = probe(order)
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            for rows in pool.map(lambda host: list(_machine(host, by, order, mine)), hosts[1:]):
                failed = failed or any(row.status == "fail" for row in rows)
                yield from rows
    finally:
        token.unlink(missing_ok=True)
    if meet is not None:
        if failed:
            yield Row("ranks", "network", "skipped", "the ranks were not started: mend the rows above first")
        else:
            yield _meeting(meet, root)


def smoke_command(argv: Sequence[str], worker: str) -> list[str]:
    """The ranks' command with the all-reduce in place of the worker."""
    place = list(argv).index(worker)
    return [*argv[:place], _SMOKE, *argv[place + 1 :]]


def _machine(host: str, by: str, order: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[Row]:
    argv = REMOTE[by](host, agent_words("lumina_engine.doctor.probe"))
    begin = time.time()
    told, why = _ask(argv, json.dumps(order) + "\n")
    if told is None:
        fix = f"`{by} {host} true` must work without a question, and Lumina must lie at the same path there: {sys.executable}"
        yield Row(f"reach.{host}", "network", "fail", f"no answer: {why}", fix)
        return
    end = time.time()
    yield Row(f"reach.{host}", "network", "ok", f"{told['host']} answered in {end - begin:.1f} s")
    names = sorted(set(mine["versions"]) | set(told["versions"]))
    pairs = [(name, told["versions"].get(name, "none"), mine["versions"].get(name, "none")) for name in names]
    other = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    same = ", ".join(f"{name} {here}" for name, _, here in pairs)
    if other:
        yield Row(f"versions.{host}", "python", "fail", "; ".join(other), "install the same versions on all machines")
    else:
        yield Row(f"versions.{host}", "python", "ok", f"the same: {same}")
    yield _data(host, told, mine)
    if told["folder"]:
        yield Row(f"folder.{host}", "disk", "ok", "sees the folder of the runs")
    else:
        fix = "set --runs (or LUMINA_RUNS) to a folder on a file system that all machines share, at the same path"
        yield Row(f"folder.{host}", "disk", "fail", "does not see the folder of the runs", fix)
    skew = max(begin - told["time"], told["time"] - end, 0.0)
    if skew > MOST_SKEW:
        yield Row(
            f"clock.{host}", "clock", "warn", f"its clock is at least {skew:.1f} s off ours", "run a time service on both"
        )
    else:
        yield Row(f"clock.{host}", "clock", "ok", f"agrees with ours within {end - begin + skew:.1f} s")


def _data(host: str, told: Mapping[str, Any], mine: Mapping[str, Any]) -> Row:
    fix = "set train_data_path to files that all machines see, with the same content"
    if "data_error" in mine or "data_error" in told:
        return Row(f"data.{host}", "disk", "fail", str(told.get("data_error") or f"here: {mine['data_error']}"), fix)
    if told["data"] != mine["data"]:
        return Row(f"data.{host}", "disk", "fail", f"other data: {told['data'][:16]} there, {mine['data'][:16]} here", fix)
    return Row(f"data.{host}", "disk", "ok", f"the same data: {told['data'][:16]}")


def _ask(argv: Sequence[str], text: str) -> tuple[dict[str, Any] | None, str]:
    """The answer, or None and why there is none."""
    try:
        done = subprocess.run(list(argv), input=text, capture_output=True, text=True, timeout=ANSWER_TIME)
    except subprocess.TimeoutExpired:
        return None, f"nothing within {ANSWER_TIME:g} s"
    except OSError as error:
        return None, f"{argv[0]}: {error.strerror}"
    for line in reversed(done.stdout.splitlines()):  # a login may greet first
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict) and "versions" in told:
                return told, ""
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["without a word"]
    return None, f"{argv[0]} ended with {done.returncode}: {last[0][:300]}"


def _meeting(argv: Sequence[str], root: Path) -> Row:
    fix = "set master_addr to an address that all machines reach, GLOO_SOCKET_IFNAME to its interface, and open its ports"
    try:
        done = subprocess.run(list(argv), cwd=root, capture_output=True, text=True, timeout=MEET_TIME)
    except subprocess.TimeoutExpired:
        return Row("ranks", "network", "fail", f"the ranks did not meet within {MEET_TIME:g} s", fix)
    for line in done.stdout.splitlines():
        if line.startswith("all-reduce") and done.returncode == 0:
            return Row("ranks", "network", "ok", line)
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:] or ["without a word"]
    return Row("ranks", "network", "fail", f"the ranks did not meet: {words[0][:300]}", fix)
