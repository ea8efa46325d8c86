"""The stored weight as an operator: the symbol W of every expression. Dense storage; one file per other format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.linalg import Operator, at_least_float32, like

from .kinds import kind_named
from .site import Site

__all__ = ["Base", "DenseBase", "base_of"]

CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Base(Operator):
    """A frozen weight. Beyond an operator: `matmul` takes the bias and returns a fresh tensor that may be written; `gather()`
    is the only way to read a weight outside the forward pass; row norms are cached with the version of the storage."""

    module: nn.Module
    site: Site
    cache: dict = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.site.shape

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def gather(self) -> Operator:
        """The whole weight, readable outside the forward pass on every process."""
        return self

    @property
    def total_rows(self) -> int:
        """Output rows of the whole stored weight, of which this may be a slice."""
        raise NotImplementedError

    @property
    def module_device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def module_dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def trains(self) -> bool:
        """Whether somebody unfroze the stored weight: then only the plain plan is right."""
        return False


@dataclass(frozen=True, eq=False)
class DenseBase(Base):
    """A weight stored as a plain tensor; the module is asked for it anew at each use, since `.to`, fold and sharding replace
    it."""

    @property
    def stored(self) -> Tensor:
        """The tensor as it is stored, whatever its layout."""
        weight = getattr(self.module, self.site.param)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def W(self) -> Tensor:
        """[out, in], a view of the storage."""
        W = kind_named(self.site.kind).view(self.stored, self.site)
        return W if self.site.rows is None else W[self.site.rows[0] : self.site.rows[1]]

    @property
    def total_rows(self) -> int:
        return int(kind_named(self.site.kind).view(self.stored, self.site).shape[-2])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def leaves(self):
        yield self.W

    def rebuild(self, leaves) -> Operator:
        next(leaves)
        return self

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        W = self.W
        if W.dtype != x.dtype and W.numel() * 4 > CHUNK_BYTES:  # a raised copy of a large weight is made piece by piece
            rows = max(1, CHUNK_BYTES // (4 * W.shape[1]))
            y = torch.cat([F.linear(x, like(part, x)) for part in W.split(rows)], -1)
            return y if bias is None else y + like(bias, y)
        return F.linear(x, like(W, x), None if bias is None else like(bias, x))

    def rmatmul(self, g: Tensor) -> Tensor:
        return g @ like(self.W, g)

    def dense(self) -> Tensor:
        return at_least_float32(self.W)

    def columns(self, index: Tensor) -> Tensor:
        if kind_named(self.site.kind).tokens and self.site.rows is None:
            padding: Any = self.module.padding_idx
            return F.embedding(index, self.stored, padding)
        return self.W.mT[index]

    def rows(self, index: Tensor) -> Tensor:
        return at_least_float32(self.W[index])

    def row_sqnorm(self) -> Tensor:
        """[out], computed once per version of the storage."""
        weight = self.stored
        compiled = torch.compiler.is_compiling()  # a graph can ask neither for an address nor for a version
        key = (weight.dtype, weight.device, *(() if compiled else (weight.data_ptr(), weight._version)))
        if key not in self.cache:
            with torch.no_grad():
                W = self.W
                rows = max(1, CHUNK_BYTES // (4 * W.shape[1]))
                n = torch.cat([at_least_float32(part).square().sum(-1) for part in W.split(rows)])
            self.cache.clear()
            self.cache[key] = n
        return self.cache[key]

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return 0

    def trains(self) -> bool:
        return self.stored.requires_grad


def base_of(module: nn.Module, site: Site) -> Base:
    """The base of a site, by the format in which the module stores its weight."""
    return DenseBase(module, site)
