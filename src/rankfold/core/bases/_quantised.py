"""What packed formats share: products without a dense copy, blocks of rows that are dequantised and freed, cached row norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.linalg import Operator, like

from ..base import Base
from ..kinds import weight_of

__all__ = ["QuantisedBase", "at_most_float32"]

BLOCK_BYTES = 32 << 20
"""Of one dequantised block of rows in float32: large enough for a fast product, far below a large weight."""


def at_most_float32(dtype: torch.dtype) -> torch.dtype:
    """The nearest dtype that the libraries can dequantise to."""
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True, eq=False)
class QuantisedBase(Base):
    """A frozen weight Q(W) in a packed format. It is a constant: x Q(W)ᵀ by the library's product, g Q(W) by blocks of rows.

    A format gives `product`, `block`, `step`, `storage`, `dtype`, `format` and `rounded`. Nothing here writes to the storage.
    """

    @property
    def format(self) -> str:
        """Name of the storage in fingerprints: "int8", "int4", "nf4", "fp4"."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias over all rows of the storage, by the library; a fresh tensor in the dtype of x, without gradients."""
        raise NotImplementedError

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of the storage, dequantised; `start` is a multiple of `step`, `stop` too or the last row."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Rows that must be read together."""
        return 1

    def storage(self) -> tuple[Tensor, ...]:
        """The packed tensors with their scales."""
        raise NotImplementedError

    def rounded(self, W: Tensor) -> Tensor:
        """W: [out, in] after a round trip through this format, at float32.

        Raises:
            LayoutError: the format can't be written here.
        """
        raise NotImplementedError

    @property
    def stored(self) -> Any:
        """The module's parameter, whatever its class; asked for anew, since `.to` and fold replace it."""
        return weight_of(self.module, self.site)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def total_rows(self) -> int:
        return int(self.module.out_features)  # type: ignore[arg-type]

    @property
    def _span(self) -> tuple[int, int]:
        return (0, self.total_rows) if self.site.rows is None else self.site.rows

    def blocks(self, dtype: torch.dtype, span: tuple[int, int] | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last + 1, rows) of the site in order, each block dequantised when asked for; hold one at a time."""
        start, stop = self._span if span is None else span
        step = self.step
        rows = max(1, BLOCK_BYTES // (4 * self.shape[1] * step)) * step
        for first in range(start - start % step, stop, rows):
            last = min(first + rows, -(-stop // step) * step, self.total_rows)
            here, there = max(first, start), min(last, stop)
            yield here - start, there - start, self.block(first, last, dtype)[here - first : there - first]

    def leaves(self) -> Iterator[Tensor]:
        """An empty tensor of the dtype and device of the map: what is packed are no numbers that algebra could take up."""
        yield torch.empty(0, dtype=self.dtype, device=self.device)

    def rebuild(self, leaves: Iterator[Tensor]) -> Operator:
        next(leaves)
        return self

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.storage())

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.site.rows is None:
            return self.product(x, bias)
        parts = [F.linear(x, like(part, x)) for _, _, part in self.blocks(at_most_float32(x.dtype))]
        y = torch.cat(parts, -1)
        return y if bias is None else y.add_(like(bias, y))

    def rmatmul(self, g: Tensor) -> Tensor:
        flat = g.reshape(-1, g.shape[-1])
        total: Tensor | None = None
        for start, stop, part in self.blocks(at_most_float32(g.dtype)):
            part, rows = like(part, g), flat[:, start:stop]
            total = rows @ part if total is None else total.addmm_(rows, part)
            del part
        assert total is not None
        return total.view(*g.shape[:-1], self.shape[1])

    @torch.no_grad()
    def dense(self) -> Tensor:
        return torch.cat([part for _, _, part in self.blocks(torch.float32)])

    @torch.no_grad()
    def all_rows(self) -> Tensor:
        return torch.cat([part for _, _, part in self.blocks(torch.float32, (0, self.total_rows))])

    def restored(self, W: Tensor, stored: Tensor) -> Tensor:
        return W.detach().to(self.dtype).contiguous()

    @torch.no_grad()
    def columns(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        chosen = torch.cat([part[:, flat] for _, _, part in self.blocks(torch.float32)])
        return chosen.mT.reshape(*index.shape, self.shape[0])

    @torch.no_grad()
    def rows(self, index: Tensor) -> Tensor:
        found = torch.zeros(len(index), self.shape[1], device=self.device)
        for start, stop, part in self.blocks(torch.float32):
            here = (index >= start) & (index < stop)  # by where: nobody asks the device which
            found = torch.where(here[:, None], part[(index - start).clamp(0, stop - start - 1)], found)
        return found

    def row_sqnorm(self) -> Tensor:
        """[out], computed once per version of the storage: a step of DoRA dequantises nothing for its norms."""
        key: tuple[Any, ...] = (self.device,)
        if not torch.compiler.is_compiling():  # a graph can ask neither for an address nor for a version
            key = tuple((t.device, t.data_ptr(), t._version) for t in self.storage())
        if key not in self.cache:
            n = self._row_sqnorm()
            self.cache.clear()
            self.cache[key] = n
        return self.cache[key]

    @torch.no_grad()
    def _row_sqnorm(self) -> Tensor:
        return torch.cat([part.square().sum(-1) for _, _, part in self.blocks(torch.float32)])

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return 4 * self.shape[0] * self.shape[1]


class _Product(torch.autograd.Function):
    """x Wᵀ + bias for a constant W; keeps nothing. Linear, so that each is the other's derivative, as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: QuantisedBase) -> Tensor:
        ctx.base = base
        return base._product(x, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gx = _Transposed.apply(g, ctx.base) if ctx.needs_input_grad[0] else None
        gb = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gx, gb, None


class _Transposed(torch.autograd.Function):
    """g W."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, base: QuantisedBase) -> Tensor:
        ctx.base = base
        return base.rmatmul(g)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        return _Product.apply(h, None, ctx.base), None
