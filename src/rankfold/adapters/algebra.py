"""Adapters as vectors: pure functions that are exact on the changes Δ = scale · B A, never on the factors.

Averaging B and A apart is not averaging their products: (½ΣB)(½ΣA) has cross terms, and a factor √r creeps in where scales
differ. Here every sum is the sum of the products, for any ranks and scales (factors are put side by side; ranks add). Only
`truncate` loses something, and it says how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rankfold.errors import CompositionError, OptionError
from rankfold.linalg.decompositions import product_svd
from rankfold.linalg.factors import split

from .adapter import Adapter, Entry

__all__ = [
    "add",
    "average",
    "concat",
    "cosine",
    "inner",
    "join_rows",
    "norm",
    "project",
    "rotate",
    "scale",
    "subtract",
    "truncate",
]

Extras = Literal["refuse", "first", "average"]


def _additive(adapter: Adapter, what: str) -> None:
    bad = [k for k, e in adapter.entries.items() if not e.additive]
    if bad:
        raise CompositionError(
            f"{what}: {len(bad)} sites rescale the rows of the changed weight (first: {bad[0]}), so their change depends on "
            "the base and is no vector. Fold the adapter into its base and work on weights, or use an adapter without magnitude"
        )


def _map(adapter: Adapter, f: Callable[[Entry], Entry]) -> Adapter:
    return Adapter({k: f(e) for k, e in adapter.entries.items()}, adapter.extras, adapter.metadata)


def _absorbed(entry: Entry, weight: float) -> tuple[Tensor, Tensor]:
    """(B', A') with B' A' = weight · scale · B A: the number goes into both factors evenly, in at least float32."""
    number = weight * entry.scale
    root = math.sqrt(abs(number))
    B, A = (t if t.dtype == torch.float64 else t.float() for t in (entry.B, entry.A))
    return math.copysign(root, number) * B, root * A


def scale(adapter: Adapter, number: float) -> Adapter:
    """number · Δ at every site; the factors' bytes stay. Extra tensors are values, not changes, and stay too.

    Raises:
        CompositionError: an entry with magnitude or gain.
    """
    _additive(adapter, "scale")
    return _map(adapter, lambda e: replace(e, scale=e.scale * number))


def concat(entries: Sequence[Entry], weights: Sequence[float] | None = None) -> Entry:
    """Σ_k w_k Δ_k of one site, exactly: [B_1 B_2 ...] · [A_1; A_2; ...]. Ranks add.

    Where all w_k · scale_k agree, the factors' bytes stay and the number is kept apart; else it goes into them, in float32.

    Raises:
        CompositionError: entries of different sites or shapes, or with magnitude or gain.

    >>> a = Entry("q", torch.ones(3, 1), torch.ones(1, 2), scale=2.0)
    >>> concat([a, a], [0.5, 0.25]).delta().dense()[0, 0], concat([a, a]).rank
    (tensor(1.5000), 2)
    """
    weights = [1.0] * len(entries) if weights is None else list(weights)
    if not entries or len(weights) != len(entries):
        raise OptionError(f"concat: {len(entries)} entries and {len(weights)} weights")
    first = entries[0]
    for e in entries:
        if (e.key, e.shape, e.kind, e.batch) != (first.key, first.shape, first.kind, first.batch):
            raise CompositionError(
                f"concat: {first.key} {first.shape} ({first.kind}) and {e.key} {e.shape} ({e.kind}) are not one site"
            )
        if not e.additive:
            _additive(Adapter.of([e]), "concat")
    numbers = {w * e.scale for w, e in zip(weights, entries)}
    dtypes = {t.dtype for e in entries for t in (e.B, e.A)}
    if len(numbers) == 1 and len(dtypes) == 1:
        pairs, number = [(e.B, e.A) for e in entries], numbers.pop()
    else:
        pairs, number = [_absorbed(e, w) for e, w in zip(entries, weights)], 1.0
    return replace(first, B=torch.cat([B for B, _ in pairs], -1), A=torch.cat([A for _, A in pairs], -2), scale=number)


def add(*adapters: Adapter, weights: Sequence[float] | None = None, extras: Extras = "refuse") -> Adapter:
    """Σ_k w_k Δ_k at every site that any of them has, exactly.

    Args:
        weights: one number per adapter; 1 each by default.
        extras: what to do with an extra tensor that differs among them: "refuse", take the "first", or the weighted "average"
            (weights normalised to sum one, over those that have it).

    Raises:
        CompositionError: entries with magnitude or gain, sites of other shapes, or extra tensors that differ.

    >>> a = Adapter.of([Entry("q", torch.ones(3, 1), torch.ones(1, 2))])
    >>> add(a, a, weights=[1, -1]).entries["q"].delta().dense().abs().max()
    tensor(0.)
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(weights) != len(adapters):
        raise OptionError(f"add: {len(adapters)} adapters and {len(weights)} weights")
    for adapter in adapters:
        _additive(adapter, "add")
    keys = list(dict.fromkeys(k for a in adapters for k in a.entries))
    entries = {}
    for key in keys:
        having = [(a.entries[key], w) for a, w in zip(adapters, weights) if key in a.entries]
        entries[key] = concat([e for e, _ in having], [w for _, w in having])
    return Adapter(entries, _extras(adapters, weights, extras), adapters[0].metadata)


def _extras(adapters: Sequence[Adapter], weights: Sequence[float], mode: Extras) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for a in adapters for n in a.extras):
        having = [(a.extras[name], w) for a, w in zip(adapters, weights) if name in a.extras]
        first = having[0][0]
        if mode == "first" or all(torch.equal(t, first) for t, _ in having):
            out[name] = first
        elif mode == "average":
            total = sum(w for _, w in having)
            if not total or any(t.shape != first.shape for t, _ in having):
                raise CompositionError(f"add: extra tensor {name!r} can't be averaged: shapes differ, or the weights sum to zero")
            mean = sum((w / total * t.double() for t, w in having), torch.zeros_like(first, dtype=torch.float64))
            out[name] = mean.to(first.dtype)
        else:
            raise CompositionError(
                f"add: extra tensor {name!r} differs among the adapters, and a value is no change that could be added. "
                'Say extras="first" or extras="average"'
            )
    return out


def subtract(a: Adapter, b: Adapter, extras: Extras = "first") -> Adapter:
    """Δ_a − Δ_b, exactly."""
    return add(a, b, weights=[1.0, -1.0], extras=extras)


def average(*adapters: Adapter, weights: Sequence[float] | None = None, extras: Extras = "average") -> Adapter:
    """Σ_k w_k Δ_k with weights normalised to sum one: the mean of the changes. A site that one lacks counts as no change there.

    Raises:
        OptionError: weights that sum to zero.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    total = sum(weights)
    if not total:
        raise OptionError("average: the weights sum to zero; for a difference use subtract")
    return add(*adapters, weights=[w / total for w in weights], extras=extras)


def truncate(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, dict[str, float]]:
    """The best approximation of every Δ by a smaller rank, and its relative Frobenius error by site (Eckart and Young, 1936).

    The SVD is that of the product, found from the factors: no [out, in] matrix is formed. The result has B = U√S, A = √S Vᵀ and
    scale 1.

    Args:
        rank: largest rank to keep; None keeps all that `energy` asks for.
        energy: smallest share of ‖Δ‖² to keep, in (0, 1]; sites then get ranks of their own.

    Raises:
        OptionError: neither or impossible numbers.
        CompositionError: an entry with magnitude or gain.

    >>> a = Adapter.of([Entry("q", torch.eye(3), torch.diag(torch.tensor([4.0, 3.0, 0.0])))])
    >>> small, error = truncate(a, rank=1)
    >>> small.ranks, round(error["q"], 6)
    ({'q': 1}, 0.6)
    """
    if (rank is None and energy is None) or (rank is not None and rank < 0) or (energy is not None and not 0 < energy <= 1):
        raise OptionError(f"truncate: rank {rank}, energy {energy}; give a rank >= 0, or an energy in (0, 1]")
    _additive(adapter, "truncate")
    entries, errors = {}, {}
    for key, e in adapter.entries.items():
        U, S, Vh = product_svd(e.B.double() * e.scale, e.A.double())
        power = S.square().reshape(-1, S.shape[-1]).sum(0).cumsum(0)  # a stack of maps has one rank
        total = float(power[-1]) if len(power) else 0.0
        full = S.shape[-1]
        kept = full if energy is None else int((power < energy * total * (1 - 1e-12)).sum()) + 1
        if total == 0.0:
            kept = 0
        kept = min(kept, full) if rank is None else min(kept, rank, full)
        B, A = split(U[..., :kept], S[..., :kept], Vh[..., :kept, :])
        dtype = torch.promote_types(torch.promote_types(e.B.dtype, e.A.dtype), torch.float32)
        entries[key] = replace(e, B=B.to(dtype), A=A.to(dtype), scale=1.0)
        errors[key] = math.sqrt(float(S[..., kept:].square().sum()) / total) if total else 0.0
    return Adapter(entries, adapter.extras, adapter.metadata), errors


def inner(a: Adapter, b: Adapter) -> float:
    """Σ_sites ⟨Δ_a, Δ_b⟩_F = Σ s_a s_b tr((B_aᵀ B_b)(A_b A_aᵀ)), in float64, from r × r products only. Extra tensors don't enter.

    Raises:
        CompositionError: an entry with magnitude or gain, or one site of two shapes.
    """
    _additive(a, "inner")
    _additive(b, "inner")
    total = 0.0
    for key in a.entries.keys() & b.entries.keys():
        x, y = a.entries[key], b.entries[key]
        if (x.shape, x.batch) != (y.shape, y.batch):
            raise CompositionError(
                f"inner: {key} is {x.shape} in one adapter and {y.shape} in the other; they belong to different bases"
            )
        left, right = x.B.double().mT @ y.B.double(), x.A.double() @ y.A.double().mT
        total += x.scale * y.scale * float((left * right).sum())
    return total


def norm(adapter: Adapter) -> float:
    """‖Δ‖_F over all sites."""
    return math.sqrt(max(inner(adapter, adapter), 0.0))


def cosine(a: Adapter, b: Adapter) -> float:
    """⟨Δ_a, Δ_b⟩ / (‖Δ_a‖ ‖Δ_b‖); 0 where one of them is zero.

    >>> a = Adapter.of([Entry("q", torch.ones(3, 1), torch.ones(1, 2))])
    >>> cosine(a, scale(a, -2.0))
    -1.0
    """
    size = norm(a) * norm(b)
    return max(-1.0, min(1.0, inner(a, b) / size)) if size else 0.0


def project(adapter: Adapter, onto: Sequence[Adapter]) -> tuple[Adapter, list[float]]:
    """The nearest combination Σ c_k Δ_k of `onto` to Δ, and its coefficients c = G⁺ g, G_kl = ⟨Δ_k, Δ_l⟩, g_k = ⟨Δ_k, Δ⟩.

    What is left, `subtract(adapter, projection)`, is orthogonal to all of `onto`.
    """
    if not onto:
        raise OptionError("project: give at least one adapter to project onto")
    G = torch.tensor([[inner(a, b) for b in onto] for a in onto], dtype=torch.float64)
    g = torch.tensor([inner(a, adapter) for a in onto], dtype=torch.float64)
    c = (torch.linalg.pinv(G, hermitian=True) @ g).tolist()
    return add(*onto, weights=c, extras="first"), c


def rotate(adapter: Adapter, left: Mapping[str, Tensor] | None = None, right: Mapping[str, Tensor] | None = None) -> Adapter:
    """Q Δ Rᵀ at the sites named: the change in other coordinates of its output (Q: [out', out]) and input (R: [in', in]).

    Orthogonal Q and R keep norms, inner products and spectra. Sites without one keep that side.

    Raises:
        OptionError: a site that the adapter does not have, or a shape that does not fit.
        CompositionError: an entry with magnitude or gain.
    """
    _additive(adapter, "rotate")
    left, right = left or {}, right or {}
    unknown = sorted((left.keys() | right.keys()) - adapter.entries.keys())
    if unknown:
        raise OptionError(f"rotate: the adapter has no site {unknown[0]!r}; it has: {', '.join(list(adapter.entries)[:8])}")

    def turn(e: Entry) -> Entry:
        Q, R = left.get(e.key), right.get(e.key)
        for side, M, size in (("left", Q, e.shape[0]), ("right", R, e.shape[1])):
            if M is not None and (M.ndim != 2 or M.shape[1] != size):
                raise OptionError(f"rotate: {side}[{e.key!r}] is {list(M.shape)}; its second size must be {size}")
        B = e.B if Q is None else Q.to(e.B) @ e.B
        return replace(e, B=B, A=e.A if R is None else e.A @ R.to(e.A).T)

    return _map(adapter, turn)


def join_rows(adapter: Adapter) -> Adapter:
    """Row slices of one weight (q, k, v of a fused product) as one entry of the whole weight, exactly; ranks add.

    Raises:
        CompositionError: a slice that does not say how many rows the whole weight has, or rescaled rows that don't cover it.
    """
    groups: dict[str, list[Entry]] = {}
    for e in adapter.entries.values():
        groups.setdefault(e.name, []).append(e)
    return Adapter.of([_whole(group) for group in groups.values()], adapter.extras, adapter.metadata)


def _whole(slices: list[Entry]) -> Entry:
    first = slices[0]
    if first.rows is None:
        return first
    total = first.total_rows
    if total is None:
        raise CompositionError(f"{first.key}: is a slice, and nothing says how many rows {first.name} has; set Entry.total_rows")
    slices = sorted(slices, key=lambda e: e.rows or (0, 0))
    padded = []
    for e in slices:
        start, stop = e.rows or (0, total)
        B = e.B.new_zeros(total, e.rank)
        B[start:stop] = e.B
        padded.append(replace(e, B=B, rows=None, total_rows=None, magnitude=None, gain=None))
    whole = concat(padded)
    if all(e.additive for e in slices):
        return whole
    covered = sum(e.shape[0] for e in slices) == total
    magnitudes = [e.magnitude for e in slices if e.magnitude is not None]
    gains = [e.gain for e in slices if e.gain is not None]
    if covered and len(magnitudes) == len(slices):
        return replace(whole, magnitude=torch.cat(magnitudes))
    if covered and len(gains) == len(slices):
        return replace(whole, gain=torch.cat(gains))
    raise CompositionError(
        f"{first.name}: some of its rows are rescaled and some are not; such slices can't be joined into one entry"
    )
