"""C36, C43: a data set tokenised in pieces is the one tokenised in one pass, whoever is killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lumina_engine.data import ahead, prepare, store
from lumina_engine.data.conversation import DataError
from lumina_engine.data.formats import read_conversations
from lumina_engine.data.pieces import plan
from lumina_engine.data.store import file_source, open_data
from lumina_engine.data.tally import Tally
from lumina_engine.data.tokenizer import ConversationTokenizer
from tests.waiting import until

extend = prepare.StoreWriter.extend


def talk(n, weight=None):
    answer = {"role": "assistant", "content": "a" * (n % 37) + "."}
    if weight is not None:
        answer["weight"] = weight
    return {"messages": [{"role": "user", "content": f"question {n} é🫠"}, answer]}


@pytest.fixture
def in_pieces(monkeypatch):
    """Pieces of a chosen size, whatever the size of the data."""

    def choose(size):
        monkeypatch.setattr(store, "PIECES_FROM", 0 if size else 1 << 60)
        monkeypatch.setattr(store, "PIECE_BYTES", size or 1)

    return choose


def built(write, in_pieces, settings, tokenizer, size, name, content, workers=1, **options):
    in_pieces(size)
    path = write(name, content)
    cache = path.parent / f"cache-{size}-{workers}"
    data = open_data(settings(train_data_path=str(path), data_cache_dir=str(cache), **options), tokenizer, workers=workers)
    return data


def same(one, other):
    assert one.train.fingerprint == other.train.fingerprint
    assert np.array_equal(one.train.digests, other.train.digests)
    assert one.notes == other.notes
    for key in ("documents", "tokens", "trained_tokens", "longest", "weights", "tally"):
        assert one.train.meta[key] == other.train.meta[key], key
    assert (one.eval is None) == (other.eval is None)
    if one.eval is not None:
        assert one.eval.fingerprint == other.eval.fingerprint


@pytest.mark.parametrize("size", [211, 997, 5000])
@pytest.mark.parametrize("split", [0.0, 0.3])
def test_c036_pieces_of_any_size_give_the_same_store(write, in_pieces, settings, tokenizer, size, split):
    rows = [talk(n, weight=(None, 0.5, 2.0, 0.25)[n % 4] if n > 20 else None) for n in range(40)]
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    text = "\ufeff" + "\r\n\n".join(lines[:25]) + "\n" + "\n".join(lines[25:])  # no line end at the end
    whole = built(write, in_pieces, settings, tokenizer, 0, "x.jsonl", text, eval_split=split)
    same(whole, built(write, in_pieces, settings, tokenizer, size, "x.jsonl", text, eval_split=split))
    assert not list(Path(whole.train.path).parent.glob("*.pieces"))


@examples(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(1, 500), st.booleans())
def test_c036_every_line_is_in_one_piece(tmp_path_factory, lengths, size, ends):
    path = tmp_path_factory.mktemp("p") / "x.jsonl"
    lines = [json.dumps({"text": f"{n} " + "x" * length}) for n, length in enumerate(lengths)]
    path.write_text("\n".join(lines) + ("\n" if ends else ""))
    pieces = plan([path], "text", size)
    found = [document.text for piece in pieces for document in piece.read(Tally())]
    assert found == [json.loads(line)["text"] for line in lines]
    assert pieces[-1].stop in (None, path.stat().st_size) and pieces[0].start == 0


def test_c036_two_processes_give_the_same_store(write, in_pieces, settings):
    tokenizer = ConversationTokenizer("lumina-1k")
    files = {"a.jsonl": [talk(n) for n in range(200)], "b.json": [{"instruction": "i", "output": "o"}]}
    folder = write("d/a.jsonl", files["a.jsonl"]).parent
    write("d/b.json", files["b.json"])
    stores = []
    for size, workers in ((0, 1), (3000, 1), (3000, 2)):
        in_pieces(size)
        cache = folder.parent / f"cache-{size}-{workers}"
        config = settings(train_data_path=str(folder), data_cache_dir=str(cache), eval_split=0.2)
        stores.append(open_data(config, tokenizer, workers=workers))
    same(stores[0], stores[1])
    same(stores[0], stores[2])


def _expecting(monkeypatch, size):
    """An `Ahead` for sources from 0 to `size` bytes, and the processes that it starts."""
    started, begin = [], ahead._piece_worker

    def counted():
        started.append(begin())
        return started[-1]

    monkeypatch.setattr(ahead, "_piece_worker", counted)
    monkeypatch.setattr(ahead, "PIECES_FROM", 0)
    monkeypatch.setattr(ahead, "PIECE_BYTES", size)
    return ahead.Ahead(), started


def test_c036_workers_that_started_ahead_do_the_work_and_end_with_it(write, in_pieces, settings, monkeypatch):
    """None is started for a source of which there is a store, for a small one, for one worker, or for a stream."""
    in_pieces(3000)
    path = write("x.jsonl", [talk(n) for n in range(200)])
    config = settings(train_data_path=str(path), eval_split=0.2)
    cache, tokenizer = Path(config.data_cache_dir), ConversationTokenizer("lumina-1k")
    workers, started = _expecting(monkeypatch, 3000)
    workers.expect(path, "train_data_path", cache, 1)
    workers.expect(path, "train_data_path", cache, 2, most=path.stat().st_size - 1)
    assert not started
    workers.expect(path, "train_data_path", cache, 2)
    assert len(started) == 2
    with closing(workers):
        first = open_data(config, tokenizer, workers=2, ahead=workers)
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    workers.expect(path, "train_data_path", cache, 2)
    assert len(started) == 2
    alone = settings(train_data_path=str(path), eval_split=0.2, data_cache_dir=str(path.parent / "alone"))
    assert first.train.fingerprint == open_data(alone, tokenizer, workers=1).train.fingerprint


def test_c036_a_worker_that_is_told_nothing_ends_in_silence():
    """As when the parent is killed before it knew what to tokenise."""
    words = [sys.executable, "-m", "lumina_engine.data.piece_worker"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_c036_a_worker_tells_of_a_fault_that_is_not_the_datas(write, tmp_path):
    """Instead of dying of it, which looks like being out of memory."""
    path, tokenizer = write("x.jsonl", [talk(1)]), ConversationTokenizer("lumina-1k")
    piece = {"path": str(path), "layout": "no such layout", "stop": 10}
    shared = {"tokenizer": tokenizer.name, "digest": tokenizer.digest, "threshold": None}
    lines = [shared, {"piece": piece, "targets": {"all": str(tmp_path / "all")}}]
    words = [sys.executable, "-m", "lumina_engine.data.piece_worker"]
    told = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(words, input=told, capture_output=True, text=True)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 0 and error["path"] == str(path) and error["exit_code"] == 1
    assert "KeyError while bytes 0 on were tokenised" in error["message"] and "Traceback" in done.stderr


def test_c036_workers_are_ended_where_a_source_cannot_be_cut(write, in_pieces, settings, monkeypatch):
    """They do not wait beside the one that builds a list of JSON."""
    in_pieces(3000)
    path = write("x.json", [talk(n) for n in range(200)])
    workers, started = _expecting(monkeypatch, 3000)
    workers.expect(path, "train_data_path", path.parent, 2)
    seen = []

    def told(documents, tokens):
        seen.append([process.returncode for process in started])

    open_data(settings(train_data_path=str(path)), ConversationTokenizer("lumina-1k"), told, workers=2, ahead=workers)
    assert len(started) == 2 and seen and None not in seen[0]


def test_c036_a_process_that_cannot_start_ahead_is_none(write, monkeypatch):
    path = write("x.jsonl", [talk(n) for n in range(200)])
    workers, started = _expecting(monkeypatch, 3000)
    counted = ahead._piece_worker

    def full():
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return counted()

    monkeypatch.setattr(ahead, "_piece_worker", full)
    with closing(workers):
        workers.expect(path, "train_data_path", path.parent, 3)
    assert len(started) == 1 and started[0].returncode is not None


def test_c036_a_worker_hears_no_ctrl_c_from_its_first_moment_on(monkeypatch):
    """The terminal sends it to the whole group while Python still imports."""
    words = []

    def popen(command, **options):
        words.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return process(command, **options)

    process = subprocess.Popen
    monkeypatch.setattr(ahead.subprocess, "Popen", popen)
    worker = ahead._piece_worker()
    worker.send_signal(signal.SIGINT)  # at once: it has not come to its own first line
    worker.stdin.close()
    assert worker.wait() == 0 and signal.SIGINT in words[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker.stdout.close()


def test_c036_pieces_of_another_size_are_not_taken_for_these(write, in_pieces, settings):
    """What a killed process of another version left covers other bytes. It is cleared."""
    tokenizer = ConversationTokenizer("lumina-1k")
    path = write("x.jsonl", [talk(n) for n in range(400)])
    whole = built(write, in_pieces, settings, tokenizer, 0, "x.jsonl", path.read_bytes())
    config = settings(train_data_path=str(path), data_cache_dir=str(path.parent / "cache"))
    cache = Path(config.data_cache_dir)
    in_pieces(8000)
    seen = 0

    def stop(documents, tokens):
        nonlocal seen
        seen += 1
        if seen > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_data(config, tokenizer, stop, workers=1)
    left = {folder.name for folder in cache.glob("*.pieces")}
    assert left and _pieces(cache)
    in_pieces(4000)
    found = open_data(config, tokenizer, workers=1)
    assert len(found.train) == 400 and found.train.fingerprint == whole.train.fingerprint
    assert not list(cache.glob("*.pieces"))


def test_c036_workers_that_nobody_needs_end_with_the_fault_of_a_source(write, settings, monkeypatch):
    path = write("x.jsonl", [talk(n) for n in range(200)])
    workers, started = _expecting(monkeypatch, 3000)
    with pytest.raises(ValueError, match="no tokenizer"), closing(workers):
        workers.expect(path, "train_data_path", path.parent, 2)
        raise ValueError("no tokenizer")
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    with pytest.raises(DataError, match="train_data_path"):
        workers.expect(path.parent / "none", "train_data_path", path.parent, 2)


def test_c036_the_command_starts_its_workers_before_it_loads_numpy(write, tmp_path):
    """In `data prepare`, with everything imported that this takes so far."""
    code = """
import sys
from lumina_engine import cli
from lumina_engine.data import ahead
ahead.PIECES_FROM, ahead.PIECE_BYTES = 0, 3000
began = ahead._piece_worker
def begin():
    print("numpy" in sys.modules, "tiktoken" in sys.modules)
    return began()
ahead._piece_worker = begin
sys.exit(cli.main(sys.argv[1:]))
"""
    path = write("x.jsonl", [talk(n) for n in range(200)])
    keys = [f"train_data_path={path}", "tokenizer=lumina-1k", f"data_cache_dir={tmp_path / 'cache'}"]
    words = [sys.executable, "-c", code, "data", "prepare", "--json", "--workers", "2", *keys]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False False\n" * 2 + "{")


SCRIPT = """
import sys
from types import SimpleNamespace
from lumina_engine.data import store
from lumina_engine.data.tokenizer import ConversationTokenizer

store.PIECES_FROM, store.PIECE_BYTES = 0, 20_000
config = SimpleNamespace(seq_length=64, train_data_path=sys.argv[1], data_cache_dir=sys.argv[2], eval_split=0.0)
print(store.open_data(config, ConversationTokenizer("lumina-1k"), workers=2).train.fingerprint)
"""


def _pieces(cache):
    """Whole pieces so far, with what tells one writing from another."""
    return {meta.parent.name: meta.stat().st_ino for meta in cache.glob("*.pieces/piece-*-all/meta.json")}


def _killed_at(command, cache, pieces):
    """Run it until so many pieces are whole, then SIGKILL; its workers end by themselves."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until(lambda: len(_pieces(cache)) >= pieces or process.poll() is not None)
    assert process.poll() is None, "it was done before it could be killed"
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert children
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))


def test_c036_killed_five_times_it_goes_on_where_it_was(write, tmp_path):
    """SIGKILL as soon as some more pieces are there. Pieces that were whole are not made again, no process is left behind."""
    path = write("x.jsonl", [talk(n) for n in range(8000)])
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", SCRIPT, str(path), str(cache)]
    made: dict[str, int] = {}
    for kill in range(5):
        _killed_at(command, cache, len(made) + 2 + kill)
        now = _pieces(cache)
        assert made.items() <= now.items(), "a whole piece was made again"
        made = now
    assert len(made) >= 10
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run([*command[:-1], str(tmp_path / "other")], capture_output=True, text=True, check=True)
    assert done.stdout == again.stdout and len(done.stdout) > 60
    assert not list(cache.glob("*.pieces"))


def test_c036_a_killed_worker_costs_its_piece_only(write, in_pieces, settings, monkeypatch):
    tokenizer = ConversationTokenizer("lumina-1k")
    rows = [talk(n) for n in range(4000)]
    whole = built(write, in_pieces, settings, tokenizer, 0, "x.jsonl", rows)
    killed = []

    class Mortal(prepare._Worker):
        def build(self, piece, *more):
            if piece.start and len(killed) < 2:
                killed.append(piece.start)
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
            return super().build(piece, *more)

    monkeypatch.setattr(prepare, "_Worker", Mortal)
    same(whole, built(write, in_pieces, settings, tokenizer, 40_000, "x.jsonl", rows, workers=2))
    assert len(killed) == 2


def test_c036_a_piece_that_kills_every_worker_ends_it_with_a_reason(write, in_pieces, settings, monkeypatch):
    class Doomed(prepare._Worker):
        def build(self, piece, *more):
            if piece.start == 80_000:
                self._process.kill()
                self._process.wait()
            return super().build(piece, *more)

    monkeypatch.setattr(prepare, "_Worker", Doomed)
    tokenizer = ConversationTokenizer("lumina-1k")
    with pytest.raises(DataError, match="bytes 80,000 on was killed 3 times") as caught:
        built(write, in_pieces, settings, tokenizer, 40_000, "x.jsonl", [talk(n) for n in range(4000)], workers=2)
    assert caught.value.path.endswith("x.jsonl")


@pytest.mark.parametrize("workers", [1, 2])
def test_c036_a_malformed_record_is_named_by_its_line_in_the_file(write, in_pieces, settings, workers):
    lines = [json.dumps(talk(n)) for n in range(300)]
    lines[250], lines[280] = "{", "["
    text = "\n".join([*lines[:100], "", *lines[100:]]) + "\n"
    with pytest.raises(DataError, match=r"x\.jsonl:252: not valid JSON"):
        built(write, in_pieces, settings, ConversationTokenizer("lumina-1k"), 2000, "x.jsonl", text, workers=workers)


def test_c036_what_cannot_be_read_apart_is_read_in_one_pass(write, settings):
    row = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "q"}
    trees = write("t.jsonl", [row, {**row, "message_id": "b", "parent_id": "a", "role": "assistant"}])
    assert plan([write("m.jsonl", [talk(1)]), trees], "auto", 10) is None
    assert [p.stop for p in plan([write("l.json", [talk(1), talk(2)])], "auto", 10)] == [None]
    config = settings(train_data_path=str(trees))
    assert file_source(str(trees), config, "k").files == (trees,)
    assert len(list(read_conversations(trees))) == 1


def test_c036_an_empty_side_of_a_split_holds_out_the_lowest(write, in_pieces, settings, tokenizer):
    rows = [talk(n) for n in range(12)]
    for share in (1e-9, 1 - 1e-9):
        whole = built(write, in_pieces, settings, tokenizer, 0, "x.jsonl", rows, eval_split=share)
        same(whole, built(write, in_pieces, settings, tokenizer, 200, "x.jsonl", rows, eval_split=share))
        assert not list(Path(whole.train.path).parent.parent.glob("cache-*/*.pieces"))
        for cache in Path(whole.train.path).parent.parent.glob("cache-*"):
            cache.rename(cache.with_name(f"old-{share}-{cache.name}"))


def test_c036_a_fault_in_joining_ends_the_workers_and_leaves_the_pieces(write, in_pieces, settings, monkeypatch):
    """The disk fills up while the first piece is joined and others are tokenised; the next start uses what is there."""
    tokenizer = ConversationTokenizer("lumina-1k")
    path = write("x.jsonl", [talk(n) for n in range(2000)])
    in_pieces(20_000)
    config = settings(train_data_path=str(path), data_cache_dir=str(path.parent / "cache"))

    def full(self, other):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare.StoreWriter, "extend", full)
        with pytest.raises(DataError, match="No space left on device") as caught:
            open_data(config, tokenizer, workers=2)
    assert caught.tb is not None  # which keeps the generator alive
    assert not [child for child in psutil.Process().children() if "piece_worker" in " ".join(child.cmdline())]
    cache = path.parent / "cache"
    kept = _pieces(cache)
    assert kept and not [left for left in cache.iterdir() if ".tmp-" in left.name]
    seen = []
    monkeypatch.setattr(prepare.StoreWriter, "extend", lambda self, other: seen.append(_pieces(cache)) or extend(self, other))
    whole = open_data(config, tokenizer, workers=2)
    assert {name: inode for name, inode in seen[-1].items() if name in kept} == kept
    in_pieces(0)
    again = settings(train_data_path=str(path), data_cache_dir=str(path.parent / "other"))
    same(whole, open_data(again, tokenizer))


def test_c036_progress_counts_all_pieces(write, in_pieces, settings):
    tokenizer = ConversationTokenizer("lumina-1k")
    in_pieces(20_000)
    path = write("x.jsonl", [talk(n) for n in range(3000)])
    seen: list[tuple[int, int]] = []
    config = settings(train_data_path=str(path), data_cache_dir=str(path.parent / "c"))
    data = open_data(config, tokenizer, lambda documents, tokens: seen.append((documents, tokens)), workers=2)
    assert seen[-1] == (3000, data.train.num_tokens) and seen == sorted(seen)
