"""The modules of Python's own standard library, as source files with the top-level name that each belongs to."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rankfold.errors import DataError

__all__ = ["Module", "library_modules"]

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclass(frozen=True)
class Module:
    """One source file.

    Args:
        name: dotted, for instance `email.message`.
        group: the top-level name, the unit of every split by module. The pure-Python twin of a C module (`_pyio`)
            belongs to the group of the module that it mirrors, since both share their docstrings.
        path: the file.
    """

    name: str
    group: str
    path: Path


def library_modules(root: Path | None = None) -> Iterator[Module]:
    """Every .py file of the standard library, in the order of the names; tests and installed packages are left out.

    Raises DataError when this Python comes without the sources.

    >>> "email.message" in {module.name for module in library_modules()}
    True
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        found = True
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        yield Module(name, parts[0].removeprefix("_py").lstrip("_") or parts[0], path)
    if not found:
        raise DataError(f"{root}: this Python has no library sources; give a file of your own instead of a stdlib-... set")
