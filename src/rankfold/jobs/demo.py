"""The demo: search over a code base made better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["demo"]


def demo(out: str | Path = "runs/demo", *, seed: int = 0, threads: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """Run the demo, print its table, write adapter, metrics.json and report.html into `out`."""
    raise NotImplementedError
