"""The hot products as operators of torch's library: one node each in a compiled or exported graph, whatever they run by.

The form is chosen where an operator runs (`paths`): a graph holds nothing of the device on which it was traced. Factors come as
they are multiplied: in the dtype of x, with an offset stacked. An exported program that holds one of these is read after
`import rankfold.kernels.operators`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.linalg import at_least_float32, like

from . import magnitude, segments
from .lowrank import Drop
from .paths import path_for, segments_for

__all__ = ["gathered", "lowrank_product", "magnitude_product", "row_norms"]


class Weight(NamedTuple):
    """A plain weight [out, in] as the forms ask for a base, with its rows' ‖W_j‖² where they are known."""

    W: Tensor
    own: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, like(self.W, x), None if bias is None else like(bias, x))

    def rmatmul(self, g: Tensor) -> Tensor:
        return g @ like(self.W, g)

    def rows(self, index: Tensor) -> Tensor:
        return at_least_float32(self.W[index])

    def row_sqnorm(self) -> Tensor:
        return at_least_float32(self.W).square().sum(-1) if self.own is None else self.own


class Run(NamedTuple):
    """What a form is asked to do beside the tensors."""

    base: Weight
    path: ModuleType
    scale: float
    p_seed: Drop


def _form(x: Tensor) -> ModuleType:
    chosen = None if x.dtype == torch.float64 else path_for(x.device)
    return magnitude if chosen is None else chosen


def _drop(p: float, seed: Tensor | None) -> Drop:
    return None if seed is None else (p, int(seed))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _nothing(like: Tensor) -> Tensor:
    """In the place of a gradient that nobody asked for: operators return tensors."""
    return like.new_empty(0)


# x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ


@torch.library.custom_op("rankfold::lowrank_product", mutates_args=())
def lowrank_product(
    x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ [..., out], drop(x) Aᵀ [tokens, r])."""
    flat = _rows(x)
    y = Weight(W).matmul(flat, bias)
    h = _form(x).combine(y, flat, B, A, scale, _drop(p, seed))
    return y.view(*x.shape[:-1], y.shape[-1]), h


@lowrank_product.register_fake
def _(x, W, bias, B, A, scale, p, seed):
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(_rows(x).shape[0], A.shape[0])


@torch.library.custom_op("rankfold::lowrank_pull", mutates_args=())
def _lowrank_pull(
    g: Tensor,
    x: Tensor,
    W: Tensor,
    h: Tensor,
    B: Tensor,
    A: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂x, ∂B, ∂A) from g [..., out], those that are wanted."""
    flat = _rows(g)
    gx = Weight(W).rmatmul(flat) if wanted[0] else None
    gB, gA = _form(g).gradients(
        flat, gx, _rows(x) if wanted[2] else None, h if wanted[1] else None, B, A, scale, A.shape[0], _drop(p, seed)
    )
    return (
        _nothing(g) if gx is None else gx.view(x.shape),
        _nothing(B) if gB is None else gB.to(B.dtype, memory_format=torch.contiguous_format),
        _nothing(A) if gA is None else gA.to(A.dtype),
    )


@_lowrank_pull.register_fake
def _(g, x, W, h, B, A, scale, p, seed, wanted):
    shapes = (x.shape, B.shape, A.shape)
    return tuple(t.new_empty(shape if asked else 0) for t, shape, asked in zip((g, B, A), shapes, wanted))


def _keep_lowrank(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, _, B, A, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(x, W, output[1], B, A, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _pull_lowrank(ctx: Any, g: Tensor | None, _: Any) -> tuple[Any, ...]:
    if g is None:
        return (None,) * 8
    x, W, h, B, A, seed = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[k] for k in (0, 3, 4)]
    found = _lowrank_pull(g, x, W, h, B, A, ctx.scale, ctx.p, seed, wanted)
    gx, gB, gA = (t if asked else None for t, asked in zip(found, wanted))
    gW = _rows(g).mT @ _rows(x) if ctx.needs_input_grad[1] else None
    return gx, gW, _rows(g).sum(0) if ctx.needs_input_grad[2] else None, gB, gA, None, None, None


lowrank_product.register_autograd(_pull_lowrank, setup_context=_keep_lowrank)


# ‖W_j + s·(B A)_j‖, and (m / norm) ⊙ (x Wᵀ + s·(drop(x) Aᵀ) Bᵀ) + bias


@torch.library.custom_op("rankfold::row_norms", mutates_args=())
def row_norms(W: Tensor, own: Tensor, B: Tensor, A: Tensor, scale: float, floor: float) -> Tensor:
    """‖W_j + s·(B A)_j‖ [out] in float32, from own = ‖W_j‖²; without a gradient."""
    return _form(W).row_norms(Weight(W, own), B, A, scale, None, None, floor)


@row_norms.register_fake
def _(W, own, B, A, scale, floor):
    return B.new_empty(W.shape[0], dtype=torch.promote_types(B.dtype, torch.float32))


@torch.library.custom_op("rankfold::magnitude_product", mutates_args=())
def magnitude_product(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    m: Tensor,
    norm: Tensor,
    B: Tensor,
    A: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """((m / norm) ⊙ (x Wᵀ + s·(drop(x) Aᵀ) Bᵀ) + bias [..., out], drop(x) Aᵀ [tokens, r]); the norm is a constant."""
    flat, path = _rows(x), _form(x)
    u = Weight(W).matmul(flat)
    h = path.combine(u, flat, B, A, scale, _drop(p, seed))
    return path.apply_gain(u, m / norm, bias).view(*x.shape[:-1], u.shape[-1]), h


@magnitude_product.register_fake
def _(x, W, bias, m, norm, B, A, scale, p, seed):
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(_rows(x).shape[0], A.shape[0])


@torch.library.custom_op("rankfold::magnitude_pull", mutates_args=())
def _magnitude_pull(
    g: Tensor,
    y: Tensor,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    m: Tensor,
    norm: Tensor,
    h: Tensor,
    B: Tensor,
    A: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(∂x, ∂m, ∂B, ∂A) from g [..., out], those that are wanted."""
    flat, run = _rows(x), Run(Weight(W), _form(g), scale, _drop(p, seed))
    g = _rows(g)
    gu, total = run.path.pull_gain(g, m / norm, _rows(y) if wanted[1] else None, bias)
    gm = None if total is None else magnitude.pull_magnitude(run, total, g, flat, h, run.p_seed, m, norm, B, A, None, None)
    gx = run.base.rmatmul(gu) if wanted[0] else None
    gB, gA = run.path.gradients(
        gu, gx, flat if wanted[3] else None, h if wanted[2] else None, B, A, scale, A.shape[0], run.p_seed
    )
    return (
        _nothing(x) if gx is None else gx.view(x.shape),
        _nothing(m) if gm is None else gm.to(m.dtype),
        _nothing(B) if gB is None else gB.to(B.dtype, memory_format=torch.contiguous_format),
        _nothing(A) if gA is None else gA.to(A.dtype),
    )


@_magnitude_pull.register_fake
def _(g, y, x, W, bias, m, norm, h, B, A, scale, p, seed, wanted):
    return tuple(t.new_empty(t.shape if asked else 0) for t, asked in zip((x, m, B, A), wanted))


def _keep_magnitude(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, bias, m, norm, B, A, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(output[0], x, W, bias, m, norm, output[1], B, A, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _pull_magnitude(ctx: Any, g: Tensor | None, _: Any) -> tuple[Any, ...]:
    if g is None:
        return (None,) * 10
    *saved, seed = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[k] for k in (0, 3, 5, 6)]
    found = _magnitude_pull(g, *saved, ctx.scale, ctx.p, seed, wanted)
    gx, gm, gB, gA = (t if asked else None for t, asked in zip(found, wanted))
    return gx, None, _rows(g).sum(0) if ctx.needs_input_grad[2] else None, gm, None, gB, gA, None, None, None


magnitude_product.register_autograd(_pull_magnitude, setup_context=_keep_magnitude)


# (x_n A_iᵀ) B_i, each row with the adapter of its own


@torch.library.custom_op("rankfold::gathered", mutates_args=())
def gathered(x: Tensor, A: Tensor, B: Tensor, index: Tensor, parts: int) -> Tensor:
    """(x_n A_iᵀ) B_i [rows, tokens, out] for x [rows, tokens, in] and the slot i of each row; the factors are frozen.

    Args:
        A, B: [slots·parts, k, in] and [slots·parts, k, out]: rank r of slot i stands in row i·parts + r // k.
    """
    form = None if x.dtype == torch.float64 else segments_for(x.device)
    return (segments if form is None else form).gathered(x, A, B, index, parts)


@gathered.register_fake
def _(x, A, B, index, parts):
    return x.new_empty(*x.shape[:-1], B.shape[-1])


def _keep_gathered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, A, B, index, ctx.parts = inputs
    ctx.save_for_backward(A, B, index)


def _pull_gathered(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    A, B, index = ctx.saved_tensors
    return gathered(g, B, A, index, ctx.parts), None, None, None, None


gathered.register_autograd(_pull_gathered, setup_context=_keep_gathered)
