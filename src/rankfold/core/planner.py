"""The planner: the one place that decides how an expression in W runs.

    fused        Base + LowRank(s) [+ Magnitude]: one autograd function
    structured   the base by its own product, every other term by its own; intermediates kept, or recomputed
    effective    build W', rebuild it in backward: universal, keeps only x and the site's tensors
    plain        pure autograd: under torch.compile, functorch, for second derivatives, or over a base that trains

Custom functions are once-differentiable; whoever needs second derivatives asks for plan="plain".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.errors import LayoutError, OptionError
from rankfold.kernels import lowrank_linear, magnitude_linear, path_for, row_norms
from rankfold.kernels.lowrank import Drop
from rankfold.kernels.magnitude import amplify
from rankfold.kernels.once import once
from rankfold.linalg import Dense, Deviation, LowRank, Magnitude, Operator, Product, Scaled, Sum, contains, like, simplify
from rankfold.linalg.dropout import Dropout

from . import costs
from .base import Base, DenseBase
from .compiled import as_operators, takes_operators

__all__ = ["MEMORY", "PLANS", "Program", "explain", "require_known", "run"]

PLANS = ("auto", "fused", "structured", "effective", "plain")
MEMORY = ("auto", "keep", "recompute")


class Fused(NamedTuple):
    """The pieces of an expression that a fused kernel takes."""

    magnitude: Magnitude | None
    B: Tensor | None
    A: Tensor | None
    scale: float
    B0: Tensor | None
    A0: Tensor | None
    drop: Drop


@dataclass
class Program:
    """What runs at one site: `build(leaves, x)` makes the expression in `base` from the site's tensors (and x, where a gate
    looks at it).

    `dense_ok` is False where the expression depends on the input or on chance, so that no W' exists; `never_dense` says that the
    structures promise never to build it, and holds for plan "auto".
    An expression whose every tensor is one of `leaves` computes nothing when built: it is made once and kept with its fused form.
    `path` is the form of the fused kernels for the base's device, None the reference.
    """

    base: Base
    build: Callable[[Sequence[Tensor], Tensor | None], Operator]
    leaves: Sequence[Tensor]
    dense_ok: bool = True
    needs_x: bool = False
    never_dense: bool = False
    kept: tuple[Operator, Fused | None] | None = None
    path: ModuleType | None = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():  # a graph runs the plain plan
            self.path = path_for(self.base.device)

    def expression(self, leaves: Sequence[Tensor] | None = None, x: Tensor | None = None) -> Operator:
        if leaves is None and self.kept is not None:
            return self.kept[0]
        return simplify(self.build(self.leaves if leaves is None else leaves, x))

    def keep(self) -> bool:
        """Keep the expression if it is a mere record of the leaves; says whether it is."""
        fixed = all(t.is_leaf for t in self.leaves)  # slices of a shared tensor that trains are cut anew in each pass
        if self.dense_ok and fixed and not torch.compiler.is_compiling():
            expr = self.expression()
            fused = _fused_form(expr, self.base)
            factors = [t for t in fused or () if isinstance(t, Tensor)]  # a diagonal taken into B is a new tensor in each pass
            own = {id(t) for t in self.leaves}
            if all(id(t) in own for t in [*_tensors(expr, self.base), *factors]):
                self.kept = (expr, fused)
        return self.kept is not None


def _tensors(expr: Operator, base: Base) -> Iterator[Tensor]:
    if expr is base:
        return
    for f in fields(expr):
        value = getattr(expr, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, Operator):
                yield from _tensors(item, base)


def require_known(plan: str, memory: str) -> None:
    """Refuse names that stand for no plan, or no memory mode.

    Raises:
        OptionError: with the names that there are.
    """
    for what, name, known in (("plan", plan, PLANS), ("memory", memory, MEMORY)):
        if name not in known:
            raise OptionError(f"{what}: got {name!r}; allowed: {', '.join(known)}")


def run(program: Program, x: Tensor, bias: Tensor | None = None, plan: str = "auto", memory: str = "auto") -> Tensor:
    """y = x W'ᵀ + bias for the program's W', by the plan named or the cheapest.

    Products run in the dtype that nn.Linear would use here (autocast's, else that of x); gains, norms and factor algebra in
    float32.

    Raises:
        OptionError: no such plan or memory mode.
        LayoutError: the plan named cannot run this expression (no fused form; no W' where a gate depends on the input; a base
            that trains, whose gradient the custom functions do not give).
    """
    if plan not in PLANS or memory not in MEMORY:
        require_known(plan, memory)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _run(program, x, bias, plan, memory)
    return _run(program, x, bias, plan, memory)


def _run(program: Program, x: Tensor, bias: Tensor | None, plan: str, memory: str) -> Tensor:
    if plan == "plain" or (plan == "auto" and _must_be_plain(program)):
        if plan == "auto" and torch.compiler.is_compiling() and takes_operators(program.base, x):
            fused = _fused_form(program.expression(x=x if program.needs_x else None), program.base)
            if fused is not None and fused.B is not None:
                return as_operators(program.base, fused, x, bias)
        return _plain(program, x, bias)
    if plan in ("fused", "effective") and program.base.trains():
        raise LayoutError(f"plan {plan!r}: the base weight trains too, and this plan has no gradient for it; use plan='plain'")
    expr = program.expression(x=x if program.needs_x else None)
    if plan in ("auto", "fused"):
        fused = program.kept[1] if program.kept is not None else _fused_form(expr, program.base)
        if fused is not None:
            return _run_fused(program, fused, x, bias, memory)
        if plan == "fused":
            raise LayoutError(
                f"plan 'fused': no fused form for {describe(expr, program.base)}; allowed here: structured, effective, plain"
            )
    tokens = x.numel() // x.shape[-1]
    if plan == "auto":
        plan, memory = _choose(program, expr, tokens, memory, costs.prices_of(x.dtype))
    if plan == "plain":
        return _plain(program, x, bias)
    if plan == "effective":
        if not program.dense_ok:
            raise LayoutError(
                "plan 'effective': the change depends on the input or on chance, so there is no one weight to build"
            )
        return _Effective.apply(program, x, bias, *program.leaves)
    if memory == "auto":
        memory = _memory(costs.terms_cost(expr, program.base, tokens, costs.prices_of(x.dtype)), program.base, tokens)
    return _structured(program, expr, x, bias, memory)


def _must_be_plain(program: Program) -> bool:
    return torch.compiler.is_compiling() or program.base.trains() or torch._C._functorch.peek_interpreter_stack() is not None


def _plain(program: Program, x: Tensor, bias: Tensor | None) -> Tensor:
    return _product(program.expression(x=x if program.needs_x else None), program.base, x, bias)


def _product(op: Operator, base: Base, x: Tensor, bias: Tensor | None) -> Tensor:
    """x opᵀ + bias, with the bias inside the product of the weight that leads: the same bits as nn.Linear where the change
    is zero."""
    if op is base:
        return base.matmul(x, bias)
    if isinstance(op, Dense):
        return F.linear(x, like(op.W, x), None if bias is None else like(bias, x))
    if isinstance(op, Product):
        return _product(op.left, base, op.right.matmul(x), bias)
    if isinstance(op, Sum):
        y = _product(op.terms[0], base, x, bias)
        for term in op.terms[1:]:
            y = y + term.matmul(x)
        return y
    return _plus(op.matmul(x), bias)


def _factors(op: Operator) -> tuple | None:
    """(B, A, scale, B0, A0, drop) of one low-rank term, or None."""
    p_seed = None
    if isinstance(op, Product) and isinstance(op.right, Dropout):
        p_seed, op = (op.right.p, op.right.seed), op.left
    if op.batch:
        return None
    plain_scale = not isinstance(getattr(op, "scale", 1.0), Tensor)
    if isinstance(op, Deviation):
        if op.diag is None and op.core is None and op.A is not op.A0 and plain_scale:
            return op.B, op.A, op.scale, op.B0, op.A0, p_seed
        op = op.stacked()
        plain_scale = not isinstance(op.scale, Tensor)
    if not isinstance(op, LowRank):
        return None
    if op.diag is None and op.core is None and plain_scale:
        return op.B, op.A, op.scale, None, None, p_seed
    B, A = op.factors()
    return B, A, 1.0, None, None, p_seed


def _fused_form(expr: Operator, base: Base) -> Fused | None:
    magnitude = None
    if isinstance(expr, Magnitude):
        if not expr.detach:
            return None
        magnitude, expr = expr, expr.inner
    if expr is base:
        return Fused(magnitude, None, None, 1.0, None, None, None) if magnitude is not None else None
    if not (isinstance(expr, Sum) and len(expr.terms) == 2 and expr.terms[0] is base):
        return None
    factors = _factors(expr.terms[1])
    return Fused(magnitude, *factors) if factors is not None else None


def _run_fused(program: Program, f: Fused, x: Tensor, bias: Tensor | None, memory: str) -> Tensor:
    path = None if x.dtype == torch.float64 else program.path
    if f.magnitude is None:
        assert f.B is not None
        assert f.A is not None
        return lowrank_linear(x, program.base, bias, f.B, f.A, f.scale, f.B0, f.A0, f.drop, path, memory)
    m, norm = like_master(f.magnitude.m), _norm(program, f.magnitude, f)
    return magnitude_linear(x, program.base, bias, m, norm, f.B, f.A, f.scale, f.B0, f.A0, f.drop, path, memory)


def like_master(m: Tensor) -> Tensor:
    return m if m.dtype in (torch.float32, torch.float64) else m.float()


def _norm(program: Program, op: Magnitude, f: Fused) -> Tensor:
    if f.B is None or f.A is None or f.drop is not None:
        return op.norm()
    plain = f.B.dtype != torch.float64 and isinstance(program.base, DenseBase)
    norms = program.path.row_norms if program.path is not None and plain else row_norms
    return norms(program.base, f.B, f.A, f.scale, f.B0, f.A0, op.floor)


def _memory(terms: float, base: Base, tokens: int) -> str:
    return "recompute" if costs.prefer_recompute(terms, base.flops(tokens)) else "keep"


def _choose(program: Program, expr: Operator, tokens: int, memory: str, prices: costs.Prices) -> tuple[str, str]:
    grad = torch.is_grad_enabled()
    terms = costs.terms_cost(expr, program.base, tokens, prices)
    splits = _splits(expr, program.base)
    if memory == "auto":
        memory = _memory(terms, program.base, tokens)
    if not program.dense_ok:
        return ("structured" if splits else "plain"), memory
    if not splits:
        return "effective", "recompute"
    if program.never_dense:
        return "structured", memory
    structured = costs.structured_cost(terms, memory == "keep", grad)
    if structured <= costs.effective_cost(expr, tokens, grad, prices):
        return "structured", memory
    return "effective", "recompute"


def _splits(expr: Operator, base: Base) -> bool:
    """Whether every occurrence of the base can run by the base's own product."""
    if expr is base or not contains(expr, base):
        return True
    if isinstance(expr, Magnitude | Scaled):
        return _splits(expr.inner, base)
    if isinstance(expr, Sum):
        return all(_splits(t, base) for t in expr.terms)
    if isinstance(expr, Product):
        return (
            not (contains(expr.left, base) and contains(expr.right, base))
            and _splits(expr.left, base)
            and _splits(expr.right, base)
        )
    return False


def _structured(program: Program, expr: Operator, x: Tensor, bias: Tensor | None, memory: str) -> Tensor:
    if not _splits(expr, program.base):
        raise LayoutError(
            f"plan 'structured': {describe(expr, program.base)} needs the base built; allowed here: effective, plain"
        )
    if not torch.is_grad_enabled():
        memory = "keep"
    base = program.base

    def apply(op: Operator, path: tuple, z: Tensor) -> Tensor:
        if memory == "keep":
            return op.matmul(z)
        return _Recompute.apply(program, path, x if program.needs_x else None, z, *program.leaves)

    def walk(op: Operator, path: tuple, z: Tensor, b: Tensor | None) -> Tensor:
        if op is base:
            return base.matmul(z, b)
        if isinstance(op, Dense):
            return _product(op, base, z, b)
        if not contains(op, base):
            return _plus(apply(op, path, z), b)
        if isinstance(op, Magnitude):
            return _plus(amplify(walk(op.inner, (*path, "inner"), z, None), op.gain()), b)
        if isinstance(op, Scaled):
            return _plus(walk(op.inner, (*path, "inner"), z, None) * op.number, b)
        if isinstance(op, Product):
            if contains(op.left, base):
                return walk(op.left, (*path, "left"), apply(op.right, (*path, "right"), z), b)
            return _plus(apply(op.left, (*path, "left"), walk(op.right, (*path, "right"), z, None)), b)
        assert isinstance(op, Sum)
        order = sorted(range(len(op.terms)), key=lambda k: not contains(op.terms[k], base))
        y = walk(op.terms[order[0]], (*path, order[0]), z, b)
        for k in order[1:]:
            y = y + walk(op.terms[k], (*path, k), z, None)
        return y

    return walk(expr, (), x, bias)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + like(bias, y)


def _at(expr: Any, path: tuple) -> Operator:
    for step in path:
        expr = expr.terms[step] if isinstance(step, int) else getattr(expr, step)
    return expr


def _fresh(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_(t.requires_grad and t.is_floating_point()) for t in tensors]


def _pullback(y: Tensor, gy: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted or not y.requires_grad:
        return [None] * len(inputs)
    grads = iter(torch.autograd.grad(y, wanted, gy, allow_unused=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in inputs]


class _Recompute(torch.autograd.Function):
    """One sub-expression applied to z; saves z and the site's tensors only, and never holds the base."""

    @staticmethod
    def forward(ctx: Any, program, path, x, z, *leaves):
        ctx.program, ctx.path = program, path
        ctx.save_for_backward(x, z, *leaves)
        return _at(program.expression(leaves, x), path).matmul(z)

    @staticmethod
    @once
    def backward(ctx: Any, gy):
        with torch.enable_grad():
            x, z, *leaves = _fresh(ctx.saved_tensors)
            assert z is not None
            y = _at(ctx.program.expression(leaves, x), ctx.path).matmul(z)
            return None, None, *_pullback(y, gy, [x, z, *leaves])


class _Effective(torch.autograd.Function):
    """x W'ᵀ + bias with W' built twice instead of stored; one product forward, gᵀx once."""

    @staticmethod
    def forward(ctx: Any, program, x, bias, *leaves):
        ctx.program = program
        ctx.save_for_backward(x, *leaves)
        W = program.expression(leaves).dense()
        y = F.linear(x.reshape(-1, x.shape[-1]), like(W, x), None if bias is None else like(bias, x))
        return y.resize_(*x.shape[:-1], y.shape[-1])  # not a view, which nobody could change in place

    @staticmethod
    @once
    def backward(ctx: Any, gy):
        x, *saved = ctx.saved_tensors
        g, flat = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
        with torch.enable_grad():
            leaves = _fresh(saved)
            W = ctx.program.expression(leaves).dense()
        gx = (g @ like(W.detach(), g)).view(x.shape) if ctx.needs_input_grad[1] else None
        gb = g.sum(0) if ctx.needs_input_grad[2] else None
        return None, gx, gb, *_pullback(W, (g.mT @ flat).to(W.dtype), leaves)


def describe(expr: Operator, base: Operator) -> str:
    """A short reading of an expression: Magnitude(W + LowRank)."""
    if expr is base:
        return "W"
    if isinstance(expr, Sum):
        return " + ".join(describe(t, base) for t in expr.terms)
    if isinstance(expr, Product):
        return f"{describe(expr.left, base)} @ {describe(expr.right, base)}"
    inner = ", ".join(describe(c, base) for c in expr.children())
    return f"{type(expr).__name__}({inner})" if inner else type(expr).__name__


def explain(program: Program, tokens: int, memory: str = "auto", x: Tensor | None = None) -> dict[str, Any]:
    """What the planner would do for that many tokens, and why: plan, memory, expression, and the costs it compared."""
    expr = program.expression(x=x)
    reading = describe(expr, program.base)
    if _fused_form(expr, program.base) is not None:
        return {"plan": "fused", "memory": "recompute" if memory == "recompute" else "keep", "expression": reading}
    prices = costs.prices_of(program.base.dtype)
    plan, memory = _choose(program, expr, tokens, memory, prices)
    terms = costs.terms_cost(expr, program.base, tokens, prices)
    return {
        "plan": plan,
        "memory": memory,
        "expression": reading,
        "structured": costs.structured_cost(terms, memory == "keep", True),
        "effective": costs.effective_cost(expr, tokens, True, prices),
    }
