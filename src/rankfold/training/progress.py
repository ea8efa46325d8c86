"""A progress bar for whatever takes longer than two seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

__all__ = ["AFTER", "Progress"]

AFTER = 2.0  # seconds: what is over sooner needs no bar


class Progress:
    """A bar on the error stream, shown once the work has taken two seconds, on a terminal only.

    >>> with Progress("train", total=2, show=False) as bar:
    ...     bar.at(1, "loss 0.5")
    """

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        self.label, self.total, self.show = label, total, show
        self.began = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def at(self, done: int, text: str = "") -> None:
        """So much is done; `text` stands behind the bar."""
        if not self.show or (self.bar is None and time.monotonic() - self.began < AFTER):
            return
        if self.bar is None:
            self._open()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        console = Console(stderr=True)
        if not console.is_terminal:
            self.show = False
            return
        parts = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self.bar = Rich(*parts, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task(self.label, total=self.total, text="")
        self.bar.start()
