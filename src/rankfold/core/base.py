"""The stored weight as an operator: the symbol W of every expression. Dense storage; one file per other format."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.linalg import Operator, at_least_float32, like
from rankfold.linalg.sharded import is_cut, whole

from .bases import is_packed, packed_base
from .kinds import kind_named, weight_of
from .site import Site

__all__ = ["Base", "DenseBase", "base_of", "stored_tensors"]

PIECES = 8
"""In how many parts a weight is cast to another dtype: its copy is never there as a whole, nor kept for a backward pass."""


def _cast_in_pieces(W: Tensor, x: Tensor) -> bool:
    if W.dtype == x.dtype or W.ndim != 2 or W.requires_grad:
        return False
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _pieces(W: Tensor) -> tuple[Tensor, ...]:
    return W.split(-(-W.shape[0] // PIECES))


class _Forward(torch.autograd.Function):
    """x Wᵀ for a frozen W [out, in] of another dtype; as often differentiable as anybody likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return torch.cat([F.linear(x, like(part, x)) for part in _pieces(W)], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Backward.apply(g, *ctx.saved_tensors), None


class _Backward(torch.autograd.Function):
    """g W, likewise."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        parts = _pieces(W)
        flat = g.reshape(-1, g.shape[-1])
        gx = flat.new_zeros(len(flat), W.shape[1])
        for own, part in zip(flat.split([len(p) for p in parts], -1), parts):
            gx.addmm_(own, like(part, g))
        return gx.view(*g.shape[:-1], W.shape[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return _Forward.apply(v, *ctx.saved_tensors), None


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
    def batch(self) -> tuple[int, ...]:
        return () if self.site.batch is None else (self.site.batch,)

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def gather(self) -> Base:
        """The whole weight, readable outside the forward pass. Where it is cut every process must read it; hold one at a time."""
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

    def all_rows(self) -> Tensor:
        """The whole stored weight as a map, a copy that may be written; where it is cut every process must ask."""
        raise NotImplementedError

    def restored(self, W: Tensor, stored: Tensor) -> Tensor:
        """What folding puts in the place of the parameter `stored`: W' of the whole storage."""
        raise NotImplementedError

    def row_dot(self, other: Operator) -> Tensor:
        """What `other` knows of the product: mostly a cheaper way than two matrices."""
        return super().row_dot(other) if isinstance(other, Base) else other.row_dot(self)

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
        return weight_of(self.module, self.site)

    @property
    def W(self) -> Tensor:
        """[out, in], or [batch, out, in]: the storage as a map."""
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

    def gather(self) -> Base:
        return Gathered(self.module, self.site) if is_cut(self.stored) else self

    def leaves(self):
        yield self.W

    def rebuild(self, leaves) -> Operator:
        next(leaves)
        return self

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        W = self.W
        if W.ndim > 2:  # a stack of maps, each beside its own x; biases are the kind's affair
            return x @ like(W, x).mT
        if _cast_in_pieces(W, x):
            y = _Forward.apply(x, W)
            return y if bias is None else y + like(bias, y)
        return F.linear(x, like(W, x), None if bias is None else like(bias, x))

    def rmatmul(self, g: Tensor) -> Tensor:
        W = self.W
        return _Backward.apply(g, W) if _cast_in_pieces(W, g) else g @ like(W, g)

    def dense(self) -> Tensor:
        return at_least_float32(self.W)

    def all_rows(self) -> Tensor:
        return kind_named(self.site.kind).view(whole(self.stored), self.site).clone()

    def restored(self, W: Tensor, stored: Tensor) -> Tensor:
        return kind_named(self.site.kind).store(W, stored, self.site)

    def columns(self, index: Tensor) -> Tensor:
        if kind_named(self.site.kind).tokens and self.site.rows is None:
            padding: Any = self.module.padding_idx
            return F.embedding(index, self.stored, padding)
        return self.W.mT[..., index, :]

    def rows(self, index: Tensor) -> Tensor:
        return at_least_float32(self.W[..., index, :])

    def row_sqnorm(self) -> Tensor:
        """[out], computed once per version of the storage."""
        if getattr(self.module, "_is_fsdp_managed_module", False):
            return self._row_sqnorm()  # what is put into the module for a forward pass says nothing of a change of its pieces
        weight = self.stored
        if torch.compiler.is_compiling():  # a graph can ask neither for an address nor for a version
            key: tuple = (weight.dtype, weight.device)
            if known := [n for k, n in self.cache.items() if k[:2] == key]:
                return known[0]
        else:
            key = (weight.dtype, weight.device, weight.data_ptr(), weight._version)
        if key not in self.cache:
            n = self._row_sqnorm()
            self.cache.clear()
            self.cache[key] = n
        return self.cache[key]

    @torch.no_grad()
    def _row_sqnorm(self) -> Tensor:
        W = self.W  # the reduction raises what it reads: no float32 copy, no matrix of squares
        return torch.linalg.vector_norm(W, dim=-1, dtype=torch.promote_types(W.dtype, torch.float32)).square()

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return 0

    def trains(self) -> bool:
        return self.stored.requires_grad


@dataclass(frozen=True, eq=False)
class Gathered(DenseBase):
    """The whole of a weight that is cut over processes: gathered at its first use, and gone with this object."""

    @cached_property
    def stored(self) -> Tensor:
        return whole(weight_of(self.module, self.site))

    def gather(self) -> Base:
        return self


def base_of(module: nn.Module, site: Site) -> Base:
    """The base of a site, by the format in which the module stores its weight."""
    return packed_base(module, site) or DenseBase(module, site)


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """What the model's own parameters consist of in memory: the packed tensors and scales of quantised ones.

    >>> [tuple(t.shape) for t in stored_tensors(nn.Linear(3, 2))]
    [(2, 3), (2,)]
    """
    found: list[Tensor] = []
    for path, module in model.named_modules():
        if path.partition(".")[0] == "rankfold":
            continue
        for name, parameter in module._parameters.items():
            if name == "weight" and is_packed(module) and hasattr(module, "in_features"):
                base: Any = packed_base(module, Site("", (int(module.out_features), int(module.in_features))))
                found += base.storage()
            elif parameter is not None:
                found.append(parameter)
    return list({id(t): t for t in found}.values())
