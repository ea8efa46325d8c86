"""Results as JSON, one file per benchmark, written whole after every cell: a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .protocol import conditions

__all__ = ["FOLDER", "Results", "source_hash"]

FOLDER = Path(__file__).parent / "results"
STEP = ("linalg", "kernels", "core", "methods/structures")
WHOLE = ("",)
MEASURED = {"B7": WHOLE, "B11": WHOLE}
"""The folders of the package whose state a result depends on; those of a training step where not said otherwise."""


@cache
def source_hash(folders: tuple[str, ...] = STEP) -> str:
    """Of the source that is measured: a result belongs to one state of it."""
    import rankfold

    root = Path(rankfold.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(f for folder in folders for f in (root / folder).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """The cells of one benchmark.

    Args:
        benchmark: its name, "B1"; the file is b1.json.
        folder: where.
        resume: skip cells that were measured under the same conditions and source.
    """

    def __init__(self, benchmark: str, folder: Path = FOLDER, resume: bool = False) -> None:
        self.path = folder / f"{benchmark.lower()}.json"
        self.benchmark = benchmark
        self.resume = resume
        self.cells: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]

    def measure(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one cell and write it down at once, with the conditions it ran under; or give what is there."""
        found = self.standing(key)
        if found is not None:
            return found
        here = self._conditions()
        return self.put(key, run(), here)

    def standing(self, key: str) -> dict[str, Any] | None:
        """A cell that need not be measured again: there from a run under the same conditions and source, and asked to be kept."""
        found = self.cells.get(key)
        return found if self.resume and found is not None and self._same(found["conditions"]) else None

    def put(self, key: str, cell: dict[str, Any], here: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write down a cell, whole or as far as it is, with the conditions that it ran under."""
        self.cells[key] = {**cell, "conditions": self._conditions() if here is None else here}
        self.write()
        return self.cells[key]

    def _conditions(self) -> dict[str, Any]:
        return {**conditions(), "source": source_hash(MEASURED.get(self.benchmark, STEP))}

    def _same(self, before: dict[str, Any]) -> bool:
        varying = ("load", "date")
        return all(before.get(k) == v for k, v in self._conditions().items() if k not in varying)

    def forget_all_but(self, keys: set[str]) -> None:
        """Drop cells of methods that are no longer there."""
        self.cells = {k: v for k, v in self.cells.items() if k in keys}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps({"benchmark": self.benchmark, "cells": self.cells}, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)
