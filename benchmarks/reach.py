"""The figures to reach, by benchmark and cell, and why one that is missed is missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Reach", "reach_of", "why"]


@dataclass(frozen=True)
class Reach:
    """Upper bounds: of the ratio to the floor, and of the share of peft's time."""

    ratio: float
    over_peft: float | None = None

    def __str__(self) -> str:
        return f"≤ {self.ratio:g}" + (f", ≤ {self.over_peft:g} × peft" if self.over_peft else "")

    def met(self, ratio: float, over_peft: float | None = None) -> bool:
        return ratio <= self.ratio and (self.over_peft is None or over_peft is None or over_peft <= self.over_peft)


STEP = {
    ("lora", "float32"): Reach(1.10),
    ("lora", "bfloat16"): Reach(1.15, 0.92),
    ("dora", "float32"): Reach(1.18),
    ("dora", "bfloat16"): Reach(1.26),
}
STEP_DROPOUT = {"lora": Reach(1.15)}
MODELS = ("llama", "minilm")
KEPT = {("lora", False): Reach(1.22), ("lora", True): Reach(1.22), ("dora", False): Reach(1.40)}


def reach_of(benchmark: str, cell: Mapping[str, Any]) -> Reach | None:
    """The figure of a cell, or None where none is set.

    >>> str(reach_of("B1", {"model": "llama", "method": "lora", "dtype": "float32", "dropout": 0.0}))
    '≤ 1.1'
    """
    if cell["model"] not in MODELS:
        return None
    method, dtype, dropped = cell["method"], cell["dtype"], bool(cell["dropout"])
    if benchmark == "B4":
        return KEPT.get((method, dropped)) if dtype == "bfloat16" else None
    return STEP_DROPOUT.get(method) if dropped else STEP[method, dtype]


def why(benchmark: str, cell: Mapping[str, Any]) -> str:
    """What a profile says of a figure that is missed; the numbers are of one linear of 512 x 512 at 256 tokens."""
    dora, bf16 = cell["method"] == "dora", cell["dtype"] == "bfloat16"
    if benchmark == "B4":
        return "x of the norms' outputs, which the floor does not keep" + (", and y of q, k, o and down_proj" if dora else "")
    if cell["dropout"]:
        return "positions to drop are drawn once and set three times: 0.13 ms beside products of 2.4 ms (bf16: 0.56 ms)"
    if dora and bf16:
        return "norms and elementwise passes take 0.16 ms, low-rank products 0.15 ms, beside 0.56 ms of the base's products"
    if bf16:
        return "the six low-rank products take 0.15 ms beside 0.56 ms of the base's: narrow ones run at a third of the speed"
    if cell["model"] == "minilm":
        return "small products: the fixed 0.05 ms of a site's calls weigh more"
    return "W Aᵀ for the norms takes 0.1 ms beside 2.4 ms of products" if dora else ""
