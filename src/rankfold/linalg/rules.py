"""What the algebra knows about pairs of operators: one small table, so that the operators stay ignorant of each other.

`simplify` rewrites an expression to fewer and cheaper terms; `difference(expr, W)` gives the change alone, exactly where a rule
knows it. Each rule is a function of its two parts and is tested against dense arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rankfold.errors import OptionError

from .lowrank import Deviation, LowRank
from .magnitude import Magnitude
from .operator import Identity, Number, Operator, Product, Scaled, Sum
from .orthogonal import Householder
from .structured import Diagonal, Hadamard, Sparse

__all__ = ["concatenate", "contains", "deviation", "difference", "gate_components", "khatri_rao", "simplify"]


def contains(expr: Operator, leaf: Operator) -> bool:
    """Whether `leaf` itself (by identity) occurs in the expression."""
    return expr is leaf or any(contains(child, leaf) for child in expr.children())


def concatenate(ops: list[LowRank]) -> LowRank:
    """Σ_k s_k B_k A_k as one LowRank: [s_1 B_1, s_2 B_2, ...] · [A_1; A_2; ...]. Exact; ranks add."""
    ops = [op for op in ops if op.rank] or ops[:1]
    if len(ops) == 1:
        return ops[0]
    batch = max([op.batch for op in ops], key=len)
    factors = [[t.expand(*batch, *t.shape[-2:]) for t in op.factors()] for op in ops]
    return LowRank(torch.cat([B for B, _ in factors], -1), torch.cat([A for _, A in factors], -2))


def khatri_rao(left: LowRank, right: LowRank) -> LowRank:
    """(B₁A₁) ∘ (B₂A₂) = (B₁ ∗ B₂)(A₁ ∗ A₂): row-wise and column-wise Kronecker products, rank r₁·r₂."""
    (B1, A1), (B2, A2) = left.factors(), right.factors()
    B = (B1[..., :, None] * B2[..., None, :]).flatten(-2)
    A = (A1[..., :, None, :] * A2[..., None, :, :]).flatten(-3, -2)
    return LowRank(B, A)


def deviation(now: Operator, start: Operator) -> Operator:
    """now − start, with start frozen. Two LowRanks of one form become a Deviation: zero, bitwise, while they are equal.

    One form is: the same rank and number in front, a core on both or on neither, a diagonal likewise. A scale that is a tensor is
    taken from `now` for both: the two may differ in B, A and what stands between them.
    """
    if isinstance(now, LowRank) and isinstance(start, LowRank) and _one_form(now, start):
        if now.diag is not None and start.diag is not None and now.diag is not start.diag:
            if now.B is start.B and now.A is start.A and now.core is start.core:
                return replace(now, diag=now.diag - start.diag)
            now, start = _diagonal_in_core(now), _diagonal_in_core(start)
        return Deviation(now.B, now.A, start.B, start.A, now.diag, now.scale, now.core, start.core)
    if isinstance(now, Hadamard) and isinstance(start, Hadamard) and now.left is start.left:
        return Hadamard(now.left, deviation(now.right, start.right))
    return now - start


def _one_form(a: LowRank, b: LowRank) -> bool:
    # tensors are not compared by value: that would wait for the device, and break a compiled graph
    numbers = isinstance(a.scale, Tensor) == isinstance(b.scale, Tensor) and (isinstance(a.scale, Tensor) or a.scale == b.scale)
    return numbers and (a.core is None) == (b.core is None) and (a.diag is None) == (b.diag is None) and a.rank == b.rank


def _diagonal_in_core(op: LowRank) -> LowRank:
    assert op.diag is not None
    D = torch.diag_embed(op.diag)
    return replace(op, diag=None, core=D if op.core is None else D @ op.core)


def gate_components(op: Operator, gate: Tensor) -> Operator:
    """Σ_k gate_k · (component k), for an operator that is a sum of rank-one components: B A becomes B diag(gate) A.

    A component of a Deviation that is switched off returns to its start, one of W ∘ (B A) is W ∘ (b_k a_k).

    Raises:
        OptionError: the operator has no such components, or another number of them than the gate [r].

    >>> op = gate_components(LowRank(torch.ones(2, 3), torch.ones(3, 2)), torch.tensor([1.0, 0.0, 0.5]))
    >>> op.dense().tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    if isinstance(op, LowRank | Deviation) and op.A.shape[-2] == gate.shape[-1]:
        return replace(op, diag=gate if op.diag is None else op.diag * gate)
    if isinstance(op, Hadamard) and not isinstance(op.left, LowRank):
        return Hadamard(op.left, gate_components(op.right, gate))
    raise OptionError(
        f"{type(op).__name__} of shape {op.shape} has no {gate.shape[-1]} rank-one components that a gate could weigh"
    )


def simplify(expr: Operator) -> Operator:
    """The same map with nested sums flattened, numbers taken into LowRanks, and LowRanks of a sum concatenated."""
    if isinstance(expr, Scaled):
        inner = simplify(expr.inner)
        if isinstance(inner, Sum):
            return simplify(Sum(tuple(Scaled(t, expr.number) for t in inner.terms)))
        rule = SCALED.get(type(inner))
        return rule(inner, expr.number) if rule else Scaled(inner, expr.number)
    if isinstance(expr, Sum):
        terms = [t for term in expr.terms for t in _flat(simplify(term))]
        low = [t for t in terms if type(t) is LowRank]
        rest = [t for t in terms if type(t) is not LowRank]
        terms = rest + ([concatenate(low)] if low else [])
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))
    if isinstance(expr, Product):
        left, right = simplify(expr.left), simplify(expr.right)
        product_rule = PRODUCTS.get((type(left), type(right)))
        return product_rule(left, right) if product_rule else Product(left, right)
    if isinstance(expr, Magnitude):
        return Magnitude(expr.m, simplify(expr.inner), expr.detach, expr.floor)
    if isinstance(expr, Hadamard) and type(expr.left) is LowRank and type(expr.right) is LowRank:
        # one product of rank r₁·r₂ where its factors are smaller than the map
        smaller = expr.left.rank * expr.right.rank * sum(expr.shape) < expr.shape[0] * expr.shape[1]
        return khatri_rao(expr.left, expr.right) if smaller else expr
    return expr


def _flat(op: Operator) -> tuple[Operator, ...]:
    return op.terms if isinstance(op, Sum) else (op,)


def _scale_lowrank(op: LowRank, number: Number) -> LowRank:
    return LowRank(op.B, op.A, op.diag, op.core, op.scale * number)


def _scale_deviation(op: Deviation, number: Number) -> Deviation:
    return replace(op, scale=op.scale * number)


def _scale_sparse(op: Sparse, number: Number) -> Sparse:
    return Sparse(
        op.values * (number[..., None] if isinstance(number, Tensor) and number.ndim else number),
        op.index,
        op.size_out,
        op.size_in,
    )


def _diagonal_lowrank(left: Diagonal, right: LowRank) -> LowRank:
    return LowRank(left.d.unsqueeze(-1) * right.B, right.A, right.diag, right.core, right.scale)


def _lowrank_diagonal(left: LowRank, right: Diagonal) -> LowRank:
    return LowRank(left.B, left.A * right.d.unsqueeze(-2), left.diag, left.core, left.scale)


def _diagonal_diagonal(left: Diagonal, right: Diagonal) -> Diagonal:
    return Diagonal(left.d * right.d)


SCALED: dict[type, Callable] = {LowRank: _scale_lowrank, Deviation: _scale_deviation, Sparse: _scale_sparse}
PRODUCTS: dict[tuple[type, type], Callable] = {
    (Diagonal, LowRank): _diagonal_lowrank,
    (LowRank, Diagonal): _lowrank_diagonal,
    (Diagonal, Diagonal): _diagonal_diagonal,
}


def difference(expr: Operator, W: Operator) -> Operator:
    """expr − W as an operator without W where that is exact: sums, rotations, scalings and Hadamard products of W.

    >>> import torch
    >>> from rankfold.linalg import Dense, Householder
    >>> W, U = Dense(torch.randn(4, 6)), torch.randn(6, 2)
    >>> change = difference(W @ Householder(U), W)         # exact, and of rank 2: a rotation exports as a LoRA
    >>> type(change).__name__, change.rank_bound(), torch.allclose(change.dense(), (W @ Householder(U)).dense() - W.W, atol=1e-5)
    ('LowRank', 2, True)
    """
    if expr is W or (isinstance(expr, Sum) and expr.terms == (W,)):
        size_out, size_in = W.shape
        zero = next(W.leaves()).new_zeros
        return LowRank(zero(*W.batch, size_out, 0), zero(*W.batch, 0, size_in))
    if isinstance(expr, Sum):
        inside = [t for t in expr.terms if contains(t, W)]
        bare = [t for t in inside if t is W]
        if len(bare) == 1:  # the other terms are the change, whether or not they lean on W (HiRA: W + W∘Δ)
            rest = [t for t in expr.terms if t is not W]
        elif len(inside) == 1:
            rest = [difference(t, W) if t is inside[0] else t for t in expr.terms]
        else:
            rest = [*expr.terms, Scaled(W, -1.0)]
        return simplify(Sum(tuple(rest)))
    if isinstance(expr, Product) and contains(expr.left, W):
        change = _rotation_change(W, expr.right)
        return simplify(change if expr.left is W else Product(difference(expr.left, W), expr.right) + change)
    if isinstance(expr, Magnitude):
        gain = expr.gain()
        scaled = Product(Diagonal(gain), difference(expr.inner, W))
        return simplify(Sum((Product(Diagonal(gain - 1.0), W), scaled)))
    return Sum((expr, Scaled(W, -1.0)))


def _rotation_change(W: Operator, right: Operator) -> Operator:
    """W (R − 1)."""
    if isinstance(right, Householder):
        X, T = right.compact()
        return LowRank(-W.matmul((X @ T).mT).mT, X.mT)
    if isinstance(right, Sum) and sum(isinstance(t, Identity) for t in right.terms) == 1:
        return Product(W, simplify(Sum(tuple(t for t in right.terms if not isinstance(t, Identity)))))
    if isinstance(right, Product):
        return simplify(Product(_rotation_change(W, right.left), right.right) + _rotation_change(W, right.right))
    return Product(W, right) - W
