"""Products of rows that come sorted by group, where each group has a matrix of its own: what stacked experts multiply by.

    grouped_product    y_t = W_e x_t           for the rows t of group e, which are ends[e−1] ≤ t < ends[e]
    grouped_outer      G_e = Σ_t g_t x_tᵀ      over them

Where the groups end is a tensor on the device: nobody waits for it, except where torch has no grouped product (float64, widths
that would need a copy of large matrices, devices other than CPUs and GPUs from Ampere on). There a loop over the groups runs,
which is also the reference.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["grouped_outer", "grouped_product", "looped_outer", "looped_product"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes that rows, and the first of them, must be multiples of in torch's grouped product."""


def grouped_product(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """[tokens, in] by [E, out, in]: each row by the matrix of its group, [tokens, out].

    Differentiable in x and W as often as one likes; in a graph it is the operator `rankfold::grouped_product`.

    Args:
        x: rows sorted by group.
        W: in the dtype of x, in any layout.
        ends: [E] int32, where each group ends; the last is the number of rows.

    >>> x, W = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[[1.0]], [[10.0]], [[100.0]]])
    >>> grouped_product(x, W, torch.tensor([1, 1, 3], dtype=torch.int32)).flatten().tolist()
    [1.0, 100.0, 100.0]
    """
    return _differentiable(_product_operator, looped_product, _product, x, W, ends)


def grouped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[tokens, out] and [tokens, in]: the sum of g_t x_tᵀ over each group's rows, [E, out, in]; 0 for a group without any.

    >>> g, x = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
    >>> grouped_outer(g, x, torch.tensor([1, 1, 3], dtype=torch.int32)).flatten().tolist()
    [1.0, 0.0, 5.0]
    """
    return _differentiable(_outer_operator, looped_outer, _outer, g, x, ends)


def _differentiable(operator: Any, looped: Any, direct: Any, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return operator(a, b, ends)
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return looped(a, b, ends)  # what torch.func and forward mode know how to transform
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return operator(a, b, ends)
    return direct(a, b, ends)


# the reference


def looped_product(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` by the products of the groups."""
    return torch.cat([F.linear(rows, Wk) for rows, Wk in zip(x.split(_sizes(ends)), W.unbind(0))])


def looped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`grouped_outer` by the products of the groups."""
    sizes = _sizes(ends)
    return torch.stack([gk.mT @ xk for gk, xk in zip(g.split(sizes), x.split(sizes))])


def _sizes(ends: Tensor) -> list[int]:
    stops = ends.tolist()
    return [stop - start for start, stop in zip([0, *stops], stops)]


# torch's grouped product


def _product(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    if not _runs(x):
        return looped_product(x, W, ends)
    if (block := _block(x, sum(W.shape[1:]), ends)) is not None:
        return block.rows(block.of(x) @ W.mT)
    if not _fits(W):
        if W.numel() > x.shape[0] * sum(W.shape[1:]):  # more than another look at x and y: factors are less, weights are not
            return looped_product(x, W, ends)
        W = _padded(W)
    return F.grouped_mm(x if _fits(x) else _padded(x), W.mT, offs=ends).contiguous()


def _outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    if not _runs(x):
        return looped_outer(g, x, ends)
    if (block := _block(x, g.shape[1] + x.shape[1], ends)) is not None:
        narrow = g.shape[1] < x.shape[1]
        return block.of(g, zeros=narrow).mT @ block.of(x, zeros=not narrow)
    G = F.grouped_mm((g if _fits(g) else _padded(g)).mT, x if _fits(x) else _padded(x), offs=ends).contiguous()
    if G.is_cuda:  # kernels for some GPUs leave a group without rows unwritten (pytorch/pytorch#172439)
        G.masked_fill_((ends == torch.cat([ends.new_zeros(1), ends[:-1]]))[:, None, None], 0)
    return G


def _runs(x: Tensor) -> bool:
    """Whether torch has a grouped product for this dtype on this device."""
    return x.dtype in DTYPES and (x.device.type == "cpu" or (x.device.type == "cuda" and _recent(x.device)))


@functools.cache
def _recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fits(t: Tensor) -> bool:
    """Whether rows, or columns, lie at multiples of 16 bytes."""
    rows, columns = t.shape[-2:]
    across, along = t.stride()[-2:]
    step = across if along == 1 and across >= max(1, columns) else along if across == 1 and along >= max(1, rows) else 1
    size = t.element_size()
    return step * size % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0


def _padded(t: Tensor) -> Tensor:
    """A copy whose rows lie at multiples of 16 bytes."""
    columns, unit = t.shape[-1], ALIGNMENT // t.element_size()
    return t.new_empty(*t.shape[:-1], -(-columns // unit) * unit)[..., :columns].copy_(t)


# many small products in half precision on a CPU


BLOCK = 1 << 15
"""Largest number of entries (in and out together) of a group for which one batched product over padded rows pays."""
PADDING = 3
"""Largest number of padded rows over rows."""


class _Block(NamedTuple):
    """Rows of groups padded to the longest: one batched product instead of one product per group.

    On a CPU a product in bfloat16 has a fixed price of some 13 µs, so that 64 experts of rank 8 cost three times their float32
    products; padding costs less as long as groups are small. In float32 it never paid.
    """

    there: Tensor
    """[rows], the place of each row among those of the block."""
    source: Tensor
    """[groups, longest], the row at each place; past the end of a group some other one."""
    outside: Tensor
    """[groups, longest, 1], whether a place is past the end of its group."""

    def of(self, x: Tensor, zeros: bool = False) -> Tensor:
        """[groups, longest, width]"""
        rows = x.index_select(0, self.source.view(-1)).view(*self.source.shape, -1)
        return rows.masked_fill_(self.outside, 0) if zeros else rows

    def rows(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1).index_select(0, self.there)


def _block(x: Tensor, widths: int, ends: Tensor) -> _Block | None:
    rows, groups = x.shape[0], ends.shape[0]
    if not rows or x.device.type != "cpu" or x.dtype == torch.float32 or rows * widths > groups * BLOCK:
        return None
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    sizes = ends - starts
    longest = int(sizes.max())
    if longest * widths > BLOCK or longest * groups > PADDING * rows:
        return None
    places = torch.arange(longest)
    shift = torch.arange(groups) * longest - starts
    there = torch.arange(rows) + torch.repeat_interleave(shift, sizes, output_size=rows)
    source = (starts[:, None] + places).clamp_(max=rows - 1)
    return _Block(there, source, (places >= sizes[:, None])[..., None])


# as operators of the library


@torch.library.custom_op("rankfold::grouped_product", mutates_args=())
def _product_operator(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    return _product(x, W, ends)


@torch.library.custom_op("rankfold::grouped_outer", mutates_args=())
def _outer_operator(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return _outer(g, x, ends)


@_product_operator.register_fake
def _(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1])


@_outer_operator.register_fake
def _(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return g.new_empty(ends.shape[0], g.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a, b, ends = inputs
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, ends)


def _product_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, W, ends = ctx.saved_tensors
    gx = None if W is None else _product_operator(g, W.mT, ends)
    return gx, None if x is None else _outer_operator(g, x, ends), None


def _outer_gradients(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    g, x, ends = ctx.saved_tensors
    gg = None if x is None else _product_operator(x, G, ends)
    return gg, None if g is None else _product_operator(g, G.mT, ends), None


_product_operator.register_autograd(_product_gradients, setup_context=_keep)
_outer_operator.register_autograd(_outer_gradients, setup_context=_keep)
