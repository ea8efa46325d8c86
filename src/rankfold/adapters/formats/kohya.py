"""One safetensors file as kohya's sd-scripts and LyCORIS write it: "lora_unet_down_blocks_0_attn_to_q.lora_down.weight".

A key is a prefix for the model of the pipeline, the module's path with "_" for ".", then what the tensor is (lycoris.py). The
underscores lose where the dots were, so the model's own list of modules decides. `alpha` is a number per module; the factors'
bytes stay as they are and the scale stays in alpha, so writing is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import CompositionError, FileError

from ..adapter import Adapter, Entry
from ..algebra import join_rows
from ..files import LIMITS, Limits, read_header, read_tensors, write_tensors
from .foreign import Foreign, Layout, dtype_names
from .kohya_names import ADDED, PREFIXES, is_kohya, modules_of_part, names_in_model, stems
from .lycoris import LEAVES, build, promised, stored_alpha
from .rounding import cast, relative_error

__all__ = ["PREFIXES", "is_kohya", "read_kohya", "write_kohya"]


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
    groups = modules_of_part(path, header.tensors, part)
    infos = {n: header.tensors[n] for own in groups.values() for n in own.values()}
    names = names_in_model(path, groups, layout, part)
    changed = {s: kept for s, own in groups.items() if (kept := {k: n for k, n in own.items() if k in LEAVES})}
    for stem in changed:
        if groups[stem].keys() & {"diff", "w_norm"}:
            raise FileError(f"{path}: {stem}: has {', '.join(sorted(groups[stem]))}, which are two changes of one weight")
    promised(path, changed, infos, names, layout, limits)
    added = {n: f"{names[s]}.{ADDED[leaf]}" for s, own in groups.items() for leaf, n in own.items() if leaf in ADDED}
    for name, parameter in added.items():
        _fits(path, name, infos[name].shape, parameter, layout)
    tensors = read_tensors(path, limits)
    changes = {}
    for stem, own in changed.items():
        mine = {leaf: tensors[n] for leaf, n in own.items()}
        changes[names[stem]] = build(names[stem], mine, stored_alpha(mine), f"{path}: {stem}")
    differences = {p: _shaped(tensors[n], p, layout) for n, p in added.items()}
    return Foreign("kohya", changes, differences, dtype_names(infos.values()), _about(header.metadata))


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
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Write one safetensors file; return ‖Δ' − Δ‖ / ‖Δ‖ by module (0 unless a dtype is asked for).

    Names that begin with a model of a pipeline ("unet.", "text_encoder.") get that model's prefix, all others `prefix`. A U-Net
    of SDXL keeps the names of diffusers, which sd-scripts turns into those of the original code when it loads them.

    Args:
        prefix: of `PREFIXES`; None is lora_te for a text encoder of CLIP, lora_unet for all else.
        dtype: of the factors; None keeps their bytes.

    Raises:
        CompositionError: an embedding, a transposed linear, a stack of maps, a gain, no change at all, or two modules whose names
            differ in dots and underscores only.
        FileError: the file can't be written.
    """
    entries = [e for e in join_rows(adapter).entries.values() if e.rank or not e.additive]
    _writable(entries)
    called = stems(entries, prefix)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for e in entries:
        B, A = (cast(t, dtype, f"kohya: {e.key}") for t in (e.B, e.A))
        errors[e.key] = relative_error(e, replace(e, B=B, A=A))
        stem, kernel = called[e.name], e.kernel or ()
        ones = (1,) * len(kernel)
        tensors[f"{stem}.lora_up.weight"] = B.reshape(*B.shape, *ones)
        tensors[f"{stem}.lora_down.weight"] = A.reshape(e.rank, -1, *kernel)
        tensors[f"{stem}.alpha"] = _number(e.scale * e.rank)
        if e.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = cast(e.magnitude, dtype, f"kohya: {e.key}").reshape(-1, 1, *ones)
    ranks, alphas = {e.rank for e in entries}, {e.scale * e.rank for e in entries}
    module = "lycoris.kohya" if any(e.magnitude is not None for e in entries) else "networks.lora"
    about = {
        "ss_network_module": module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    write_tensors(path, tensors, about)
    return errors


def _writable(entries: list[Entry]) -> None:
    if not entries:
        raise CompositionError("kohya: the adapter changes no weight")
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


def _number(alpha: float) -> Tensor:
    """In float32 where that holds it, as sd-scripts writes it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)
