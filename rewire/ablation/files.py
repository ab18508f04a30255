"""Writing files so that whoever stops the process, at whatever moment, leaves none half-written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rewire.errors import RewireError


class StorageError(RewireError):
    """A file cannot be written: the disk is full, or the folder is not ours to write to."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """What the system refuses inside becomes a :class:`StorageError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {path}: {error.strerror or error}") from error


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give ``path`` new contents: whoever reads it sees all of the old ones or all of the new ones.

    Args:
        write: puts them into the open file it is given.

    Raises:
        StorageError: they cannot be written; ``path`` is as it was.
    """
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One process writes a file at a time; a name that is always the same leaves no litter behind.
        new = path.with_name(f".{path.name}.new")
        try:
            with new.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        except RuntimeError as error:  # torch's writer says so when the disk is full
            new.unlink(missing_ok=True)
            if "write" in str(error).lower() or "unexpected pos" in str(error).lower():
                raise OSError(f"{error}".splitlines()[0]) from error
            raise
        _sync_folder(path.parent)


def append(path: Path, line: str) -> None:
    """Add ``line`` and a line break, in one write that is on disk when this returns.

    Raises:
        StorageError: it cannot be written; the file is as it was.
    """
    data = line.encode() + b"\n"
    with storing(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                if os.write(handle, data) != len(data):
                    raise OSError(28, os.strerror(28))  # part of it was written: there is no room for the rest
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def _sync_folder(folder: Path) -> None:
    """A renamed file is safe once its folder is on disk; not every system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
