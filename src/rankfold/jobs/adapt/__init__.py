"""The main job: fit a model to own data. Settings are readable without torch; the rest is imported when a run starts."""

import importlib
from typing import TYPE_CHECKING, Any

from .settings import AdaptSettings, PredictSettings, parse_set

if TYPE_CHECKING:
    from .predict import predict_job
    from .run import Result, adapt_job

_HOME = {"Result": "run", "adapt_job": "run", "predict_job": "predict"}

__all__ = ["AdaptSettings", "PredictSettings", "Result", "adapt_job", "parse_set", "predict_job"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
