"""Being asked to end: the wish is noted, the step that runs is finished, and the run is saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "Signals"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a request to end: the run was saved first; the message says where, and how to go on."""


class Signals:
    """Within the block, the first Ctrl-C (or a polite request to end) only notes the wish; the second works as ever.

    >>> with Signals() as signals:
    ...     signal.raise_signal(signal.SIGINT)
    >>> signals.asked
    True
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._back()

    def _back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *error: object) -> None:
        self._back()
