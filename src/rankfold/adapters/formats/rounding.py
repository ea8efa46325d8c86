"""What writing a change in another form costs: ‖Δ' − Δ‖ / ‖Δ‖, from the factors, without building either."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rankfold.errors import NumericError

from ..adapter import Adapter, Entry
from ..algebra import norm

__all__ = ["cast", "relative_error"]


def cast(t: Tensor, dtype: torch.dtype | None, where: str) -> Tensor:
    """The tensor in another dtype; as it is for None.

    Raises:
        NumericError: a number that the dtype holds as infinity.

    >>> cast(torch.tensor([1e5]), torch.float16, "q")
    Traceback (most recent call last):
    rankfold.errors.NumericError: q: holds 1e+05, and float16 ends at 65504; bfloat16 and float32 go further
    """
    if dtype is None or dtype == t.dtype:
        return t
    out = t.to(dtype)
    if not torch.isfinite(out).all() and torch.isfinite(t).all():
        short = str(dtype).removeprefix("torch.")
        raise NumericError(
            f"{where}: holds {float(t.abs().max()):g}, and {short} ends at {torch.finfo(dtype).max:.6g}; "
            "bfloat16 and float32 go further"
        )
    return out


def relative_error(before: Entry, after: Entry) -> float:
    """‖s'B'A' − sBA‖ / ‖sBA‖ in the Frobenius norm; 0 where nothing was changed. `after` may have more components, zeros beyond.

    The difference is (s'B' − sB) A' + sB (A' − A): two products of small differences, so that nothing cancels and an exact form
    gives exactly 0. Magnitudes are left aside.

    >>> e = Entry("q", torch.ones(3, 1) / 3, torch.ones(1, 2), scale=2.0)
    >>> folded = Entry("q", 2.0 * torch.nn.functional.pad(e.B, (0, 1)), torch.nn.functional.pad(e.A, (0, 0, 0, 1)))
    >>> relative_error(e, folded), round(relative_error(e, replace(e, B=e.B.bfloat16())), 6)
    (0.0, 0.001953)
    """
    more = after.rank - before.rank
    B = torch.nn.functional.pad(before.scale * before.B.double(), (0, more))
    A = torch.nn.functional.pad(before.A.double(), (0, 0, 0, more))
    left, right = after.scale * after.B.double() - B, after.A.double()
    size = _norm(before, B, A)
    difference = _norm(before, torch.cat([left, B], -1), torch.cat([right, right - A], -2))
    return difference / size if size else 0.0


def _norm(entry: Entry, B: Tensor, A: Tensor) -> float:
    return norm(Adapter.of([replace(entry, B=B, A=A, scale=1.0, magnitude=None, gain=None)]))
