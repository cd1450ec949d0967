"""C34, C35, R31: streamed data give each row once, the same for any split and after any interruption, in bounded room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from lumina_engine.data import stream as streams
from lumina_engine.data.batch import ConversationDataset, TrainLoader
from lumina_engine.data.conversation import DataError
from lumina_engine.data.pieces import plan
from lumina_engine.data.rows import RowOptions, RowPlan
from lumina_engine.data.store import open_data
from lumina_engine.data.stream_open import open_stream
from lumina_engine.data.stream_rows import IN_USE, StreamRows
from lumina_engine.data.tally import Tally
from lumina_engine.data.token_store import build_store
from tests.data.streamed import read
from tests.waiting import until

SMALL = {"piece_bytes": 1500, "window_pieces": 2}
ROOT = Path(__file__).resolve().parents[2]
PACKINGS = ["fit", "concat", "none"]


def talk(n, weight=None):
    answer = {"role": "assistant", "content": "a" * (n % 23) + "."}
    if weight is not None:
        answer["weight"] = weight
    return {"messages": [{"role": "user", "content": f"{n}é"}, answer]}


def batches(data, config, **split):
    return [batch for step in TrainLoader(data, config, **split) for batch in step]


def same(one, other):
    names = ("input_ids_BS", "labels_BS", "document_ids_BS", "position_ids_BS", "weights_BS")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return one.rows == other.rows and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def all_same(some, others):
    return len(some) == len(others) > 0 and all(map(same, some, others))


def opened(path, config, tokenizer, **more):
    return open_stream(path if isinstance(path, list) else str(path), config, tokenizer, **{**SMALL, **more})


def on_disk(stream):
    return sorted(folder.name for folder in stream.path.glob("window-??????"))


@pytest.mark.parametrize("packing", PACKINGS)
def test_c034_one_window_gives_the_very_batches_of_the_map_style_path(write, settings, tokenizer, packing):
    """Through `open_data`, evaluation included, several epochs, weights, long conversations that are cut."""
    path = write("x.jsonl", [talk(n, (None, 0.5, 2.0)[n % 3]) for n in range(60)] + [talk(3)] * 3)
    same_keys = {
        "train_data_path": str(path),
        "eval_split": 0.2,
        "packing": packing,
        "num_epochs": 3,
        "seq_length": 40,
        "seed": 5,
    }
    whole = open_data(settings(**same_keys), tokenizer)
    streamed = open_data(settings(**same_keys, streaming_threshold_gb=0.0), tokenizer)
    assert isinstance(streamed.train, streams.TokenStream) and not isinstance(whole.train, streams.TokenStream)
    assert streamed.train.fingerprint == whole.train.fingerprint and streamed.eval.fingerprint == whole.eval.fingerprint
    assert (len(streamed.train), streamed.train.num_tokens, streamed.train.num_trained) == (
        len(whole.train),
        whole.train.num_tokens,
        whole.train.num_trained,
    )
    config = settings(**same_keys)
    assert all_same(batches(streamed.train, config), batches(whole.train, config))
    plans = [TrainLoader(data.train, config).plan for data in (streamed, whole)]
    assert [plans[0].members(row) for row in range(9)] == [plans[1].members(row) for row in range(9)]
    assert streamed.notes[0].startswith(f"{path}: streamed, ") and streamed.notes[1:] == whole.notes
    assert len(whole.notes) == (1 if packing == "concat" else 3)


def test_c034_long_texts_are_cut_alike_in_a_stream(write, settings, tokenizer):
    """Last pieces of texts that packing cuts once more: one window as map-style, and every token once in several windows."""
    texts = [{"text": f"{n} " + "x" * (100 + n % 7)} for n in range(90)]
    path = write("x.jsonl", texts)
    keys = {"train_data_path": str(path), "seq_length": 64, "eval_split": 0.0}
    whole, streamed = (open_data(settings(**keys, streaming_threshold_gb=size), tokenizer).train for size in (5.0, 0.0))
    config = settings(**keys)
    plans = [TrainLoader(data, config).plan for data in (whole, streamed)]
    assert len(plans[0].samples) > sum(-(-n // 64) for n in np.diff(whole.offsets).tolist())  # some were cut once more
    assert all_same(batches(whole, config), batches(streamed, config))
    several = opened(path, config, tokenizer)
    plan = several.count(RowOptions.from_config(config))
    assert len(plan.sizes) > 3
    built = plan.build(list(range(plan.num_rows)))
    assert sorted(built.input_ids[built.document_ids > 0].tolist()) == sorted(whole.tokens.tolist())


@pytest.mark.parametrize("damage", ["flipped", "gone", "gone, and windows too"])
def test_c036_a_lost_evaluation_store_is_made_again(write, settings, tokenizer, damage):
    path = write("x.jsonl", [talk(n) for n in range(120)])
    config = settings()
    first = opened(path, config, tokenizer, split=0.2)
    first.count(RowOptions.from_config(config))
    expected, store = first.eval.fingerprint, first.path / "eval"
    if damage == "flipped":
        data = bytearray((store / "tokens.u32").read_bytes())
        data[5] ^= 1
        (store / "tokens.u32").write_bytes(data)
    else:
        shutil.rmtree(store)
    for name in on_disk(first)[:1] if "windows" in damage else []:
        shutil.rmtree(first.path / name)
    again = opened(path, config, tokenizer, split=0.2)
    rows = again.count(RowOptions.from_config(config))
    assert again.eval.fingerprint == expected and rows.num_rows == first.count(RowOptions.from_config(config)).num_rows
    assert not list(again.path.glob("eval-*"))


@pytest.mark.parametrize("packing", PACKINGS)
def test_c035_several_windows_each_as_the_map_style_path_has_it(write, settings, tokenizer, packing, tmp_path):
    """The rows of each window are those of a store of its conversations; every row comes once an epoch, window by window."""
    files = [write("a.jsonl", [talk(n) for n in range(120)]), write("b.jsonl", [talk(n, 0.5) for n in range(200, 250)])]
    config = settings(packing=packing, num_epochs=2, batch_size=4)
    stream = opened(list(map(str, files)), config, tokenizer)
    assert len(stream.windows) > 3 and Counter(p for w in stream.windows for p in w) == Counter(plan(files, "auto", 1500))
    rows = stream.count(RowOptions.from_config(config))
    begin, expected = 0, {}
    for number, pieces in enumerate(stream.windows):
        documents = [document for piece in pieces for document in piece.read(Tally())]
        store = build_store(documents, tokenizer, tmp_path / "w", source_digest=str(number))
        own = RowPlan(store, RowOptions.from_config(config))
        assert own.num_rows == rows.sizes[number] and stream.counted[number].fingerprint == store.fingerprint
        expected |= {begin + row: own.build([row]) for row in range(own.num_rows)}
        begin += own.num_rows
    assert rows.num_rows == begin
    seen = batches(stream, config)
    flat = [row for batch in seen for row in batch.rows]
    assert sorted(flat[:begin]) == sorted(flat[begin : 2 * begin]) == list(range(begin)) and set(flat[2 * begin :]) <= {-1}
    assert flat[:begin] != flat[begin : 2 * begin]
    for batch in seen:
        for at, row in enumerate(batch.rows):
            if row >= 0:
                assert np.array_equal(batch.input_ids_BS[at], expected[row].input_ids[0])
                assert np.array_equal(batch.labels_BS[at], expected[row].labels[0])
                weights = expected[row].weights
                assert np.array_equal(batch.weights_BS[at], expected[row].labels[0] >= 0 if weights is None else weights[0])
    windows = [int(np.searchsorted(rows._begins, row, side="right")) for row in flat[:begin]]
    assert sum(a != b for a, b in pairwise(windows)) == len(stream.windows) - 1
    if packing == "concat":
        assert sum(batch.num_tokens for batch in seen) == 2 * stream.num_tokens


@pytest.mark.parametrize(("world", "micro", "accumulation", "workers"), [(1, 1, 12, 0), (3, 2, 2, 2), (4, 3, 1, 1)])
def test_c035_no_split_changes_the_rows_of_a_stream(write, settings, tokenizer, world, micro, accumulation, workers):
    path = write("x.jsonl", [talk(n) for n in range(150)])
    config = settings(num_epochs=2, batch_size=12)
    stream = opened(path, config, tokenizer)
    reference = [list(batch.rows) for batch in batches(stream, config)]
    config = settings(num_epochs=2, num_workers=workers)
    loaders = [
        TrainLoader(stream, config, rank=r, world=world, micro_batch=micro, accumulation=accumulation) for r in range(world)
    ]
    found = []
    for parts in zip(*loaders, strict=True):
        found.append([row for m in range(accumulation) for part in parts for row in part[m].rows])
    assert found == reference


def test_rs05_a_stream_goes_on_at_any_step_and_opens_only_the_window_it_is_in(write, settings, tokenizer, monkeypatch):
    path = write("x.jsonl", [talk(n) for n in range(150)])
    config = settings(num_epochs=2, batch_size=4, streaming_threshold_gb=0.0)
    loader = TrainLoader(opened(path, config, tokenizer), config)
    positions, unbroken = [loader.position], []
    for step in loader:
        unbroken += step
        positions.append(loader.position)
    tokenised: list[int] = []
    real = streams.TokenStream._tokenise
    monkeypatch.setattr(
        streams.TokenStream, "_tokenise", lambda self, number, *rest: (tokenised.append(number), real(self, number, *rest))[1]
    )
    monkeypatch.setattr(StreamRows, "_open_next", lambda self: None)
    for stop in range(0, len(unbroken), 7):
        again = opened(path, config, tokenizer)  # as a process that was killed: nothing but the position is left
        tokenised.clear()
        rest = iter(TrainLoader(again, config, start=positions[stop]))
        assert same(next(rest)[0], unbroken[stop]) and len(tokenised) <= 2
        rest.close()
    assert all_same(batches(again, config, start=positions[3]), unbroken[3:])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_c034_room_on_the_disk_is_bounded_and_changes_nothing(write, settings, tokenizer, threshold):
    path = write("x.jsonl", [talk(n) for n in range(200)])
    config = settings(num_epochs=2, batch_size=8, num_workers=2)
    reference = batches(opened(path, settings(data_cache_dir=f"{path.parent}/other"), tokenizer), config)
    stream = opened(path, settings(streaming_threshold_gb=threshold), tokenizer)
    assert len(stream.windows) > IN_USE + 1
    most, seen = 0, []
    for step in TrainLoader(stream, config):
        seen += step
        most = max(most, len(on_disk(stream)))
    assert all_same(seen, reference)
    assert most <= IN_USE + 1 if threshold == 0 else most == len(stream.windows)  # two may come at once


def test_c034_two_threads_that_want_the_same_window_tokenise_it_once(write, settings, tokenizer, monkeypatch):
    """Both share a process, which the lock on a file does not notice."""
    stream = opened(write("x.jsonl", [talk(n) for n in range(200)]), settings(streaming_threshold_gb=0.0), tokenizer)
    shutil.rmtree(stream.path / "window-000000", ignore_errors=True)
    first, second = threading.Event(), threading.Event()
    real = streams.TokenStream._tokenise

    def tokenise(self, *rest):
        (second if first.is_set() else first).set()
        second.wait(0.5)  # time for the other thread to come in, where nothing holds it
        return real(self, *rest)

    monkeypatch.setattr(streams.TokenStream, "_tokenise", tokenise)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(stream.window, 0)
        assert first.wait(30)
        other = threads.submit(stream.window, 0)
        assert one.result(60).fingerprint == other.result(60).fingerprint == stream.counted[0].fingerprint
    assert not second.is_set()


def test_c034_a_window_that_is_being_opened_is_not_forgotten(write, settings, tokenizer, monkeypatch):
    """However many others are asked for meanwhile: who asks for it again waits for the one that comes."""
    stream = opened(write("x.jsonl", [talk(n) for n in range(200)]), settings(), tokenizer)
    rows = stream.count(RowOptions(64))
    begun, go, asked = threading.Event(), threading.Event(), Counter()
    real = streams.TokenStream.window

    def window(self, number, *rest):
        asked[number] += 1
        if number == 0:
            begun.set()
            assert go.wait(60)
        return real(self, number, *rest)

    monkeypatch.setattr(streams.TokenStream, "window", window)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(rows._plan, 0)
        assert begun.wait(30)
        for number in range(1, IN_USE + 2):
            rows._plan(number)
        other = threads.submit(rows._plan, 0)
        go.set()
        assert one.result(60) is other.result(60)
    assert asked[0] == 1


def test_rs07_a_window_that_comes_out_otherwise_is_refused_by_its_files(write, settings, tokenizer):
    """A changed byte under the same size and time, which only the tokens can show."""
    path = write("x.jsonl", [talk(n) for n in range(200)])
    config = settings(streaming_threshold_gb=0.0)
    stream = opened(path, config, tokenizer)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"aaaaaaaaaaaaaa", b"aaaaaaabaaaaaa"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"changed since they were counted: .*x\.jsonl"):
        batches(stream, config)
    os.utime(path)  # as any editor leaves it: counted again, and another data set
    assert opened(path, config, tokenizer).fingerprint != stream.fingerprint


def test_c034_other_lengths_count_their_rows_again_and_keep_the_tokens(write, settings, tokenizer, monkeypatch):
    path = write("x.jsonl", [talk(n) for n in range(100)])
    first = opened(path, settings(), tokenizer)
    monkeypatch.setattr(streams.TokenStream, "_tokenise", None)  # the windows are there
    other = opened(path, settings(seq_length=128), tokenizer)
    assert other.fingerprint == first.fingerprint
    assert other.count(RowOptions(128)).num_rows < first.count(RowOptions(64)).num_rows
    assert opened(path, settings(seed=1), tokenizer).fingerprint == first.fingerprint


def test_c034_parquet_and_urls_stream_the_same_windows(write, settings, tokenizer, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [talk(n) for n in range(300)]
    lines = write("l/x.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=20, compression="none")
    config = settings()
    parquet = opened(tmp_path / "x.parquet", config, tokenizer)
    pieces = [(p.start, p.stop) for p in plan([tmp_path / "x.parquet"], "auto", 1500)]
    assert len(parquet.windows) > 3 and [a for a, _ in pieces] == [0, *[b for _, b in pieces[:-1]]] and pieces[-1][1] == 15
    assert batches(parquet, config)
    remote = fsspec.filesystem("memory")
    remote.pipe({"/talks/x.jsonl": lines.read_bytes(), "/talks/x.jsonl.rejects.jsonl": b'{"line": 1}\n'})
    by_path, by_url = opened(lines, config, tokenizer), opened("memory://talks/x.jsonl", config, tokenizer)
    assert by_url.fingerprint == by_path.fingerprint and all_same(batches(by_url, config), batches(by_path, config))
    for url in (
        f"file://{lines}",
        f"file://{lines.parent}",
        f"file://{lines.parent}/*.jsonl",
        "memory://talks",
        "memory://talks/*.jsonl",
    ):
        assert opened(url, config, tokenizer).fingerprint == by_path.fingerprint
    for url in (f"file://{tmp_path}/none.jsonl", "memory://talks/none.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            opened(url, config, tokenizer)
    remote.rm("/talks", recursive=True)
    with pytest.raises(DataError, match="install what the protocol needs"):
        opened("nosuch://bucket/x.jsonl", config, tokenizer)
    # one pass, pieces and rows of Parquet: the same conversations
    whole = open_data(settings(train_data_path=str(tmp_path / "x.parquet")), tokenizer).train
    one = open_stream(str(tmp_path / "x.parquet"), config, tokenizer, piece_bytes=1500, window_pieces=99)
    assert one.fingerprint == whole.fingerprint


def test_c038_what_is_in_both_training_and_evaluation_data_is_told_of_a_stream_too(write, settings, tokenizer):
    train = write("t.jsonl", [talk(n) for n in range(100)] * 2)
    keys = {"train_data_path": str(train), "eval_data_path": str(write("e.jsonl", [talk(n) for n in range(90, 120)]))}
    stream = opened(train, settings(**keys), tokenizer)
    held_out = open_data(settings(**keys), tokenizer).eval
    assert len(stream.windows) > 3 and stream.shared_with(held_out) == 10
    for threshold in (0.0, 5.0):
        notes = open_data(settings(**keys, streaming_threshold_gb=threshold), tokenizer).notes
        assert any(note.startswith("warning: 10 conversations are in both") for note in notes)


def test_ft07_a_step_that_waits_for_a_window_is_known_before(write, settings, tokenizer, monkeypatch):
    monkeypatch.setattr(StreamRows, "_open_next", lambda self: None)
    path = write("x.jsonl", [talk(n) for n in range(150)])
    config = settings(batch_size=4, streaming_threshold_gb=0.0)
    loader = TrainLoader(opened(path, config, tokenizer), config)
    steps, waited = iter(loader), [loader.waits()]
    for _ in steps:
        waited.append(len(loader) > 0 and loader.waits())
    assert waited[0] and sum(waited) == len(loader.plan.sizes) > 3
    whole = open_data(settings(train_data_path=str(path)), tokenizer).train
    assert not TrainLoader(whole, config).waits()


def test_c032_a_dataset_above_the_threshold_is_a_stream(write, settings, tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = write("x.jsonl", [talk(n) for n in range(30)])
    small, large = (
        ConversationDataset(str(path), tokenizer, settings(streaming_threshold_gb=gb, packing="none")) for gb in (5.0, 1e-9)
    )
    assert isinstance(large.store, streams.TokenStream) and len(large) == len(small) == 30
    for one, other in zip((small[i] for i in range(30)), (large[i] for i in range(30)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"message_tree_id": "q", "prompt": {"message_id": "q", "role": "prompter", "text": "t", "replies": []}}], "trees"),
        ([{"conversations": [{"from": "human", "value": "q"}]}], "no conversation left"),
        ([talk(1), {"messages": 3}], r"x\.jsonl:2"),
    ],
)
def test_c034_what_cannot_be_streamed_says_why(write, settings, tokenizer, content, text):
    with pytest.raises(DataError, match=text):
        open_data(settings(train_data_path=str(write("x.jsonl", content)), streaming_threshold_gb=0.0), tokenizer)


def test_c034_killed_while_it_counts_and_in_the_middle_of_a_file_it_goes_on(write, tmp_path):
    """SIGKILL as soon as a window is there, then as soon as half of the rows are read: the batches of an unbroken run."""
    path = write("x.jsonl", [talk(n) for n in range(2000)])

    def started(cache, position):
        argv = [sys.executable, "-m", "tests.data.streamed", str(path), str(tmp_path / cache), str(position)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT)

    unbroken = list(read(str(path), str(tmp_path / "a"), workers=0))
    process = started("b", 0)
    until(lambda: list((tmp_path / "b").glob("*.stream/window-00000[1-9]")) or process.poll() is not None)
    assert process.poll() is None, "it was done before it could be killed"
    process.kill()
    process.wait()
    counted = json.loads(next((tmp_path / "b").glob("*.stream/counted.json")).read_text())
    assert counted
    process = started("b", 0)
    seen = [process.stdout.readline().rstrip() for _ in range(len(unbroken) // 2)]
    process.kill()
    process.wait()
    rest = started("b", seen[-1].split()[0]).communicate(timeout=120)[0].splitlines()
    assert seen + rest == unbroken and len(unbroken) > 20
    assert len(list(Path(tmp_path / "b").glob("*.stream/window-??????"))) <= IN_USE + 1
