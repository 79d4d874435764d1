"""Where archived files are: a folder, or anything that fsspec reaches. Everything here blocks.

Rule 1: a file is made aside, and gets its name when it is whole.
Rule 2: what goes wrong is an `ArchiveUnavailable` that names the kind of error only: addresses carry secrets.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from streamjobs.errors import ArchiveUnavailable, ConfigError, StreamjobsError


class Target(Protocol):
    """A place for files, by names with `/` between folders."""

    def stage(self, name: str) -> Path:
        """An empty file of our own to fill, which `commit` or `discard` ends."""
        ...

    def commit(self, staged: Path, name: str) -> None:
        """Give a filled file its name, in place of what has it."""
        ...

    def discard(self, staged: Path) -> None:
        """Remove a file that was not committed."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Read a file. Raises `FileNotFoundError`."""
        ...

    def remove(self, name: str) -> bool:
        """Remove a file; False where there is none."""
        ...


def target_of(url: str) -> Target:
    """The place that a setting names. Raises `ConfigError` for one that cannot be used."""
    parts = urlsplit(url)
    if "://" not in url:
        return Folder(Path(url))
    if parts.scheme == "file":
        if parts.netloc not in {"", "localhost"}:
            raise ConfigError("setting 'archive_url': a file:// address has three slashes: file:///folder")
        return Folder(Path(unquote(parts.path)))
    return Remote(*_filesystem(url))


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        fsspec = import_module("fsspec.core")
    except ImportError as error:
        raise ConfigError(
            "setting 'archive_url': an address needs fsspec: pip install 'streamjobs[archive]'"
        ) from error
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"setting 'archive_url': {error}") from error


@contextlib.contextmanager
def troubles() -> Generator[None, None, None]:
    """Turn whatever a target raises into `ArchiveUnavailable`, but for a file that is not there."""
    try:
        yield
    except (FileNotFoundError, StreamjobsError):
        raise
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else ""
        kind = type(error).__name__
        raise ArchiveUnavailable(f"the archive: {kind} {why}".rstrip()) from error


class Folder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def stage(self, name: str) -> Path:
        """A hidden file beside what it will be."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        staged.touch(mode=0o600, exist_ok=False)
        return staged

    def commit(self, staged: Path, name: str) -> None:
        """Survives a power loss once it returns; what killed writers of this file left is removed."""
        path = self._root / name
        try:
            _sync(staged)
            staged.replace(path)
        except FileNotFoundError:
            if not path.exists():
                raise ArchiveUnavailable("the archive: a file vanished before it had its name") from None
            return  # who wrote the same job at the same time was first, and took ours for a dead writer's
        _sync(path.parent)
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)

    def discard(self, staged: Path) -> None:
        """Remove it."""
        staged.unlink(missing_ok=True)

    def open(self, name: str) -> BinaryIO:
        """Read a file."""
        return (self._root / name).open("rb")

    def remove(self, name: str) -> bool:
        """Remove a file."""
        path = self._root / name
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        _sync(path.parent)
        return True


class Remote:
    """A file system of fsspec's. It must show a file only when it is whole, as object stores do."""

    def __init__(self, files: Any, root: str) -> None:
        self._files = files
        self._root = root.rstrip("/")

    def stage(self, name: str) -> Path:
        """A temporary file of this machine."""
        handle, path = tempfile.mkstemp(prefix="streamjobs-")
        os.close(handle)
        return Path(path)

    def commit(self, staged: Path, name: str) -> None:
        """Send it."""
        self._files.put_file(str(staged), self._path(name))
        staged.unlink()

    def discard(self, staged: Path) -> None:
        """Remove it."""
        staged.unlink(missing_ok=True)

    def open(self, name: str) -> BinaryIO:
        """Read a file."""
        return self._look(lambda: self._files.open(self._path(name), "rb"))

    def remove(self, name: str) -> bool:
        """Remove a file."""
        try:
            self._look(lambda: self._files.info(self._path(name)))
        except FileNotFoundError:
            return False
        self._files.rm_file(self._path(name))
        return True

    def _look(self, act: Callable[[], Any]) -> Any:
        """Listings that are kept would hide what another process has written or removed."""
        self._files.invalidate_cache()
        return act()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
