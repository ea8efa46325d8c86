"""Files and folders that are replaced as a whole, or not at all: written aside, flushed to the disk, then renamed.

A process killed at any moment, or a full disk, leaves the previous version whole.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rankfold.errors import FileError

ABANDONED = 3600.0  # seconds after which a folder that is still being written is taken for a dead one

__all__ = ["atomic_file", "atomic_folder", "recover_folder", "write_text"]


def flush_folder(path: Path) -> None:
    """Put the names in a folder on the disk; systems whose folders can't be opened need no such call."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _failed(path: Path, error: OSError) -> FileError:
    had = "the previous version is untouched" if path.exists() else "nothing was left behind"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"; {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there"
        except OSError:
            free = ""
        return FileError(f"{path}: no space left on the disk{free}; {had}. Free some space, or choose another folder")
    return FileError(f"{path}: can't be written ({error.strerror or error}); {had}")


def atomic_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` write a file beside `path`, then put it in its place.

    Raises:
        FileError: the disk is full or the place can't be written; `path` is as it was.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> atomic_file(path, lambda temporary: temporary.write_text("whole"))
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, mode)  # some writers make files that only their owner can read
        flush_file(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        # a failed clean-up must not hide why the write failed
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as a whole, or not at all."""
    atomic_file(Path(path), lambda temporary: _write(temporary, text))


def _write(temporary: Path, text: str) -> None:
    temporary.write_text(text, encoding="utf-8", newline="\n")


def _aside(path: Path, mark: str) -> list[Path]:
    """Folders left beside `path` by an interrupted save, oldest first."""
    if not path.parent.is_dir():
        return []
    found = [p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.") and p.name.endswith(mark) and p.is_dir()]
    return sorted(found, key=lambda p: p.stat().st_mtime)


def recover_folder(path: str | Path) -> None:
    """Put a folder back that is missing because a save was killed in the middle of its swap; else does nothing.

    The swap is two renames: the old folder aside, the new one in. Killed between them, both stand beside `path`; the new one is
    complete (it was flushed before), so it goes in. Readers call this first.

    Raises:
        FileError: the place can't be written.
    """
    path = Path(path)
    try:
        for left in [*reversed(_aside(path, ".ready")), *reversed(_aside(path, ".old"))]:
            if not path.exists():
                os.rename(left, path)
    except OSError as error:
        raise FileError(f"{path}: an interrupted save beside it can't be repaired ({error.strerror or error})") from error


def _clean(path: Path, owns: Sequence[str]) -> None:
    """Remove what killed saves left beside `path`, after taking over what their old folder held for others."""
    recover_folder(path)
    for old in _aside(path, ".old"):
        _carry(old, path, owns)
    for left in [*_aside(path, ".ready"), *(p for p in _aside(path, ".tmp") if time.time() - p.stat().st_mtime > ABANDONED)]:
        shutil.rmtree(left, ignore_errors=True)


def _carry(old: Path, path: Path, owns: Sequence[str]) -> None:
    """Move what is not the writer's own from the old folder into the new one, and drop the rest."""
    for item in old.iterdir():
        if not any(fnmatch.fnmatchcase(item.name, pattern) for pattern in owns) and not (path / item.name).exists():
            os.rename(item, path / item.name)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path, owns: Sequence[str] = ("*",)) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends without an error.

    Args:
        path: the folder to replace or make.
        owns: globs of the names that this writer owns. They are replaced as one: an owned file that is not written again is
            gone. Whatever else is in `path` (a report beside an adapter) is carried over.

    Raises:
        FileError: `path` is a file or a link, or can't be written, or the disk is full; the previous folder is whole.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run"
    >>> for text in ("one", "two"):
    ...     with atomic_folder(path) as folder:
    ...         write_text(folder / "a.txt", text)
    >>> (path / "a.txt").read_text(), [p.name for p in path.parent.iterdir()]
    ('two', ['run'])
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileError(f"{path}: is not a folder; give the name of a folder that is new or was written by rankfold")
    token = uuid.uuid4().hex[:8]
    writing = path.with_name(f".{path.name}.{token}.tmp")
    ready = path.with_name(f".{path.name}.{token}.ready")
    old = path.with_name(f".{path.name}.{token}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path, owns)
        writing.mkdir()
        yield writing
        for root, _, names in os.walk(writing):
            for name in names:
                flush_file(Path(root) / name)
            flush_folder(Path(root))
        if path.exists():
            shutil.copymode(path, writing)
        os.rename(writing, ready)  # from here on it is complete: a reader that finds `path` missing puts it in
        flush_folder(path.parent)
        if path.exists():
            os.rename(path, old)
        if ready.exists():
            os.rename(ready, path)
        flush_folder(path.parent)
        if old.exists():
            _carry(old, path, owns)
    except OSError as error:
        recover_folder(path)
        raise _failed(path, error) from error
    finally:
        for left in (writing, ready):
            shutil.rmtree(left, ignore_errors=True)
