"""How peft lays out what is no plain matrix: convolutions, and experts as `target_parameters`.

Experts: A [k·r, in], the maps one after the other; B [out, r·k], the maps interleaved. Two parameters of one module are wrapped
one around the other, the first of the module innermost, and the names show that by `base_layer`. A convolution: A is a
convolution to r channels, B one of kernel 1; over groups, peft's A reads all channels, of which a change of the weight has
only those of its own group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rankfold.errors import CompositionError, FileError

from ..adapter import Entry

__all__ = ["EXPERTS", "Read", "named", "places", "rank_of", "read", "stored", "targeted"]

EXPERTS = ("experts", "experts-transposed")
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""Of a module of experts, in the order in which transformers registers them: peft's names tell only the order."""
WRAPPED = ".base_layer"


class Read(NamedTuple):
    """Factors [maps, out, r] and [maps, r, in], or without maps; the rank as peft counts it."""

    A: Tensor
    B: Tensor
    rank: int
    kind: str | None = None
    kernel: tuple[int, ...] | None = None


def rank_of(e: Entry) -> int:
    """What peft calls the rank: over groups, that of all of them together."""
    return e.rank * (e.batch or 1) if e.kind == "convolution" else e.rank


def stored(e: Entry) -> tuple[Tensor, Tensor]:
    """(A, B) as peft stores them.

    Raises:
        CompositionError: a convolution whose kernel is not known.

    >>> import torch
    >>> e = Entry("up", torch.zeros(3, 8, 2), torch.zeros(3, 2, 5), kind="experts")
    >>> [list(t.shape) for t in stored(e)]
    [[6, 5], [8, 6]]
    """
    if e.kind in EXPERTS:
        B = e.B if e.B.ndim == 3 else e.B[None]
        return e.A.reshape(-1, e.A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
    if e.kind != "convolution":
        return e.A, e.B
    if e.kernel is None:
        raise CompositionError(f"{e.key}: nothing says which kernel this convolution has; set Entry.kernel")
    ones = (1,) * len(e.kernel)
    if e.batch is None:
        return e.A.reshape(e.rank, -1, *e.kernel), e.B.reshape(*e.B.shape, *ones)
    own = e.A.reshape(e.batch, e.rank, -1, *e.kernel)
    width = own.shape[2]
    A = own.new_zeros(e.batch, e.rank, e.batch * width, *e.kernel)
    for k in range(e.batch):
        A[k, :, k * width : (k + 1) * width] = own[k]
    return A.flatten(0, 1), e.B.reshape(-1, e.rank, *ones)


def places(names: Sequence[str]) -> dict[str, str]:
    """Where peft puts the factors of each expert parameter: under its module, deeper the earlier it comes.

    Raises:
        CompositionError: a parameter whose order in its module is not known.

    >>> places(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in PARAMETERS:
            raise CompositionError(
                f"{name}: peft wraps parameters in the order of their module; known are {', '.join(PARAMETERS)}"
            )
        modules.setdefault(module, []).append(leaf)
    found = {}
    for module, leaves in modules.items():
        ordered = sorted(leaves, key=PARAMETERS.index)
        for k, leaf in enumerate(ordered):
            found[f"{module}.{leaf}"] = module + WRAPPED * (len(ordered) - 1 - k)
    return found


def targeted(name: str, targets: Sequence[str]) -> bool:
    """Whether peft takes the parameter `name` for one of `target_parameters`."""
    return any(name == t or name.endswith("." + t) for t in targets)


def named(parts: Mapping[str, dict[str, Tensor]], targets: Sequence[str], path: Path) -> dict[str, dict[str, Tensor]]:
    """The parts by parameter where experts are targeted: "experts" and "experts.base_layer" become their parameters' names.

    Raises:
        FileError: more or fewer parts at a module than parameters of it that are targeted.
    """
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise FileError(f"{path}: target_parameters {str(targets)[:60]!r} is no list of names")
    levels: dict[str, dict[int, str]] = {}
    for site in parts:
        module = site
        while module.endswith(WRAPPED):
            module = module.removesuffix(WRAPPED)
        levels.setdefault(module, {})[(len(site) - len(module)) // len(WRAPPED)] = site
    out: dict[str, dict[str, Tensor]] = {}
    for module, by_depth in levels.items():
        own = [p for p in PARAMETERS if targeted(f"{module}.{p}", targets)]
        if not own:
            out |= {site: parts[site] for site in by_depth.values()}
            continue
        if sorted(by_depth) != list(range(len(own))):
            raise FileError(f"{path}: {module}: holds {len(by_depth)} pairs of factors for {', '.join(own)}")
        for k, parameter in enumerate(own):
            out[f"{module}.{parameter}"] = parts[by_depth[len(own) - 1 - k]]
    return out


def read(site: str, A: Tensor, B: Tensor, rank: int | None, experts: bool, path: Path) -> Read:
    """The factors of one site as an `Entry` has them; `rank` is what the config says, needed for experts.

    Raises:
        FileError: shapes that are none of peft's; a convolution over groups whose A reads the channels of other groups.
    """
    if experts:
        if not rank or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank or not A.shape[0]:
            raise FileError(f"{path}: {site}: factors {list(B.shape)} and {list(A.shape)} are no stack of rank {str(rank)[:20]}")
        count = A.shape[0] // rank
        stack = B.reshape(B.shape[0], rank, count).permute(2, 0, 1).contiguous()
        return Read(A.reshape(count, rank, -1), stack, rank, "experts")
    fits = A.ndim == B.ndim and 2 <= A.ndim <= 5 and A.shape[0] > 0 and A.numel() > 0 and B.numel() > 0
    if not fits or any(n != 1 for n in B.shape[2:]) or A.shape[0] % B.shape[1]:
        raise FileError(f"{path}: {site}: factors {list(B.shape)} and {list(A.shape)} are not [out, r] and [r, in] with r >= 1")
    groups = A.shape[0] // B.shape[1]
    if A.ndim == 2:
        if groups != 1:
            raise FileError(
                f"{path}: {site}: factors {list(B.shape)} and {list(A.shape)} are not [out, r] and [r, in] with r >= 1"
            )
        return Read(A, B, A.shape[0])
    kernel = tuple(A.shape[2:])
    if groups == 1:
        return Read(A.flatten(1), B.flatten(1), A.shape[0], "convolution", kernel)
    if A.shape[1] % groups or B.shape[0] % groups:
        raise FileError(f"{path}: {site}: factors {list(B.shape)} and {list(A.shape)} do not split into {groups} groups")
    width = A.shape[1] // groups
    whole = A.reshape(groups, -1, groups, width, *kernel)
    others = sum(int(whole[k, :, j].count_nonzero()) for k in range(groups) for j in range(groups) if j != k)
    if others:
        raise FileError(
            f"{path}: {site}: peft's A reads all channels of a convolution of {groups} groups, which no change of its weight does"
        )
    own = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [groups, r, width, *kernel]
    return Read(own.flatten(2).contiguous(), B.reshape(groups, -1, B.shape[1]), A.shape[0], "convolution", kernel)
