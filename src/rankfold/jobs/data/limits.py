"""How much a reader takes before it refuses: files from strangers are checked before they are allocated."""

from dataclasses import dataclass
from pathlib import Path

from rankfold.errors import FileError

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one `read`.

    Args:
        size: bytes of all files together; for parquet and saved data sets, of the decompressed columns too.
        rows: rows of all files together.
        files: files of a folder.

    >>> Limits(rows=2).check_rows(3, "train.csv")
    Traceback (most recent call last):
    ...
    rankfold.errors.FileError: train.csv: 3 rows; at most 2 are read
      take a part of the file, or read it in Python with Limits(rows=...)
    """

    size: int = 2 * 1024**3
    rows: int = 20_000_000
    files: int = 200_000

    def check_size(self, size: int, source: str) -> None:
        """FileError when `size` bytes are too many."""
        self._check("size", size, "bytes", source)

    def check_rows(self, rows: int, source: str) -> None:
        """FileError when `rows` are too many."""
        self._check("rows", rows, "rows", source)

    def check_files(self, files: int, source: str) -> None:
        """FileError when a folder holds too many files."""
        self._check("files", files, "files", source)

    def load(self, path: Path) -> bytes:
        """The bytes of one file, its size checked first; FileError when it cannot be read."""
        try:
            self.check_size(path.stat().st_size, str(path))
            return path.read_bytes()
        except OSError as cause:
            raise FileError(f"{path}: cannot be read: {cause.strerror or cause}") from cause

    def _check(self, option: str, value: int, unit: str, source: str) -> None:
        bound = getattr(self, option)
        if value > bound:
            raise FileError(
                f"{source}: {value:,} {unit}; at most {bound:,} are read\n"
                f"  take a part of the file, or read it in Python with Limits({option}=...)"
            )
