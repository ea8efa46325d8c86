"""The tensors of LyCORIS and kohya for one module, as factors of the map [out, in · kernel].

ΔW = alpha / rank · (what the tensors build), alpha defaulting to the rank:

    lora    lora_up [out, r], lora_down [r, in, *k]                             ΔW = up · down
            with lora_mid [r, r, *k] and lora_down [r, in, 1, 1]                ΔW_oik = Σ_mn up_om mid_mnk down_ni
    loha    hada_w1_a [out, r], hada_w1_b [r, in·k], the same with 2            ΔW = (w1_a w1_b) ∘ (w2_a w2_b)
            with hada_t1, t2 [r, r, *k], hada_w1_a [r, out], w1_b [r, in]       each product as with lora_mid
    lokr    lokr_w1 [p, q] or w1_a [p, r], w1_b [r, q]                          ΔW = w1 ⊗ w2
            lokr_w2 [a, b, *k] or w2_a [a, r], w2_b [r, b·k]; with lokr_t2 [r, r, *k]: w2_a [r, a], w2_b [r, b]
            both whole: no alpha

`dora_scale` [out, 1, ...] holds the lengths of the rows of W + ΔW. Yeh et al., "Navigating Text-To-Image Customization: From
LyCORIS Fine-Tuning to Model Evaluation", 2023, arXiv:2309.14859.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import FileError

from ..files import Limits, TensorInfo
from .foreign import Change, Layout, check_shapes, shapes_only
from .numbers import number

__all__ = ["ALPHA", "LEAVES", "build", "promised", "stored_alpha"]

ALPHA = "alpha"
DORA = "dora_scale"
LORA = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LEAVES = (*LORA, *LOHA, *LOKR, ALPHA, DORA)
"""All that a changed weight may be made of."""


def promised(
    path: Path,
    groups: Mapping[str, Mapping[str, str]],
    infos: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    layout: Layout | None,
    limits: Limits,
    turned: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> dict[str, Change]:
    """The changes that the header of a file promises, by module, checked before a tensor of them is read.

    Args:
        groups: {module of the file: {what a tensor is, as `build` calls it: its full name}}.
        infos: what the header says of each.
        names: module of the file -> name of the change.
        turned: makes the tensors of a module those that `build` takes.

    Raises:
        FileError: tensors that don't belong together, or don't fit each other or the model; more than `limits` allow.
    """
    empty = shapes_only(path, infos)
    found = {}
    for stem, own in groups.items():
        found[stem] = build(names[stem], turned({leaf: empty[n] for leaf, n in own.items()}), None, f"{path}: {stem}")
        check_shapes(path, found[stem], stem, layout, limits)
    return found


def stored_alpha(own: Mapping[str, Tensor]) -> float | None:
    """The alpha that stands beside the factors of one module, if one does."""
    return float(own[ALPHA]) if ALPHA in own else None


def build(name: str, own: Mapping[str, Tensor], alpha: float | None, where: str) -> Change:
    """The change that the tensors of one module make. Works on tensors without storage too.

    Args:
        own: by what follows the module's name in the file.
        alpha: None where the file has none.
        where: for messages.

    Raises:
        FileError: tensors that are missing, don't belong together, or don't fit each other; an alpha that is not one number, or
            0, or none that could be meant.

    >>> own = {"lora_up.weight": torch.ones(3, 2), "lora_down.weight": torch.ones(2, 4)}
    >>> build("q", own, 1.0, "file").operator().dense()[0, 0]
    tensor(1.)
    """
    parts = {k: t for k, t in own.items() if k not in (ALPHA, DORA)}
    if ALPHA in own and own[ALPHA].numel() != 1:
        raise FileError(f"{where}: alpha {list(own[ALPHA].shape)} is not one number")
    families = {"lora": LORA, "hadamard": LOHA, "kron": LOKR}
    mine = [m for m, leaves in families.items() if any(leaf in leaves for leaf in parts)]
    if len(mine) != 1:
        raise FileError(f"{where}: holds {', '.join(sorted(own)) or 'nothing'}, which are not the tensors of one change")
    method = mine[0]
    rank: int | None
    kernel: tuple[int, ...] | None = None
    if method == "lora":
        tensors, rank = _lora(parts, where)
        kernel = tuple(parts[LORA[2] if LORA[2] in parts else LORA[1]].shape[2:]) or None
    elif method == "hadamard":
        tensors, rank = _loha(parts, where)
    else:
        tensors, rank = _lokr(parts, where)
    if rank is None or alpha is None:
        scale = 1.0
    elif not alpha:
        raise FileError(
            f"{where}: alpha is 0; some readers take that as no change, others as alpha = rank. Store the one you mean"
        )
    else:
        scale = number(alpha, f"{where}: alpha") / max(rank, 1)
    change = Change(name, method, tensors, scale, rank, None, kernel)
    return replace(change, magnitude=_rows(own[DORA], change.shape[0], where)) if DORA in own else change


def _take(parts: Mapping[str, Tensor], needed: tuple[str, ...], where: str) -> list[Tensor]:
    missing, foreign = [n for n in needed if n not in parts], sorted(parts.keys() - set(needed))
    if missing or foreign:
        said = (f"lacks {', '.join(missing)}" if missing else "") + (f" has {', '.join(foreign)} beside" if foreign else "")
        raise FileError(f"{where}: {said.strip()}; a change of this form has {', '.join(needed)}")
    return [parts[n] for n in needed]


def _flat(t: Tensor, label: str, where: str) -> Tensor:
    """[rows, all else]."""
    if t.ndim < 2:
        raise FileError(f"{where}: {label} {list(t.shape)} is no matrix")
    return t.flatten(1)


def _pointwise(t: Tensor, label: str, where: str) -> Tensor:
    """A matrix, stored as a convolution of kernel 1 perhaps."""
    flat = _flat(t, label, where)
    if flat.shape[1] != t.shape[1]:
        raise FileError(f"{where}: {label} {list(t.shape)} must be a matrix, or a convolution of kernel 1")
    return flat


def _joined(B: Tensor, A: Tensor, labels: str, where: str) -> tuple[Tensor, Tensor]:
    if B.shape[1] != A.shape[0]:
        raise FileError(f"{where}: {labels} {list(B.shape)} and {list(A.shape)} have different inner widths")
    return B, A


def _core(core: Tensor, down: Tensor, label: str, where: str) -> Tensor:
    """Σ_n core_mnk down_ni as [m, in · kernel]: the core [r, r, *k] multiplied into the factor at its right."""
    if core.ndim < 3 or core.shape[1] != down.shape[0]:
        raise FileError(f"{where}: {label} {list(core.shape)} beside {list(down.shape)} is not [r, r, *kernel] beside [r, in]")
    exact = torch.einsum("mnk,ni->mik", core.flatten(2).double(), down.double()).flatten(1)
    return exact.to(torch.promote_types(core.dtype, torch.float32))


def _lora(parts: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], int]:
    mid = "lora_mid.weight" in parts
    up, down, *core = _take(parts, LORA if mid else LORA[:2], where)
    B = _pointwise(up, LORA[0], where)
    if mid:
        A = _core(core[0], _pointwise(down, LORA[1], where), LORA[2], where)
    else:
        A = _flat(down, LORA[1], where)
    B, A = _joined(B, A, "lora_up and lora_down", where)
    return {"B": B, "A": A}, A.shape[0]


def _loha(parts: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], int]:
    cores = "hada_t1" in parts or "hada_t2" in parts
    w1a, w1b, w2a, w2b, *t = _take(parts, LOHA if cores else LOHA[:4], where)
    tensors: dict[str, Tensor] = {}
    for k, (a, b) in enumerate(((w1a, w1b), (w2a, w2b))):
        left, right = f"hada_w{k + 1}_a", f"hada_w{k + 1}_b"
        B, A = _flat(a, left, where), _flat(b, right, where)
        if cores:
            B, A = B.mT, _core(t[k], _pointwise(b, right, where), f"hada_t{k + 1}", where)
        tensors[f"B{k + 1}"], tensors[f"A{k + 1}"] = _joined(B, A, f"{left} and {right}", where)
    B1, A1, B2, A2 = (tensors[n] for n in ("B1", "A1", "B2", "A2"))
    if B1.shape != B2.shape or A1.shape != A2.shape:
        raise FileError(
            f"{where}: hada_w1 and hada_w2 differ in shape: {list(B1.shape)}{list(A1.shape)}, {list(B2.shape)}{list(A2.shape)}"
        )
    return tensors, A1.shape[0]


def _lokr(parts: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], int | None]:
    first = ("lokr_w1",) if "lokr_w1" in parts else ("lokr_w1_a", "lokr_w1_b")
    second = ("lokr_w2",) if "lokr_w2" in parts else ("lokr_w2_a", "lokr_w2_b")
    cores = ("lokr_t2",) if "lokr_t2" in parts else ()
    t = dict(zip((*first, *second, *cores), _take(parts, (*first, *second, *cores), where)))
    if cores and len(second) == 1:
        raise FileError(f"{where}: has lokr_t2 beside a whole lokr_w2")
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    if len(first) == 1:
        tensors["P"] = _pointwise(t["lokr_w1"], "lokr_w1", where)
    else:
        a, b = (_pointwise(t[n], n, where) for n in first)
        tensors["P1"], tensors["P2"] = _joined(a, b, "lokr_w1_a and lokr_w1_b", where)
        ranks.add(b.shape[0])
    if len(second) == 1:
        tensors["Q"] = _flat(t["lokr_w2"], "lokr_w2", where)
    else:
        a, b = (_flat(t[n], n, where) for n in second)
        if cores:
            a, b = a.mT, _core(t["lokr_t2"], _pointwise(t["lokr_w2_b"], "lokr_w2_b", where), "lokr_t2", where)
        tensors["Q1"], tensors["Q2"] = _joined(a, b, "lokr_w2_a and lokr_w2_b", where)
        ranks.add(b.shape[0])
    if len(ranks) > 1:
        raise FileError(
            f"{where}: lokr_w1 is of rank {tensors['P2'].shape[0]}, lokr_w2 of {tensors['Q2'].shape[0]}; alpha fits one only"
        )
    return tensors, next(iter(ranks), None)


def _rows(scale: Tensor, out: int, where: str) -> Tensor:
    if scale.numel() != out or (scale.ndim and scale.shape[0] != out):
        raise FileError(
            f"{where}: {DORA} {list(scale.shape)} does not hold one length per row of {out}. LyCORIS can store lengths of "
            "columns too (wd_on_out=False), which rankfold does not have"
        )
    return scale.reshape(out)
