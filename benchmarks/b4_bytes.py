"""B4: bytes that autograd keeps between forward and backward, and the peak of a step, over those of the frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .contenders import TOLERANCE, Cell, contenders
from .models import loss
from .protocol import kept_bytes, peak_bytes
from .results import Results

__all__ = ["cells", "measure", "run"]


def cells(size: str = "short") -> Iterator[Cell]:
    """Both methods with and without dropout, bf16 base; "all" adds float32 and 2048 tokens."""
    if size == "toy":
        yield Cell("tiny", "lora", 4, "bfloat16", 8)
        return
    for tokens in (256, 2048) if size == "all" else (256,):
        for dtype in ("bfloat16", "float32") if size == "all" else ("bfloat16",):
            for model, rank in (("llama", 16), ("minilm", 8)) if size == "all" else (("llama", 16),):
                for method in ("lora", "dora"):
                    for dropout in (0.0, 0.05):
                        yield Cell(model, method, rank, dtype, tokens, dropout)


def measure(cell: Cell) -> dict[str, Any]:
    """Bytes, not times: one pass is enough."""
    trio = contenders(cell)
    errors = trio.check(TOLERANCE[cell.dtype])
    known = trio.known()
    kept, peak = {}, {}
    for name, model in trio.models.items():
        step = trio.step(name)
        step()  # gradients that stay, and caches, are there before anything is counted
        kept[name] = kept_bytes(lambda model=model: loss(model, trio.x), known)
        peak[name] = peak_bytes(step)
    ratios = {name: round(kept[name] / kept["floor"], 4) for name in kept}
    peaks = {name: round(peak[name] / peak["floor"], 4) for name in peak}
    return {"cell": cell.record(), "kept": kept, "peak": peak, "kept/floor": ratios, "peak/floor": peaks, "errors": errors}


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    for cell in cells(size):
        if only and not any(part in cell.key for part in only):
            continue
        row = results.measure(cell.key, lambda cell=cell: measure(cell))
        kept, peak = row["kept/floor"], row["peak/floor"]
        print(
            f"B4 {cell.key:42} kept: ours {kept['ours']:.3f}, peft {kept['peft']:.3f} x floor   "
            f"peak: ours {peak['ours']:.3f}, peft {peak['peft']:.3f}",
            flush=True,
        )
