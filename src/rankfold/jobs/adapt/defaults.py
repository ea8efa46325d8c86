"""Defaults of each task, as measured by `benchmarks/defaults.py` (results: benchmarks/results/defaults.json)."""

from collections.abc import Mapping
from typing import Any

__all__ = ["DEFAULTS"]

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "classify": {"lr": 1e-3, "epochs": 3.0, "batch_size": 32, "max_length": 128, "schedule": "linear", "warmup": 0.1},
    "embed": {"lr": 2e-3, "epochs": 1.0, "batch_size": 32, "max_length": 128, "schedule": "linear", "warmup": 0.1},
    "lm": {"lr": 1e-3, "epochs": 1.0, "batch_size": 8, "max_length": 256, "schedule": "cosine", "warmup": 0.05},
    "sft": {"lr": 5e-4, "epochs": 3.0, "batch_size": 8, "max_length": 512, "schedule": "cosine", "warmup": 0.05},
}
"""Task to the settings that it fills."""
