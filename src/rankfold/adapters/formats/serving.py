"""A folder for serving engines, which want one rank, no scale of their own, one dtype, and nothing but LoRA.

The scale is folded into B, ranks are filled up with zeros. Folding rounds, so the error of every site is measured and returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import CompositionError, OptionError

from ..adapter import STACKED, Adapter, Entry
from ..algebra import join_rows
from ..files import atomic_folder, write_json, write_tensors
from .peft import PREFIX
from .peft_config import CONFIG, TENSORS, factor_names, written
from .rounding import cast, relative_error

__all__ = ["ServingReport", "write_serving"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ServingReport:
    """What the export cost: the common rank, ‖Δ' − Δ‖ / ‖Δ‖ by site, and what could not go in."""

    rank: int
    errors: Mapping[str, float]
    left_out: tuple[str, ...] = field(default=())

    @property
    def largest(self) -> float:
        return max(self.errors.values(), default=0.0)


def write_serving(
    path: str | Path,
    adapter: Adapter,
    dtype: torch.dtype = torch.bfloat16,
    rank: int | None = None,
    base_model: str | None = None,
) -> ServingReport:
    """Write one rank for all sites, the scale folded into B, in one dtype.

    Args:
        dtype: of the written factors; bfloat16 loses about 2e-3 of every change.
        rank: the common rank; the largest one by default (many engines want a power of two).

    Raises:
        CompositionError: a magnitude or gain: engines know additive changes only. Or an adapter that changes no weight.
        OptionError: a rank below that of a site (truncate the adapter first), or another dtype.
        NumericError: a number that float16 can't hold.
        FileError: the folder can't be written.

    >>> import tempfile
    >>> q = Entry("q", torch.ones(3, 1), torch.ones(1, 2), scale=1 / 3)
    >>> k = Entry("k", torch.ones(3, 2), torch.ones(2, 2))
    >>> report = write_serving(tempfile.mkdtemp(), Adapter.of([q, k]))
    >>> report.rank, report.errors["k"], 0 < report.errors["q"] < 4e-3
    (2, 0.0, True)
    """
    if dtype not in DTYPES:
        raise OptionError(f"serving: dtype {dtype}; use one of {', '.join(str(d) for d in DTYPES)}")
    adapter = join_rows(adapter)
    rescaled = [k for k, e in adapter.entries.items() if not e.additive]
    if rescaled:
        raise CompositionError(
            f"serving: {rescaled[0]} and {len(rescaled) - 1} more sites rescale rows, which serving engines can't. "
            "Export --to folded, or --to peft for an engine that reads DoRA"
        )
    entries = {k: e for k, e in adapter.entries.items() if e.rank}
    other = [k for k, e in entries.items() if e.kind in (*STACKED, "multihead")]
    if other:
        raise CompositionError(
            f"serving: {other[0]} is of kind {entries[other[0]].kind}, which this form has no place for; use --to peft"
        )
    if not entries:
        raise CompositionError("serving: the adapter changes no weight")
    largest = max(e.rank for e in entries.values())
    rank = largest if rank is None else rank
    if rank < largest:
        raise OptionError(f"serving: rank {rank}, and the adapter needs {largest}; truncate it first, which reports its error")
    folded = {k: _folded(e, rank, dtype) for k, e in entries.items()}
    errors = {k: relative_error(e, folded[k]) for k, e in entries.items()}
    tensors: dict[str, Tensor] = {}
    for e in folded.values():
        a, b = factor_names(e.kind == "embedding")
        tensors[f"{PREFIX}{e.name}.{a}"], tensors[f"{PREFIX}{e.name}.{b}"] = e.A, e.B
    config = written(
        adapter.metadata.get("task_type"),
        base_model,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({e.name.rsplit(".", 1)[-1] for e in folded.values()}),
        bias="none",
        fan_in_fan_out=any(e.kind == "conv1d" for e in folded.values()),
    )
    with atomic_folder(path, owns=(CONFIG, TENSORS)) as folder:
        write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        write_json(folder / CONFIG, config)
    return ServingReport(rank, errors, tuple(adapter.extras))


def _folded(e: Entry, rank: int, dtype: torch.dtype) -> Entry:
    more = rank - e.rank
    B = torch.nn.functional.pad(e.B.double() * e.scale, (0, more))
    A = torch.nn.functional.pad(e.A, (0, 0, 0, more))
    B, A = (cast(t, dtype, f"serving: {e.key}") for t in (B, A))
    return Entry(e.name, B, A, 1.0, e.kind)
