"""TensorBoard event files, written without TensorBoard: its package brings gRPC and a server, torch's writer brings torch.

The format (tensorflow/core/util/event.proto, tensorflow/core/lib/io/record_writer.h): a file is a sequence of frames, each
`u64 length, u32 masked CRC-32C of the length, payload, u32 masked CRC-32C of the payload`, little-endian; a payload is an
`Event` message. Only what is used is encoded: `wall_time`, `step`, `file_version`, `summary` (scalars and texts) and
`session_log`, whose START makes readers drop what an abandoned branch of the run left at its step and above.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable
from typing import Any

from .points import Point, Subject

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
_MASK = 0xA282EAD8
_START = 1  # SessionLog.START
_STRING = 7  # DataType.DT_STRING


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def frame(payload: bytes) -> bytes:
    """One record of the file."""
    length = struct.pack("<Q", len(payload))
    return length + _masked(length) + payload + _masked(payload)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _scalar(tag: str, value: float) -> bytes:
    """A Summary.Value: field 1 its tag, field 2 the number (float32, as TensorBoard keeps it)."""
    try:
        number = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        number = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _bytes(1, _bytes(1, tag.encode()) + _varint(2 << 3 | 5) + number)


def _line(tag: str, text: str) -> bytes:
    """A Summary.Value for the text plug-in: a string tensor of one element (field 8) and the plug-in's name (field 9)."""
    shape = _bytes(2, _bytes(2, _integer(1, 1)))
    tensor = _integer(1, _STRING) + shape + _bytes(8, text.encode())
    return _bytes(1, _bytes(1, f"{tag}/text_summary".encode()) + _bytes(8, tensor) + _bytes(9, _bytes(1, _bytes(1, b"text"))))


def _event(t: float, step: int, body: bytes) -> bytes:
    return frame(_varint(1 << 3 | 1) + struct.pack("<d", t) + _integer(2, step) + body)


def encode(point: Point) -> bytes:
    """The frames of one point."""
    out = b""
    if point.rewind is not None:
        out += _event(point.t, point.rewind + 1, _bytes(7, _integer(1, _START)))
    summary = b"".join(_scalar(name, value) for name, value in point.values.items())
    if point.text is not None:
        summary += _line(*point.text)
    return out + _event(point.t, point.step, _bytes(5, summary)) if summary else out


class Sink:
    """One event file in the tracker's folder: `tensorboard --logdir` of the runs' folder finds it.

    The mark is the file's name and size. Going on from it cuts off what was written after it, so that a record delivered
    twice stands there once.
    """

    def __init__(self, subject: Subject, mark: Any) -> None:
        name = mark["file"] if mark else f"events.out.tfevents.{int(time.time())}.lumina"
        size = mark["size"] if mark else 0
        self._file = os.open(subject.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._name = name
        if os.fstat(self._file).st_size < size:  # somebody emptied it: a reader needs the version first
            size = 0
        os.ftruncate(self._file, size)
        os.lseek(self._file, size, os.SEEK_SET)
        self._waiting = bytearray()
        if size == 0:
            self._waiting += _event(time.time(), 0, _bytes(3, b"brain.Event:2"))
            settings = "\n".join(f"    {key}: {value}" for key, value in subject.config.items())
            self._waiting += _event(time.time(), 0, _bytes(5, _line("config", settings)))

    def write(self, points: Iterable[Point]) -> None:
        for point in points:
            self._waiting += encode(point)

    def flush(self) -> Any:
        while self._waiting:
            del self._waiting[: os.write(self._file, self._waiting)]
        os.fdatasync(self._file)
        return {"file": self._name, "size": os.lseek(self._file, 0, os.SEEK_CUR)}

    def close(self, state: str | None) -> None:
        os.close(self._file)
