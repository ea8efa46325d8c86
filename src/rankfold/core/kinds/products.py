"""Changed products where x Wᵀ is no plain matrix product: what convolutions and stacked experts share.

A kind says how one call of its module multiplies (`Arithmetic`); `run` offers the planner's four plans over that:

    fused        the base's own product, plus B(A x) by two thin ones, and a gain on the rows: keeps x and A x
    structured   every term of the expression by a product of its own
    effective    builds W', rebuilds it in backward: keeps x and the site's tensors
    plain        pure autograd
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankfold.errors import LayoutError
from rankfold.kernels.lowrank import Drop, drop
from rankfold.kernels.once import once
from rankfold.linalg import Deviation, LowRank, Magnitude, Operator, Product, Scaled, Sum, like
from rankfold.linalg.dropout import Dropout, TokenGate
from rankfold.linalg.flags import answers
from rankfold.linalg.structured import Diagonal

from ..base import DenseBase
from ..planner import Program, describe, require_known
from .arithmetic import Arithmetic

__all__ = ["explain", "run"]

VANISHED = 1e-6


class Parts(NamedTuple):
    """gain · (W + s·B drop(A)): the pieces of the expressions that the fused plan runs."""

    magnitude: Magnitude | None
    B: Tensor
    A: Tensor
    B0: Tensor | None
    A0: Tensor | None
    scale: float
    drop: Drop


def parts_of(expr: Operator, base: Operator) -> Parts | None:
    """The pieces, or None for another form."""
    magnitude = None
    if isinstance(expr, Magnitude):
        if not expr.detach:
            return None
        magnitude, expr = expr, expr.inner
    if not (isinstance(expr, Sum) and len(expr.terms) == 2 and expr.terms[0] is base):
        return None
    change, dropped = expr.terms[1], None
    if isinstance(change, Product) and isinstance(change.right, Dropout):
        dropped, change = (change.right.p, change.right.seed), change.left
    return _pieces(change, magnitude, dropped)


def _pieces(change: Operator, magnitude: Magnitude | None = None, dropped: Drop = None) -> Parts | None:
    if isinstance(change, Deviation):
        if change.diag is None and change.core is None and change.A is not change.A0 and not isinstance(change.scale, Tensor):
            return Parts(magnitude, change.B, change.A, change.B0, change.A0, float(change.scale), dropped)
        change = change.stacked()
    if not isinstance(change, LowRank):
        return None
    if change.diag is None and change.core is None and not isinstance(change.scale, Tensor):
        return Parts(magnitude, change.B, change.A, None, None, float(change.scale), dropped)
    B, A = change.factors()
    return Parts(magnitude, B, A, None, None, 1.0, dropped)


def run(
    program: Program, how: Arithmetic, x: Tensor, bias: Tensor | None = None, plan: str = "auto", memory: str = "auto"
) -> Tensor:
    """x by the program's W' and bias, by the plan named; "auto" is fused where there is such a form, else effective.

    Raises:
        OptionError: no such plan or memory mode.
        LayoutError: the plan named cannot run this expression.
    """
    require_known(plan, memory)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _run(program, how, x, bias, plan, memory)
    return _run(program, how, x, bias, plan, memory)


def _run(program: Program, how: Arithmetic, x: Tensor, bias: Tensor | None, plan: str, memory: str) -> Tensor:
    base = program.base
    assert isinstance(base, DenseBase)
    if program.needs_x:
        if plan in ("fused", "effective"):
            raise LayoutError(
                f"plan {plan!r}: the change depends on the input, so there is no one weight; allowed: structured, plain"
            )
        z = how.tokens(x)
        return _plus(how, how.joined(program.expression(x=z).matmul(z)), bias)
    pure = torch.compiler.is_compiling() or base.trains() or torch._C._functorch.peek_interpreter_stack() is not None
    if plan == "plain" or (plan == "auto" and pure):
        return _Walk(program, how, base, None).over(program.expression(), (), x, bias)
    if plan in ("fused", "effective") and base.trains():
        raise LayoutError(f"plan {plan!r}: the base weight trains too, and this plan has no gradient for it; use plan='plain'")
    expr = program.expression()
    parts = parts_of(expr, base)
    if parts is not None and plan in ("auto", "fused"):
        return _fused(how, base, parts, x, bias)
    if plan == "fused":
        raise LayoutError("plan 'fused': no fused form for this change; allowed here: structured, effective, plain")
    if plan == "effective" and not program.dense_ok:
        raise LayoutError("plan 'effective': the change depends on chance, so there is no one weight to build")
    if plan == "effective" or (plan == "auto" and program.dense_ok):
        return _Rebuilt.apply(program, (), how, x, bias, *program.leaves)
    return _Walk(program, how, base, memory).over(expr, (), x, bias)


def _plus(how: Arithmetic, y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + how.rows(like(how.shaped_bias(bias), y), y)


def explain(program: Program, x: Tensor | None = None) -> dict[str, Any]:
    """What plan "auto" does with this program: plan, memory and expression."""
    expr = program.expression(x=x)
    if program.needs_x:
        plan = "structured"
    elif parts_of(expr, program.base) is not None:
        plan = "fused"
    else:
        plan = "effective" if program.dense_ok else "structured"
    return {"plan": plan, "memory": "keep", "expression": describe(expr, program.base)}


class _Walk:
    """An expression by the products of its terms. `memory` None is pure autograd; "recompute" keeps x and the site's tensors."""

    def __init__(self, program: Program, how: Arithmetic, base: DenseBase, memory: str | None) -> None:
        self.program, self.how, self.base = program, how, base
        self.memory = memory if torch.is_grad_enabled() or memory is None else "keep"

    def over(self, op: Operator, path: tuple, x: Tensor, bias: Tensor | None = None) -> Tensor:
        how = self.how
        if op is self.base:
            return how.product(x, like(self.base.W, x), bias)
        if isinstance(op, Sum):
            y = self.over(op.terms[0], (*path, 0), x, bias)
            for k, term in enumerate(op.terms[1:], 1):
                y = y + self.over(term, (*path, k), x)
            return y
        if isinstance(op, Magnitude):
            y = self.over(op.inner, (*path, "inner"), x)
            return _plus(how, (y * how.rows(op.gain(), y)).to(y.dtype), bias)
        if isinstance(op, Scaled):
            y = self.over(op.inner, (*path, "inner"), x)
            number = op.number
            if isinstance(number, Tensor) and number.ndim:
                number = how.rows(number[..., None].expand(*number.shape, op.shape[0]), y)
            return _plus(how, (y * number).to(y.dtype), bias)
        if isinstance(op, Product) and isinstance(op.left, Diagonal):
            y = self.over(op.right, (*path, "right"), x)
            return _plus(how, (y * how.rows(op.left.d, y)).to(y.dtype), bias)
        if isinstance(op, Product) and isinstance(op.right, Dropout):
            return _plus(how, self.over(op.left, (*path, "left"), op.right.matmul(x)), bias)
        return _plus(how, self._term(op, path, x), bias)

    def _term(self, op: Operator, path: tuple, x: Tensor) -> Tensor:
        if _by_token(op):
            return self.how.joined(op.matmul(self.how.tokens(x)))
        pieces = _pieces(op)
        if pieces is not None and self.memory != "recompute":
            low = op.stacked() if isinstance(op, Deviation) else op
            assert isinstance(low, LowRank)
            B, A = low.factors()
            return self.how.after.product(self.how.product(x, like(A, x)), like(B, x))
        if pieces is not None:
            return _fused(self.how, None, pieces, x, None)
        if self.memory in (None, "keep"):
            return self.how.product(x, like(op.dense(), x))
        return _Rebuilt.apply(self.program, path, self.how, x, None, *self.program.leaves)


def _by_token(op: Operator) -> bool:
    return isinstance(op, Dropout | TokenGate) or any(_by_token(child) for child in op.children())


def _at(expr: Any, path: tuple) -> Operator:
    for step in path:
        expr = expr.terms[step] if isinstance(step, int) else getattr(expr, step)
    return expr


class _Rebuilt(torch.autograd.Function):
    """x by (a term of) W', built twice instead of stored."""

    @staticmethod
    def forward(ctx: Any, program, path, how, x, bias, *leaves):
        ctx.program, ctx.path, ctx.how, ctx.bias = program, path, how, None if bias is None else bias.shape
        ctx.save_for_backward(x, *leaves)
        W = _at(program.expression(leaves), path).dense()
        return how.product(x, like(W, x), None if bias is None else like(bias, x))

    @staticmethod
    @once
    def backward(ctx: Any, g):
        x, *saved = ctx.saved_tensors
        how = ctx.how
        leaves = [t.detach().requires_grad_(t.requires_grad and t.is_floating_point()) for t in saved]
        with torch.enable_grad():
            W = _at(ctx.program.expression(leaves), ctx.path).dense()
        gx = how.input_gradient(g, like(W.detach(), g), x) if ctx.needs_input_grad[3] else None
        gb = how.row_sums(g).view(ctx.bias) if ctx.needs_input_grad[4] else None
        grads: list[Tensor | None] = [None] * len(leaves)
        wanted = [t for t in leaves if t.requires_grad]
        if wanted and W.requires_grad:
            found = iter(torch.autograd.grad(W, wanted, how.weight_gradient(g, x).to(W.dtype), allow_unused=True))
            grads = [next(found) if t.requires_grad else None for t in leaves]
        return None, None, None, gx, gb, *grads


def _fused(how: Arithmetic, base: DenseBase | None, p: Parts, x: Tensor, bias: Tensor | None) -> Tensor:
    norm = m = None
    if p.magnitude is not None:
        norm, m = p.magnitude.norm(), p.magnitude.m
        m = m if m.dtype in (torch.float32, torch.float64) else m.float()
    return _LowRankProduct.apply(x, bias, m, norm, p.B, p.A, p.B0, p.A0, how, base, p.scale, p.drop)


def _stacked(B: Tensor, A: Tensor, B0: Tensor | None, A0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if B0 is None or A0 is None:
        return B.to(dtype), A.to(dtype)
    return torch.cat([B - B0, B0], -1).to(dtype), torch.cat([A, A - A0], -2).to(dtype)


class _LowRankProduct(torch.autograd.Function):
    """gain · (x by W, plus s·(drop(x) by A) by B) + bias. Keeps x if A trains, h = x by A if B does, y or u if the gain does."""

    @staticmethod
    def forward(ctx: Any, x, bias, m, norm, B, A, B0, A0, how, base, scale, dropped):
        Bs, As = _stacked(B, A, B0, A0, x.dtype)
        h = how.product(drop(x, dropped), As)
        inside = None if bias is None or m is not None else like(bias, x)
        change = how.after.product(h, Bs)
        u = change.mul_(scale) if base is None else how.product(x, like(base.W, x), inside).add_(change, alpha=scale)
        y, from_u = u, False
        if m is not None:
            gain = m / norm
            y = (u * how.rows(gain, u)).to(u.dtype)
            if bias is not None:
                y += how.rows(like(how.shaped_bias(bias), y), y)
            # where a gain vanished y no longer tells u; a device that can't be asked keeps u
            from_u = not answers(x.device) or bool((m.abs() < VANISHED * norm).any())
        ctx.how, ctx.base, ctx.scale, ctx.dropped, ctx.from_u = how, base, scale, dropped, from_u
        need_m, _, need_B, need_A = ctx.needs_input_grad[2:6]
        seen = (u if from_u else y) if need_m else None
        ctx.save_for_backward(x if need_A else None, h if need_B else None, seen, bias, m, norm, B, A, B0, A0)
        ctx.shapes = x.shape, h.shape
        return y

    @staticmethod
    @once
    def backward(ctx: Any, g):
        x, h, seen, bias, m, norm, B, A, B0, A0 = _saved(ctx)
        how = ctx.how
        gm = None
        if seen is not None:
            total = how.row_sums(g * seen)
            if not ctx.from_u and bias is not None:
                total = total - how.shaped_bias(bias).to(total.dtype) * how.row_sums(g)
            gm = (total / (norm if ctx.from_u else m)).to(m.dtype)
        gb = how.row_sums(g).view(bias.shape).to(bias.dtype) if ctx.needs_input_grad[1] else None
        if m is not None:
            g = (g * how.rows(m / norm, g)).to(g.dtype)
        Bs, As = _stacked(B, A, B0, A0, g.dtype)
        like_x, like_h = (g.new_empty(1).expand(shape) for shape in ctx.shapes)
        gh = how.after.input_gradient(g, Bs, like_h).mul_(ctx.scale)
        gx = gB = gA = None
        if ctx.needs_input_grad[0]:
            gx = drop(how.input_gradient(gh, As, like_x), ctx.dropped)
            if ctx.base is not None:
                gx = how.input_gradient(g, like(ctx.base.W, g), like_x).add_(gx)
        r = A.shape[-2]
        if h is not None:
            gB = _summed(how.after.weight_gradient(g, h)[..., :r].mul(ctx.scale), B)
        if x is not None:
            gA = how.weight_gradient(gh, drop(x, ctx.dropped))
            gA = _summed(gA if gA.shape[-2] == r else gA[..., :r, :] + gA[..., r:, :], A)
        return gx, gb, gm, None, gB, gA, *(None,) * 6


def _summed(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a factor that all maps of a stack share is the sum of theirs."""
    while gradient.ndim > factor.ndim:
        gradient = gradient.sum(0)
    return gradient.to(factor.dtype, memory_format=torch.contiguous_format)


def _saved(ctx: Any) -> tuple[Any, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise LayoutError(
            "the gradient of a magnitude reads the layer's output, which what follows it has changed in place (as "
            "ReLU(inplace=True) does): set inplace=False there, or choose plan='structured'"
        ) from error
