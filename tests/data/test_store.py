"""C33, C36: the token store, and the data of a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest

from lumina_engine.data.conversation import Conversation, DataError, Message, TextDocument
from lumina_engine.data.size import stored
from lumina_engine.data.store import build_store, open_data
from lumina_engine.data.store_writer import FILES, TEXT, StoreWriter, locked, staging_name
from lumina_engine.data.token_store import TokenStore, open_verified, store_name
from tests.checkpoint.helpers import umask

FORK = multiprocessing.get_context("fork")


def talks(count, prefix="q"):
    return [Conversation((Message("user", f"{prefix}{i}"), Message("assistant", f"a{i}")), str(i)) for i in range(count)]


def records(count, prefix="q"):
    return [c.to_record() for c in talks(count, prefix)]


def test_store_holds_whole_documents(tokenizer, tmp_path):
    documents = [*talks(5), TextDocument("once"), Conversation((Message("user", "q"), Message("assistant", "x" * 5000)))]
    store = build_store(documents, tokenizer, tmp_path, source_digest="1")
    assert len(store) == 7 and store.num_tokens == int(store.offsets[-1]) == len(store.tokens) == len(store.mask)
    for index in (0, 4, 6):
        ids, mask = tokenizer.encode_with_mask(documents[index])
        stored, stored_mask = store.document(index)
        assert stored.tolist() == ids and stored_mask.astype(bool).tolist() == mask
    ids, mask = store.document(5)
    assert ids.tolist() == [*b"once", tokenizer.eot_id] and set(mask.tolist()) == {TEXT}
    assert store.num_trained == int(np.count_nonzero(store.mask)) and store.meta["longest"] == 5022
    store.verify()


def test_weights_are_codes_of_the_mask(tokenizer, talk, tmp_path):
    store = build_store(
        [talk("q", "aa", "q", "bb", "q", "cc", weights={1: 0.0, 5: 2.0})], tokenizer, tmp_path, source_digest="1"
    )
    weights = store.meta["weights"]
    ids, mask = store.document(0)
    trained = {weights[code]: tokenizer.decode(ids[mask == code].tolist()) for code in set(mask.tolist()) - {0}}
    assert trained == {0.0: "aa<E>", 1.0: "bb<E>", 2.0: "cc<E>"}
    assert store.num_trained == 6  # what has weight 0 carries no loss


def test_c036_built_once_then_read_from_the_cache(tokenizer, tmp_path):
    first = build_store(talks(10), tokenizer, tmp_path, source_digest="1")

    def never():
        raise AssertionError("read again")
        yield

    second = build_store(never(), tokenizer, tmp_path, source_digest="1")
    assert second.path == first.path and second.fingerprint == first.fingerprint
    assert isinstance(second.tokens, np.memmap)
    assert sorted(p.name for p in first.path.iterdir()) == sorted([*FILES, "meta.json"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.path.name, "locks"])


def test_c036_key_has_source_tokenizer_template_and_options(tokenizer, tmp_path, monkeypatch):
    def path(**more):
        return build_store(talks(2), tokenizer, tmp_path, **{"source_digest": "1", **more}).path

    paths = [path(), path(source_digest="2"), path(options={"a": 1})]
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "digest", "another")
        paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "eot_id", 255)
        paths.append(path())
    assert len(set(paths)) == 5 and path() == paths[0]


def test_rs07_fingerprint_is_of_the_content(tokenizer, tmp_path):
    base = build_store(talks(5), tokenizer, tmp_path / "a", source_digest="1")
    assert build_store(talks(5), tokenizer, tmp_path / "b", source_digest="2").fingerprint == base.fingerprint
    one_byte = [*talks(4), Conversation((Message("user", "q4"), Message("assistant", "b4")))]
    others = [one_byte, talks(5)[::-1], talks(6)]
    found = {build_store(o, tokenizer, tmp_path / "c", source_digest=str(i)).fingerprint for i, o in enumerate(others)}
    assert len(found | {base.fingerprint}) == 4


def test_rs07_another_order_version_is_another_fingerprint(tokenizer, tmp_path, monkeypatch):
    """A cached store of an older version is built again, so a resume notices."""
    base = build_store(talks(5), tokenizer, tmp_path, source_digest="1")
    monkeypatch.setattr("lumina_engine.data.store_writer.ORDER_VERSION", 99)
    assert build_store(talks(5), tokenizer, tmp_path, source_digest="1").fingerprint != base.fingerprint


@pytest.mark.parametrize("version", ["order", "reading"])
def test_c036_a_store_of_older_rules_is_none(write, settings, tokenizer, tmp_path, version):
    """Neither its rows nor its counts are told of data that a run would tokenise anew."""
    path = write("x.jsonl", [{"text": f"text {number}"} for number in range(9)])
    config = settings(train_data_path=str(path), data_cache_dir=str(tmp_path / "cache"))
    store = open_data(config, tokenizer).train
    config.tokenizer, digest = store.meta["tokenizer"]["name"], store.meta["source"]["digest"]
    assert stored(config, digest)[0] == store.path
    (store.path / "meta.json").write_text(json.dumps(store.meta | {version: store.meta[version] - 1}))
    assert stored(config, digest) is None


def test_c036_older_reading_rules_have_other_names(tokenizer, monkeypatch):
    name = store_name(tokenizer, source="1")
    monkeypatch.setattr("lumina_engine.data.token_store.READING_VERSION", 99)
    assert store_name(tokenizer, source="1") != name


def test_c036_what_another_process_with_the_same_pid_left_is_cleared(tmp_path):
    """As in a container, where each start has the same pid."""
    mine = staging_name(tmp_path / "x")
    for folder in (mine, tmp_path / f"x.tmp-{os.getpid()}-1-00"):
        folder.mkdir()
    with locked(tmp_path, "x"):
        assert [entry.name for entry in tmp_path.glob("*.tmp-*")] == [mine.name]


def test_c036_a_failed_build_leaves_nothing(tokenizer, tmp_path):
    def broken():
        yield from talks(3)
        raise DataError("bad", path="f", line=4)

    with pytest.raises(DataError, match="f:4: bad"):
        build_store(broken(), tokenizer, tmp_path, source_digest="1")
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]
    assert len(build_store(talks(3), tokenizer, tmp_path, source_digest="1")) == 3


def _build(tokenizer, cache, started, queue):
    def documents():
        started.wait()
        yield from talks(200)

    store = build_store(documents(), tokenizer, cache, source_digest="1")
    queue.put((os.getpid(), store.fingerprint, len(store)))


def test_c036_several_processes_share_the_cache(tokenizer, tmp_path):
    """One builds, the others wait for it and read the same store."""
    started, queue = FORK.Event(), FORK.Queue()
    children = [FORK.Process(target=_build, args=(tokenizer, tmp_path, started, queue)) for _ in range(3)]
    for child in children:
        child.start()
    started.set()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len({pid for pid, _, _ in results}) == 3 and len({(f, n) for _, f, n in results}) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_c036_remains_of_both_parts_of_a_split_are_cleared(write, settings, tokenizer, tmp_path):
    path = write("x.jsonl", [{"text": f"text {number}"} for number in range(40)])
    cache = tmp_path / "cache"
    config = settings(train_data_path=str(path), eval_split=0.2, data_cache_dir=str(cache))
    open_data(config, tokenizer)
    others = cache / "stream"
    others.mkdir()
    (others / "eval-000003.tmp-1-alive").mkdir()  # of another store, which another process builds
    with locked(others, "count", "eval"):
        assert [entry.name for entry in others.glob("*.tmp-*")] == ["eval-000003.tmp-1-alive"]
    shutil.rmtree(others)
    for folder in [entry for entry in cache.iterdir() if entry.name != "locks"]:
        folder.rename(folder.with_name(f"{folder.name}.tmp-1-dead"))  # as a start leaves it that was killed
    open_data(config, tokenizer)
    assert len([entry for entry in cache.iterdir() if entry.name != "locks"]) == 2 and not list(cache.glob("*.tmp-*"))


def test_c036_killed_builders_do_not_stop_the_next(tokenizer, tmp_path):
    """SIGKILL in the middle of the pass, five times: the same store in the end, and no remains."""

    def hang(reached):
        def documents():
            yield from talks(20)
            reached.set()
            signal.pause()

        build_store(documents(), tokenizer, tmp_path, source_digest="1")

    for _ in range(5):
        reached = FORK.Event()
        child = FORK.Process(target=hang, args=(reached,))
        child.start()
        assert reached.wait(60)
        child.kill()
        child.join(60)
    assert len(list(tmp_path.glob("*.tmp-*"))) == 1  # each builder cleared what the one before it left
    store = build_store(talks(20), tokenizer, tmp_path, source_digest="1")
    assert len(list(tmp_path.glob("*.tmp-*"))) == 0
    assert store.fingerprint == build_store(talks(20), tokenizer, tmp_path / "other", source_digest="1").fingerprint


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_c036_a_damaged_store_is_found_and_built_again(tokenizer, tmp_path, name, damage):
    store = build_store(talks(9), tokenizer, tmp_path, source_digest="1")
    path = store.path / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        at = data.index(b'"fingerprint": "') + 20 if name == "meta.json" else len(data) // 2
        data[at] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(DataError, match="remove the folder"):
        TokenStore(store.path).verify()
    again = build_store(talks(9), tokenizer, tmp_path, source_digest="1")
    again.verify()
    assert again.fingerprint == store.fingerprint


def test_a_newer_format_is_refused_with_its_number(tokenizer, tmp_path):
    store = build_store(talks(2), tokenizer, tmp_path, source_digest="1")
    (store.path / "meta.json").write_text(json.dumps({**store.meta, "format": 99}))
    with pytest.raises(DataError, match=r"another format \(99\)"):
        TokenStore(store.path)


def test_c033_opening_ten_gigabytes_reads_nothing(tokenizer, tmp_path):
    store = build_store(talks(2), tokenizer, tmp_path, source_digest="1")
    big = tmp_path / "big"
    shutil.copytree(store.path, big)
    sizes = {"tokens.u32": 8_000_000_000, "mask.u8": 2_000_000_000, "offsets.u64": 80_000_008, "digests.u64": 80_000_000}
    for name, size in sizes.items():
        os.truncate(big / name, size)
    meta = {**store.meta, "files": {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()}}
    (big / "meta.json").write_text(json.dumps(meta))
    before = psutil.Process().memory_info().rss
    opened = TokenStore(big)
    assert len(opened.tokens) == 2_000_000_000 and int(opened.tokens[-1]) == 0
    assert psutil.Process().memory_info().rss - before < 50_000_000


def test_building_takes_bounded_memory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lumina_engine.data.store_writer._FLUSH_ITEMS", 10_000)
    many = (Conversation((Message("user", "q"), Message("assistant", "a" * 200))) for _ in range(5000))
    tracemalloc.start()
    store = build_store(many, tokenizer, tmp_path, source_digest="1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.num_tokens > 1_000_000 and peak < 1_500_000


def test_a_full_disk_is_one_line(tokenizer, tmp_path):
    def child(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            build_store(talks(500), tokenizer, tmp_path, source_digest="1")
        except DataError as error:
            queue.put(str(error))

    queue = FORK.Queue()
    process = FORK.Process(target=child, args=(queue,))
    process.start()
    message = queue.get(timeout=60)
    process.join(60)
    assert "the token store cannot be written" in message and "data_cache_dir" in message
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]


def test_a_full_disk_keeps_no_room_for_what_cannot_be_finished(tokenizer, tmp_path):
    """Also where closing a file fails again, for what it still holds in its buffer."""
    store = build_store(talks(20), tokenizer, tmp_path / "cache", source_digest="1")

    def child(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        writer = StoreWriter(tmp_path / "joined", tokenizer)
        try:
            writer.extend(store)
            writer.publish({})
        except OSError as error:
            writer.discard()
            queue.put(str(error))

    queue = FORK.Queue()
    process = FORK.Process(target=child, args=(queue,))
    process.start()
    assert "File too large" in queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0 and [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_cache_folder_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data_cache_dir"):
        build_store(talks(1), tokenizer, tmp_path / "file" / "cache", source_digest="1")


# the data of a run


def test_c038_eval_split_is_by_conversation_and_stable(write, tokenizer, settings):
    path = write("m.jsonl", records(400))
    data = open_data(settings(train_data_path=str(path), eval_split=0.1), tokenizer)
    assert len(data.train) + len(data.eval) == 400 and 20 < len(data.eval) < 65 and not data.is_sample
    assert not np.intersect1d(data.train.digests, data.eval.digests).size
    assert any("conversations held out for evaluation (eval_split=0.1)" in note for note in data.notes)
    more = write("more.jsonl", records(500))
    grown = open_data(settings(train_data_path=str(more), eval_split=0.1), tokenizer)
    assert set(data.eval.digests.tolist()) <= set(grown.eval.digests.tolist())
    again = open_data(settings(train_data_path=str(path), eval_split=0.1), tokenizer)
    assert again.train.path == data.train.path and again.eval.path == data.eval.path and again.notes == data.notes
    other = open_data(settings(train_data_path=str(path), eval_split=0.2), tokenizer)
    assert other.train.path != data.train.path and len(other.eval) > len(data.eval)


def test_c038_split_goes_by_id_where_there_is_one(write, tokenizer, settings):
    """Conversations that share an id (paths of one tree) stay on one side."""
    rows = [{**record, "id": f"tree {i // 4}"} for i, record in enumerate(records(200))]
    path = write("m.jsonl", rows)
    data = open_data(settings(train_data_path=str(path), eval_split=0.3), tokenizer)
    assert len(data.eval) % 4 == 0 and len(data.eval) > 0


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (6, 1)])
def test_c038_a_small_source_holds_out_one(write, tokenizer, settings, count, held):
    path = write("m.jsonl", records(count))
    data = open_data(settings(train_data_path=str(path), eval_split=0.0001), tokenizer)
    assert len(data.train) == count - held
    assert (data.eval is None) == (held == 0) and (held == 0 or len(data.eval) == held)
    assert held or "no evaluation data: one conversation cannot be split; set eval_data_path" in data.notes


def test_c038_a_missing_half_is_built_again(write, tokenizer, settings):
    path = write("m.jsonl", records(50))
    first = open_data(settings(train_data_path=str(path), eval_split=0.2), tokenizer)
    shutil.rmtree(first.eval.path)
    again = open_data(settings(train_data_path=str(path), eval_split=0.2), tokenizer)
    assert (again.train.fingerprint, again.eval.fingerprint) == (first.train.fingerprint, first.eval.fingerprint)


def test_c038_overlap_of_train_and_eval_is_a_warning(write, tokenizer, settings):
    train, evaluation = write("t.jsonl", records(10)), write("e.jsonl", records(3) + records(2, "other"))
    data = open_data(settings(train_data_path=str(train), eval_data_path=str(evaluation), eval_split=0.5), tokenizer)
    assert (len(data.train), len(data.eval)) == (10, 5)
    assert any(note.startswith("warning: 3 conversations are in both") for note in data.notes)


def test_open_data_says_what_was_dropped_and_cut(write, tokenizer, settings):
    rows = [{"conversations": [{"from": "human", "value": "q"}]}]
    rows += [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a" * n}]} for n in (3, 200)]
    path = write("s.json", rows)
    for _ in range(2):  # the second time from the cache
        notes = open_data(settings(train_data_path=str(path)), tokenizer).notes
        assert f"{path}: 1 of 3 conversations dropped: no assistant turn" in notes
        assert any("1 of 2 conversations are longer than seq_length 64" in note for note in notes)
    assert not any("longer" in n for n in open_data(settings(train_data_path=str(path), packing="concat"), tokenizer).notes)


@pytest.mark.parametrize(
    ("name", "content", "changes", "text", "code"),
    [
        ("m.jsonl", None, {}, "train_data_path: no such file", 2),
        ("m.jsonl", "", {}, "m.jsonl: the file is empty", 65),
        ("m.jsonl", "{oops\n", {}, "m.jsonl:1: not valid JSON", 65),
        ("m.jsonl", [{"messages": [{"role": "user", "content": "q"}]}], {}, "m.jsonl:1: no assistant message", 65),
        ("s.json", [{"conversations": [{"from": "human", "value": "q"}]}], {}, "no conversation left to train on", 65),
        ("s.json", [{"conversations": [{"from": "human", "value": "q"}]}], {"eval_split": 0.1}, "no conversation left", 65),
        ("m.jsonl", records(3), {"vocab_size": 259}, "vocab_size=259 is too small for tokenizer bytes, which has 260 ids", 2),
        ("m.jsonl", records(3), {"data_format": "oasst"}, "m.jsonl:1: no OASST record", 65),
        (
            "m.jsonl",
            records(3),
            {"data_format": "sharegpt"},
            "m.jsonl:1: the record has the messages layout among sharegpt",
            65,
        ),
        ("m.jsonl", records(3), {"eval_data_path": "nowhere.jsonl"}, "eval_data_path: no such file", 2),
    ],
)
def test_bad_data_is_one_line(write, tokenizer, settings, tmp_path, name, content, changes, text, code):
    path = write(name, content) if content is not None else tmp_path / name
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            open_data(settings(train_data_path=str(path), **changes), tokenizer)
        assert text in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == code
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.glob("*.tmp-*"))


def test_r07_vocabulary_error_says_what_to_set(tokenizer, settings):
    with pytest.raises(DataError, match=r"set vocab_size=auto \(384\)"):
        open_data(settings(vocab_size=100), tokenizer)


def test_null_path_is_the_built_in_corpus(tokenizer, settings, monkeypatch):
    sample = pytest.importorskip("lumina_engine.data.sample")
    monkeypatch.setattr(sample, "conversations", lambda split: iter(talks(8 if split == "train" else 3, split)))
    data = open_data(settings(eval_split=0.5), tokenizer)
    assert data.is_sample and (len(data.train), len(data.eval)) == (8, 3)


def test_changed_data_get_another_store(write, tokenizer, settings):
    first = open_data(settings(train_data_path=str(write("m.jsonl", records(5)))), tokenizer)
    changed = open_data(settings(train_data_path=str(write("m.jsonl", records(5, "r")))), tokenizer)
    moved = open_data(settings(train_data_path=str(write("n.jsonl", records(5)))), tokenizer)
    assert changed.train.fingerprint != first.train.fingerprint
    assert moved.train.path == first.train.path


def test_progress_is_reported(tokenizer, tmp_path):
    seen = []
    build_store(talks(1200), tokenizer, tmp_path, source_digest="1", progress=lambda n, tokens: seen.append((n, tokens)))
    assert [n for n, _ in seen] == [500, 1000, 1200] and seen[-1][1] > seen[0][1] > 0


def test_no_store_is_none(tmp_path):
    assert open_verified(Path(tmp_path / "none")) is None


def test_ck17_the_build_lock_is_closed_to_others_and_never_a_link(tmp_path):
    with umask(0), locked(tmp_path, "made"):
        assert stat.S_IMODE((tmp_path / "locks" / "made.lock").stat().st_mode) == 0o600
    (tmp_path / "locks" / "linked.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="the cache folder cannot be used"), locked(tmp_path, "linked"):
        pass
    assert not (tmp_path / "elsewhere").exists()
