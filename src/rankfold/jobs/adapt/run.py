"""`adapt_job`: from settings to an adapter, its figures and a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import AdaptSettings

__all__ = ["Result", "adapt_job"]


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    out: Path | None
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def adapt_job(settings: AdaptSettings) -> Result:
    """Run the job; prints the summary unless `settings.quiet`."""
    raise NotImplementedError
