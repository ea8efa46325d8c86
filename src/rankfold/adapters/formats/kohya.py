"""One safetensors file as kohya's sd-scripts and LyCORIS write it: "lora_unet_down_blocks_0_attn_to_q.lora_down.weight".

A key is a prefix for the model of the pipeline, the module's path with "_" for ".", then what the tensor is (lycoris.py). The
underscores lose where the dots were, so the model's own list of modules decides. `alpha` is a number per module; the factors'
bytes stay as they are and the scale stays in alpha, so writing is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import CompositionError, FileError, UnknownName, nearest

from ..adapter import Adapter, Entry
from ..algebra import join_rows
from ..files import LIMITS, Limits, read_header, read_tensors, write_tensors
from .foreign import PARTS, Foreign, Layout, check_shapes, dtype_names, resolve, shapes_only
from .lycoris import ALPHA, LEAVES, build

__all__ = ["PREFIXES", "is_kohya", "read_kohya", "write_kohya"]

PREFIXES = {
    "lora_unet": "unet", "lora_transformer": "transformer", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3", "lycoris": None,
}  # fmt: skip
"""How the keys of one model of a pipeline begin (longest first wins), and what diffusers calls that model."""
ADDED = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
"""What is added to a parameter as it is, in any module."""


def is_kohya(names: list[str]) -> bool:
    """Whether the tensor names of a file are of this kind.

    >>> is_kohya(["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]), is_kohya(["unet.to_q.lora_A.weight"])
    (True, False)
    """
    return any(_prefix(n) is not None for n in names)


def _prefix(name: str) -> str | None:
    return next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(p + "_")), None)


def read_kohya(path: str | Path, layout: Layout | None = None, part: str | None = None, limits: Limits = LIMITS) -> Foreign:
    """Read LoRA, LoCon, LoHa, LoKr (with Tucker cores and dora_scale), and differences of whole weights, biases and norms.

    Args:
        layout: of the model; its names decide what a key means. None keeps the file's names.
        part: read the keys of one model of the pipeline only: unet, transformer, text_encoder, text_encoder_2, ...

    Raises:
        FileError: damaged or hostile; a key of another kind, or one that fits no module, or two; shapes that don't fit each other
            or the model; an alpha of 0.
        UnknownName: no such part.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> _ = write_kohya(path, Adapter.of([Entry("mid.to_q", torch.ones(3, 1), torch.ones(1, 2), scale=2.0)]))
    >>> read_kohya(path, Layout({"mid.to_q": (3, 2)})).changes["mid.to_q"].scale
    2.0
    """
    path = Path(path)
    header = read_header(path, limits)
    kept = _of_part(path, list(header.tensors), part)
    infos = {n: header.tensors[n] for n in kept}
    groups: dict[str, dict[str, str]] = {}  # module of the file -> what it is -> full name
    for name in kept:
        stem, leaf = _split(path, name)
        groups.setdefault(stem, {})[leaf] = name
    names = _module_names(path, groups, layout, part)
    empty = shapes_only(path, infos)
    changed = {s: own for s, own in groups.items() if any(leaf in LEAVES for leaf in own)}
    for stem, own in changed.items():
        if set(own) & {"diff", "w_norm"}:
            raise FileError(f"{path}: {stem}: has {', '.join(sorted(own))}, which are two changes of one weight")
        shapes = {leaf: empty[n] for leaf, n in own.items() if leaf in LEAVES}
        if ALPHA in shapes and shapes[ALPHA].numel() != 1:
            raise FileError(f"{path}: {stem}.alpha {list(shapes[ALPHA].shape)} is not one number")
        check_shapes(path, build(names[stem], shapes, None, f"{path}: {stem}"), stem, layout, limits)
    added = {n: f"{names[s]}.{ADDED[leaf]}" for s, own in groups.items() for leaf, n in own.items() if leaf in ADDED}
    for name, parameter in added.items():
        _fits(path, name, tuple(empty[name].shape), parameter, layout)
    tensors = read_tensors(path, limits)
    changes = {}
    for stem, own in changed.items():
        mine = {leaf: tensors[n] for leaf, n in own.items() if leaf in LEAVES}
        alpha = float(mine[ALPHA]) if ALPHA in mine else None
        changes[names[stem]] = build(names[stem], mine, alpha, f"{path}: {stem}")
    differences = {p: _shaped(tensors[n], p, layout) for n, p in added.items()}
    return Foreign("kohya", changes, differences, dtype_names(infos.values()), _about(header.metadata))


def _of_part(path: Path, names: list[str], part: str | None) -> list[str]:
    if part is None:
        return names
    if part not in PARTS:
        raise UnknownName.of("part", part, PARTS, f"there are: {', '.join(PARTS)}")
    kept = [n for n in names if (p := _prefix(n)) is not None and PREFIXES[p] == part]
    if not kept:
        there = sorted({p for n in names if (p := _prefix(n)) is not None})
        raise FileError(f"{path}: holds nothing for the {part}; its keys begin with: {', '.join(there) or 'nothing known'}")
    return kept


def _split(path: Path, name: str) -> tuple[str, str]:
    stem, _, leaf = name.partition(".")
    known = (*LEAVES, *ADDED)
    if leaf not in known or _prefix(stem) is None:
        what = "begins with none of " + ", ".join(PREFIXES) if _prefix(stem) is None else f"ends with {leaf[:40]!r}"
        close = "" if _prefix(stem) is None else f"; nearest: {', '.join(nearest(leaf, known))}"
        raise FileError(f"{path}: the key {name!r} {what}, which rankfold does not know in a kohya or LyCORIS file{close}")
    return stem, leaf


def _module_names(path: Path, groups: Mapping[str, object], layout: Layout | None, part: str | None) -> dict[str, str]:
    """Module of the file -> module of the model: of the model itself, or of its child that is called as the part is."""
    if layout is None:
        return {stem: stem for stem in groups}
    wanted = {}
    for stem in groups:
        prefix = _prefix(stem) or ""
        rest, child = stem.removeprefix(prefix + "_"), PREFIXES[prefix]
        spellings = [rest, rest.removeprefix("text_model_")]  # transformers 5 dropped that level
        wanted[stem] = spellings + [f"{child}_{s}" for s in spellings if child]
    owners = {n.rpartition(".")[0] for n in layout.parameters}
    parts = sorted({p for s in groups if (p := PREFIXES[_prefix(s) or "lycoris"])})
    hint = (
        f"the file holds changes of {', '.join(parts)}; read one of them: part={parts[0]!r}"
        if len(parts) > 1 and not part
        else ""
    )
    return resolve(path, wanted, sorted({*layout.sites, *owners}), lambda name: name.replace(".", "_"), hint)


def _fits(path: Path, key: str, shape: tuple[int, ...], parameter: str, layout: Layout | None) -> None:
    if layout is None:
        return
    there = layout.parameters.get(parameter)
    if there is None:
        raise FileError(f"{path}: {key!r} changes {parameter}, which this model does not have")
    if _core_shape(shape) != _core_shape(there):
        raise FileError(f"{path}: {key!r} is {list(shape)}; in this model {parameter} is {list(there)}")


def _core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _shaped(t: Tensor, parameter: str, layout: Layout | None) -> Tensor:
    return t if layout is None else t.reshape(layout.parameters[parameter])


def _about(metadata: Mapping[str, str]) -> dict[str, str]:
    known = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_sd_model_name")
    return {k: metadata[k][:200] for k in known if k in metadata}


def write_kohya(
    path: str | Path,
    adapter: Adapter,
    prefix: str = "lora_unet",
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Write one safetensors file; return ‖Δ' − Δ‖ / ‖Δ‖ by module (0 unless a dtype is asked for).

    Names that begin with a model of a pipeline ("unet.", "text_encoder.") get that model's prefix, all others `prefix`.

    Args:
        prefix: of `PREFIXES`.
        dtype: of the factors; None keeps their bytes.

    Raises:
        CompositionError: an embedding, a transposed linear, a stack of maps, a gain, no change at all, or two modules whose names
            differ in dots and underscores only.
        FileError: the file can't be written.
    """
    if prefix not in PREFIXES:
        raise UnknownName.of("prefix", prefix, PREFIXES)
    entries = [e for e in join_rows(adapter).entries.values() if e.rank or not e.additive]
    stems = _stems(entries, prefix)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for e in entries:
        B, A, magnitude = e.B, e.A, e.magnitude
        if dtype is not None:
            B, A, magnitude = B.to(dtype), A.to(dtype), None if magnitude is None else magnitude.to(dtype)
        errors[e.key] = _cast_error(e, B, A) if dtype is not None else 0.0
        stem, kernel = stems[e.name], e.kernel or ()
        ones = (1,) * len(kernel)
        tensors[f"{stem}.lora_up.weight"] = B.reshape(*B.shape, *ones)
        tensors[f"{stem}.lora_down.weight"] = A.reshape(e.rank, -1, *kernel)
        tensors[f"{stem}.alpha"] = _number(e.scale * e.rank)
        if magnitude is not None:
            tensors[f"{stem}.dora_scale"] = magnitude.reshape(-1, 1, *ones)
    ranks, alphas = {e.rank for e in entries}, {e.scale * e.rank for e in entries}
    module = "lycoris.kohya" if any(e.magnitude is not None for e in entries) else "networks.lora"
    about = {
        "ss_network_module": module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    write_tensors(path, tensors, about)
    return errors


def _stems(entries: list[Entry], prefix: str) -> dict[str, str]:
    if not entries:
        raise CompositionError("kohya: the adapter changes no weight")
    by_child = {part: p for p, part in reversed(PREFIXES.items()) if part is not None}
    two = any(e.name.startswith("text_encoder_2.") for e in entries)
    stems: dict[str, str] = {}
    owners: dict[str, str] = {}
    for e in entries:
        if e.gain is not None:
            raise CompositionError(f"kohya: {e.key}: rows rescaled by a gain; the format stores lengths of rows (dora_scale)")
        if e.kind not in ("linear", "convolution") or e.batch is not None:
            kind = e.kind if e.batch is None else f"a stack of {e.batch} maps ({e.kind})"
            raise CompositionError(f"kohya: {e.key}: is {kind}; the format knows linear layers and convolutions")
        if e.kind == "convolution" and e.kernel is None:
            raise CompositionError(f"kohya: {e.key}: nothing says how large its kernel is; set Entry.kernel")
        if not e.rank:
            raise CompositionError(f"kohya: {e.key}: a magnitude over rank 0; the format needs factors")
        child, _, rest = e.name.partition(".")
        if child in PARTS and rest and not (child == "transformer" and prefix == "lycoris"):
            own = "lora_te1" if child == "text_encoder" and two else by_child[child]
        else:
            own, rest = prefix, e.name
        stem = stems[e.name] = f"{own}_{rest.replace('.', '_')}"
        if stem in owners:
            raise CompositionError(f"kohya: {owners[stem]} and {e.name} would both be called {stem}; the format has no dots")
        owners[stem] = e.name
    return stems


def _number(alpha: float) -> Tensor:
    """In float32 where that holds it, as sd-scripts writes it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)


def _cast_error(e: Entry, B: Tensor, A: Tensor) -> float:
    before, after = e.B.double() @ e.A.double(), B.double() @ A.double()
    size = float(before.norm())
    return float((after - before).norm()) / size if size else 0.0
