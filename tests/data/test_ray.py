"""C145, Shown by 8: `data prepare --engine ray` on 2 local workers gives the store of a local run, also when one is killed."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from types import SimpleNamespace

import psutil
import pytest

from lumina_engine.commands import data as command
from lumina_engine.commands.common import report
from lumina_engine.data import ray_engine, store
from lumina_engine.data.conversation import DataError
from lumina_engine.data.pieces import plan
from lumina_engine.data.prepare import Job, tokenise
from lumina_engine.data.ray_engine import PieceBuilder
from lumina_engine.data.store import open_data
from lumina_engine.data.tokenizer import ConversationTokenizer


def talk(n):
    return {"messages": [{"role": "user", "content": f"{n}é"}, {"role": "assistant", "content": "a" * (n % 37) + "."}]}


def workers():
    """The processes in which Ray runs our pieces."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::PieceBuilder"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_c145_ray_gives_the_local_store_bit_for_bit_and_loses_a_killed_worker_only(write, settings, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lumina[ray]'")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store, "PIECE_BYTES", 30_000)
    path, tokenizer = write("x.jsonl", [talk(n) for n in range(4000)]), ConversationTokenizer("lumina-1k")
    keys = {"train_data_path": str(path), "eval_split": 0.1}
    local = open_data(settings(**keys, data_cache_dir=str(tmp_path / "local")), tokenizer)
    killed = []

    def told(documents, tokens):
        if not killed and 0 < documents < 3000:
            killed.append(workers()[0])
            killed[0].kill()

    config = settings(**keys, data_cache_dir=str(tmp_path / "ray"))
    try:
        spread = open_data(config, tokenizer, told, workers=2, engine="ray")
    finally:
        ray.shutdown()
    assert killed and not killed[0].is_running() and not workers()
    for one, other in ((spread.train, local.train), (spread.eval, local.eval)):
        assert one.path.name == other.path.name and one.fingerprint == other.fingerprint
        for file in ("tokens.u32", "mask.u8", "offsets.u64", "digests.u64"):
            assert (one.path / file).read_bytes() == (other.path / file).read_bytes()
        assert {k: v for k, v in one.meta.items() if k != "source"} == {k: v for k, v in other.meta.items() if k != "source"}
    assert spread.notes == local.notes


@pytest.fixture
def cluster(monkeypatch):
    """`cluster(num_cpus)`: Ray as another program started it, with so many processors."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lumina[ray]'")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    def start(num_cpus):
        options = {"include_dashboard": False, "object_store_memory": 80 << 20, "log_to_driver": False}
        ray.init(num_cpus=num_cpus, logging_level=logging.ERROR, **options)
        return ray

    yield start
    ray.shutdown()


def counting(remote, started):
    """`ray.remote` that notes each actor that is made."""

    def counted(**options):
        make = remote(**options)

        def kind(cls):
            actor = make(cls)

            class Noted:
                @staticmethod
                def remote(*args):
                    started.append(args)
                    return actor.remote(*args)

            return Noted

        return kind

    return counted


@pytest.mark.parametrize("workers", [pytest.param(3, marks=pytest.mark.slow), None])
def test_c145_a_cluster_with_fewer_free_processors_than_workers_does_all_pieces(cluster, workers, write, settings, monkeypatch):
    """None is a worker for each processor of the cluster, not of this machine."""
    ray = cluster(1)
    monkeypatch.setattr(store, "processors", lambda: 3)
    monkeypatch.setattr(store, "PIECE_BYTES", 10_000)
    path, started = write("x.jsonl", [talk(n) for n in range(600)]), []
    monkeypatch.setattr(ray, "remote", counting(ray.remote, started))
    data = open_data(settings(train_data_path=str(path)), ConversationTokenizer("lumina-1k"), workers=workers, engine="ray")
    assert len(data.train) == 600 and len(started) == (workers or 1)


@pytest.mark.slow
def test_c145_a_cluster_without_a_free_processor_is_told(cluster, write, settings, monkeypatch):
    cluster(0)
    monkeypatch.setattr(ray_engine, "_PATIENCE", 0.5)
    path = write("x.jsonl", [talk(n) for n in range(20)])
    with pytest.raises(DataError, match=r"no Ray worker could be started: no processor of the cluster came free") as raised:
        open_data(settings(train_data_path=str(path)), ConversationTokenizer("lumina-1k"), workers=2, engine="ray")
    assert raised.value.exit_code == 2


def test_c145_a_tokenizer_that_a_node_lacks_is_named(cluster, write, tmp_path):
    cluster(1)
    pieces = plan([write("x.jsonl", [talk(1)])], "auto", 30_000)
    lacking = SimpleNamespace(name="lumina-0k", digest="x")
    job = Job(pieces, tmp_path / "pieces", lacking, None, store.part_of(None), "ray")
    with pytest.raises(DataError, match=r"no Ray worker could be started: .*lumina-0k"):
        list(tokenise(job, 1))


def test_c145_a_worker_tells_what_is_wrong_with_a_piece(write, tmp_path):
    tokenizer = ConversationTokenizer("lumina-1k")
    (piece,) = plan([write("b.jsonl", [talk(1), {"messages": 3}])], "auto", 30_000)
    said = PieceBuilder("lumina-1k", tokenizer.digest, None).build(piece.to_dict(), {"all": str(tmp_path / "all")})
    assert said["error"]["line"] == 2 and not (tmp_path / "all").exists()
    other = PieceBuilder("lumina-1k", "of another version", None).build(piece.to_dict(), {"all": str(tmp_path / "all")})
    assert "tokenizer lumina-1k is another one" in other["error"]["message"]


def test_c145_without_ray_it_says_what_to_install(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path = write("x.jsonl", [talk(n) for n in range(20)])
    words = ["prepare", f"train_data_path={path}", f"data_cache_dir={tmp_path / 'cache'}", "--engine", "ray", "--json"]
    try:
        command.run(parser.parse_args(words))
    except DataError as error:
        assert report(error) == 2
    assert "pip install 'lumina[ray]'" in capsys.readouterr().err
    assert command.run(parser.parse_args([*words[:-3], "--json"])) == 0  # the local engine does without
    assert json.loads(capsys.readouterr().out)["stores"]


@pytest.mark.parametrize("tasks", [False, True])
def test_c145_data_that_would_be_streamed_are_refused_and_not_built_here(tasks, write, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path, cache = write("x.jsonl", [talk(n) for n in range(20)]), tmp_path / "cache"
    data = [f'task_data_paths={{"talk": "{path}"}}', "multi_task=true"] if tasks else [f"train_data_path={path}"]
    words = ["prepare", *data, f"data_cache_dir={cache}", "streaming_threshold_gb=0", "--engine", "ray"]
    with pytest.raises(DataError, match=r"x\.jsonl: --engine ray builds token stores whole.*streaming_threshold_gb") as raised:
        command.run(parser.parse_args(words))
    assert report(raised.value) == 2 and not list(cache.glob("*.stream"))
