"""Defaults of each task.

classify and embed: on the plateau of the sweep in `benchmarks/defaults.py` (benchmarks/results/defaults.json; SST-2, TREC and
stdlib-code with MiniLM, lora at the method's own rank of 16), a step below the rates that were best once, since 1e-2 already
diverges. lm and sft: the field's usual rates for LoRA, not swept here.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["DEFAULTS"]

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "classify": {"lr": 2e-3, "epochs": 3.0, "batch_size": 32, "max_length": 128, "schedule": "linear", "warmup": 0.1},
    "embed": {"lr": 3e-3, "epochs": 1.0, "batch_size": 32, "max_length": 128, "schedule": "linear", "warmup": 0.1},
    "lm": {"lr": 1e-3, "epochs": 1.0, "batch_size": 8, "max_length": 256, "schedule": "cosine", "warmup": 0.05},
    "sft": {"lr": 5e-4, "epochs": 3.0, "batch_size": 8, "max_length": 512, "schedule": "cosine", "warmup": 0.05},
}
"""Task to the settings that it fills."""
