"""Files that are named by a URL (`s3://bucket/x.jsonl`, `memory://data/*.parquet`), read through fsspec.

A `RemoteFile` is to the readers what a `Path` is: they open it, ask its size and print it, no more. Which protocols there are
depends on the packages that are installed; torch brings fsspec itself.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, cast

from .conversation import DataError


def is_remote(name: str) -> bool:
    """Whether a path is a URL."""
    return "://" in name


def local(name: str) -> str:
    """The path of a `file://` or `local://` URL, which is a file here as any other; another name as it is."""
    return name.removeprefix("file://").removeprefix("local://")


def local_output(output: str | os.PathLike[str]) -> Path:
    """The file to write to. Raises `DataError` for a URL: the path of that name would be a folder here, `s3:`."""
    if is_remote(os.fspath(output)):
        raise DataError("a URL cannot be written to", path=output, fix="name a local file", exit_code=2)
    return Path(output)


class RemoteFile(os.PathLike[str]):
    """One file behind a URL. Equal URLs are equal."""

    def __init__(self, url: str, system: Any, inner: str) -> None:
        self._url, self._system, self._inner = url, system, inner

    def __str__(self) -> str:
        return self._url

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"RemoteFile({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __lt__(self, other: object) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._inner).name

    @property
    def suffix(self) -> str:
        """As of a `Path`."""
        return PurePosixPath(self._inner).suffix

    @property
    def stem(self) -> str:
        """As of a `Path`."""
        return PurePosixPath(self._inner).stem

    def resolve(self) -> RemoteFile:
        """Itself: a URL has no links to follow."""
        return self

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The content, to read and to seek in. Raises OSError."""
        return _as_os_error(lambda: self._system.open(self._inner, mode))

    def stat(self) -> Any:
        """`st_size` in bytes. Raises OSError."""
        return SimpleNamespace(st_size=int(_as_os_error(lambda: self._system.size(self._inner)) or 0))

    def version(self) -> str:
        """What changes when the content does, as far as the service tells: its own tag, time and size."""
        return str(_as_os_error(lambda: self._system.ukey(self._inner)))


def _as_os_error(ask: Any) -> Any:
    """Services have errors of their own kinds; the readers know those of files."""
    try:
        return ask()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _system(url: str, key: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise DataError(
            f"{key}: {error}", path=url, fix="install what the protocol needs, or copy the data", exit_code=2
        ) from None


def remote_file(url: str) -> Path:
    """The file of a URL as `remote_files` gave it. Raises `DataError`."""
    system, inner = _system(url, "data path")
    return cast(Path, RemoteFile(url, system, inner))


def remote_files(url: str, key: str, suffixes: tuple[str, ...], rejects: str) -> list[Path]:
    """The files that a URL names: one, those of a folder with these endings (packed ones, too), or a glob; sorted.

    Those that end on `rejects` are left out, unless the URL ends on it too.

    Raises `DataError` for what names nothing or cannot be asked.
    """
    system, inner = _system(url, key)
    scheme = url.partition("://")[0]
    try:
        if any(mark in inner for mark in "*?["):
            names = [name for name in system.glob(inner) if system.isfile(name)]
        elif system.isdir(inner):
            names = [name for name in system.find(inner) if any(s in suffixes for s in PurePosixPath(name).suffixes[-2:])]
        else:
            names = [inner] if system.exists(inner) else []
        names = [name for name in names if inner.endswith(rejects) or not name.endswith(rejects)]
    except Exception as error:  # of the service: no rights, no such host
        raise DataError(
            f"{key}: cannot be asked for ({type(error).__name__}: {error})",
            path=url,
            fix="check the URL and the rights",
            exit_code=2,
        ) from None
    if not names:
        raise DataError(f"{key}: there is no such file", path=url, fix="check the URL", exit_code=2)
    urls = {name: name if is_remote(name) else f"{scheme}://{name}" for name in sorted(names)}
    return [cast(Path, RemoteFile(url, system, name)) for name, url in urls.items()]
