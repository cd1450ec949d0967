"""C28: packed files and Parquet, told by content."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc

import pytest
import zstandard

from lumina_engine.data import files
from lumina_engine.data.conversation import DataError
from lumina_engine.data.files import expand, records
from lumina_engine.data.formats import convert, detect_format, read_conversations

ROWS = [
    {"messages": [{"role": "user", "content": f"q{n} é"}, {"role": "assistant", "content": "a" * n + "."}]} for n in range(50)
]
PACK = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "bz2": bz2.compress, "xz": lzma.compress}


def contents(paths):
    return [[m.content for m in c.messages] for c in read_conversations(paths)]


@pytest.fixture
def plain(write):
    return write("plain.jsonl", ROWS)


@pytest.mark.parametrize("kind", PACK)
def test_c028_packed_files_read_as_what_is_in_them(write, plain, kind):
    pack = PACK[kind]
    lines, text = plain.read_bytes(), "Once upon a time.\n\n" * 10
    assert contents(write("misnamed.jsonl", pack(lines))) == contents(plain)
    assert contents(write(f"list.json.{kind}", pack(json.dumps(ROWS, indent=1).encode()))) == contents(plain)
    assert detect_format(write(f"t.txt.{kind}", pack(text.encode()))) == "text"
    whole = write(f"d/x.jsonl.{kind}", pack(lines))
    assert expand(whole.parent) == [whole]
    found = list(records(whole, "jsonl"))
    assert [r.line for r in found] == list(range(1, 51)) and found[-1].offset == whole.stat().st_size
    two = write(f"two.jsonl.{kind}", pack(lines) + pack(lines))  # files joined by cat
    assert contents(two) == contents(plain) * 2


@pytest.mark.parametrize("kind", PACK)
def test_c028_damaged_packed_files_are_one_line(write, plain, kind):
    packed = PACK[kind](plain.read_bytes() * 50)
    for at, path in ((len(packed) // 2, "cut"), (len(packed) - 5, "end")):
        with pytest.raises(DataError, match="the packed file is damaged") as caught:
            contents(write(f"{path}.jsonl.{kind}", packed[:at]))
        assert "\n" not in str(caught.value)


def test_c028_a_bomb_fills_no_memory(write, monkeypatch):
    """64 MiB in one line, packed to a few KB: refused after the longest record."""
    monkeypatch.setattr(files, "MAX_RECORD", 1 << 20)
    compressor = zstandard.ZstdCompressor().compressobj()
    body = b"".join(compressor.compress(b"0" * (1 << 20)) for _ in range(64)) + compressor.flush()
    path = write("bomb.jsonl", body)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(DataError, match="the record is longer than 1 MiB"):
        list(records(path, "jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_c028_reading_goes_on_behind_a_record_that_is_too_long(write, monkeypatch):
    monkeypatch.setattr(files, "MAX_RECORD", 1000)
    rows = [ROWS[0], {"messages": [{"role": "user", "content": "x" * 2000}]}, ROWS[1]]
    errors: list[DataError] = []
    assert [r.line for r in records(write("x.jsonl", rows), "jsonl", errors.append)] == [1, 3]
    assert [e.line for e in errors] == [2]
    monkeypatch.setattr(files, "_CHUNK", 500)
    monkeypatch.setattr(files._Window.more, "__defaults__", (500,))
    with pytest.raises(DataError, match="the record is longer than"):
        list(records(write("x.json", [ROWS[0], {"instruction": "x" * 5000}]), "json"))


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    import pyarrow.parquet as pq

    def make(name, rows):
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path

    return make


def test_c028_parquet_in_every_layout(parquet, plain):
    assert contents(parquet("m.parquet", ROWS)) == contents(plain)
    path = parquet("misnamed.json", [{"instruction": "q", "input": None, "output": "a"}])
    assert (detect_format(path), contents(path)) == ("alpaca", [["q", "a"]])
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert contents(parquet("s.parquet", [{"conversations": talk, "id": n} for n in range(3)])) == [["q", "a"]] * 3
    texts = read_conversations(parquet("t.parquet", [{"text": "once"}, {"text": "twice"}]))
    assert [d.text for d in texts] == ["once", "twice"]


def test_c028_parquet_rows_are_numbered_and_read_in_batches(parquet, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}]}, *ROWS]
    path = parquet("m.parquet", rows)
    done = convert(path, tmp_path / "o.jsonl")
    assert done.written == 50 and done.tally.dropped == {"no assistant turn": 1}
    assert json.loads(done.rejects.read_text())["line"] == 1
    found = list(records(path, "parquet"))
    assert [r.line for r in found] == list(range(1, 52)) and found[-1].offset == path.stat().st_size


def test_c028_damaged_parquet_is_one_line(parquet):
    path = parquet("m.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="the Parquet file is damaged") as caught:
        contents(path)
    assert "\n" not in str(caught.value)


def _holding(kind, rows, bad):
    """`rows` with a column `seen` of a type whose value in row `bad` Python cannot hold."""
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")

    values = {"timestamp[ns]": 1, "date32": 10**7, "string": b"\xff\xfe"}
    column = [values[kind] if n == bad else b"" if kind == "string" else 0 for n in range(len(rows))]
    made = {
        "timestamp[ns]": lambda: pa.array(column, pa.int64()).cast(pa.timestamp("ns")),
        "date32": lambda: pa.array(column, pa.int32()).cast(pa.date32()),
        "string": lambda: pa.array(column, pa.binary()).view(pa.string()),
    }[kind]()
    return pa.Table.from_pylist(rows), made


@pytest.mark.parametrize("kind", ["timestamp[ns]", "date32", "string"])
def test_c028_a_parquet_value_that_python_cannot_hold_costs_nothing_where_it_is_not_read(tmp_path, plain, kind):
    table, column = _holding(kind, ROWS, 3)
    import pyarrow.parquet as pq

    pq.write_table(table.append_column("seen", column), tmp_path / "m.parquet")
    assert contents(tmp_path / "m.parquet") == contents(plain)


@pytest.mark.parametrize("kind", ["timestamp[ns]", "date32", "string"])
def test_c028_a_parquet_value_that_python_cannot_hold_is_an_error_of_its_row(tmp_path, kind):
    table, column = _holding(kind, [{"instruction": f"q{n}", "output": "a"} for n in range(9)], 3)
    path = tmp_path / "a.parquet"
    import pyarrow.parquet as pq

    pq.write_table(table.append_column("input", column), path)
    with pytest.raises(DataError, match=r"a\.parquet:\d: .*; ") as caught:
        contents(path)
    assert "\n" not in str(caught.value)
    if kind == "string":  # of the others no value is text
        assert caught.value.line == 4 and "column 'input' (string) holds a value that cannot be read" in str(caught.value)
        done = convert(path, tmp_path / "o.jsonl")
        assert done.written == 8 and done.tally.dropped == {"unreadable value": 1}


@pytest.mark.parametrize("bad", [0, 2])
def test_c028_a_parquet_value_that_python_cannot_hold_condemns_no_file_from_its_first_row(tmp_path, bad):
    """Wherever it stands, in the column that tells the layout or in one that is kept, and with several instances in a row."""
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    import pyarrow.parquet as pq

    stamps = pa.array([1 if n == bad else 1000 for n in range(3)], pa.int64()).cast(pa.timestamp("ns"))
    roles, said = pa.array(["user", "assistant"] * 3), pa.array(["q", "a"] * 3)
    turns = pa.StructArray.from_arrays([roles, said, stamps.take(pa.array([0, 0, 1, 1, 2, 2]))], ["role", "content", "created"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4, 6], turns)}), tmp_path / "m.parquet")
    pairs = pa.StructArray.from_arrays([pa.array(["x", "y"] * 3), pa.array(["a", "b"] * 3)], ["input", "output"])
    tasks = pa.array([b"\xff" if n == bad else b"t" for n in range(3)], pa.binary()).view(pa.string())
    columns = {"instruction": ["i"] * 3, "instances": pa.ListArray.from_arrays([0, 2, 4, 6], pairs), "task": tasks}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    done = convert(tmp_path / "m.parquet", tmp_path / "m.jsonl")
    assert (done.written, done.tally.dropped) == (2, {"unreadable value": 1})
    done = convert(tmp_path / "a.parquet", tmp_path / "a.jsonl")
    assert (done.written, done.tally.dropped) == (4, {"unreadable value": 2})


def test_c028_without_pyarrow_the_extra_is_named(write, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'lumina\[parquet\]'"):
        contents(write("x.parquet", b"PAR1rest"))
