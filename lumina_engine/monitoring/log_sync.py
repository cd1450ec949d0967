"""Bringing a log that only grows onto the disk: on demand, and at intervals in a thread. Standard library only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 20  # bytes written a second time at once


class LogSync:
    """`fdatasync` for one writer of a log. Every method is safe from several threads.

    A failed `fdatasync` is not repeated in good faith: the kernel may have dropped the pages it could not write, and the next
    call would then succeed without them. The doubtful bytes are written a second time first.

    Args:
        path: the log.
        descriptor: the writer's, open for reading too.
        end: tells the byte after the last whole record that was written.
        interval: seconds between two syncs of the thread; 0 for no thread.
        warn: told in one line when a sync of the thread fails.
    """

    def __init__(
        self, path: Path, descriptor: int, end: Callable[[], int], interval: float, warn: Callable[[str], None]
    ) -> None:
        self._path, self._fd, self._end, self._warn = path, descriptor, end, warn
        self._lock = threading.Lock()
        self._safe = end()  # every byte before it is on the disk, once `_clean` was true
        self._clean = False  # the writer before this one may have left something to sync
        self._doubtful = False  # the last fdatasync failed
        self._untold: OSError | None = None  # of the thread, of which no caller has heard yet
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if interval > 0:
            self._thread = threading.Thread(target=self._loop, args=(interval,), name="log-sync", daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Return when every byte written before this call is on the disk.

        Raises:
            OSError: the disk reports an error, now or to the thread since the last call: a power cut may lose records.
        """
        with self._lock:
            if self._untold is not None:
                error, self._untold = self._untold, None
                raise error
            self._bring()

    def close(self) -> None:
        """End the thread and sync a last time; a failure is a warning."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._in_background()

    def _loop(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self._in_background()

    def _in_background(self) -> None:
        with self._lock:
            try:
                self._bring()
            except OSError as error:
                self._untold = error
                self._warn(f"{self._path}: {error.strerror}: the last records may be lost at a power cut")

    def _bring(self) -> None:
        end = self._end()
        if self._clean and end == self._safe:
            return
        if self._doubtful:
            self._write_again(self._safe, end)
        self._clean = False
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._doubtful = True
            raise
        self._clean, self._doubtful, self._safe = True, False, end

    def _write_again(self, start: int, end: int) -> None:
        """The same bytes at the same place, so that the kernel has them to write; O_APPEND would put them elsewhere."""
        again = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while start < end:
                data = os.pread(self._fd, min(_BLOCK, end - start), start)
                start += os.pwrite(again, data, start)
        finally:
            os.close(again)
