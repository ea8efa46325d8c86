"""How kohya's sd-scripts and LyCORIS name a module: a prefix for the model of the pipeline, then its path with "_" for ".".

The underscores lose where the dots were, so the model's own list of modules decides. SDXL's U-Net goes by the names of the
original code (original_names.py); its text encoders, and all of SD 1 and 2, by those of diffusers and transformers 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rankfold.errors import CompositionError, FileError, UnknownName, nearest

from ..adapter import Entry
from .foreign import Layout
from .lycoris import LEAVES
from .matching import PARTS, only_part, parts_hint, resolve
from .original_names import original_names

__all__ = ["ADDED", "PREFIXES", "is_kohya", "modules_of_part", "names_in_model", "stems"]

PREFIXES = {
    "lora_unet": "unet", "lora_transformer": "transformer", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3", "lycoris": None,
}  # fmt: skip
"""How the keys of one model of a pipeline begin (longest first wins), and what diffusers calls that model."""
ADDED = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
"""What is added to a parameter as it is, in any module."""
LEVEL = "text_model."
"""A level of CLIP's text encoders that kohya's names have and transformers 5 dropped."""
UNMAPPED = {
    "double_blocks_": "FLUX or HunyuanImage", "single_blocks_": "FLUX or HunyuanImage", "joint_blocks_": "Stable Diffusion 3",
}  # fmt: skip
"""Blocks of an original code whose q, k and v are one weight and those of diffusers three: there is no module to fit."""


def is_kohya(names: list[str]) -> bool:
    """Whether the tensor names of a file are of this kind.

    >>> is_kohya(["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]), is_kohya(["unet.to_q.lora_A.weight"])
    (True, False)
    """
    return any(_prefix(n) for n in names)


def _prefix(name: str) -> str:
    return next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(p + "_")), "")


def modules_of_part(path: Path, names: Iterable[str], part: str | None) -> dict[str, dict[str, str]]:
    """{module as the file calls it: {what a tensor is: its full name}} of one model of a pipeline, or of all.

    Raises:
        FileError: a key of another kind, or nothing for that part. UnknownName: no such part.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in only_part(path, names, part, _prefix, PREFIXES):
        stem, _, leaf = name.partition(".")
        known = (*LEAVES, *ADDED)
        if not _prefix(stem):
            raise FileError(
                f"{path}: the key {name!r} begins with none of {', '.join(PREFIXES)}, "
                "which rankfold does not know in a kohya or LyCORIS file"
            )
        if leaf not in known:
            raise FileError(
                f"{path}: the key {name!r} ends with {leaf[:40]!r}, which rankfold does not know in a kohya or LyCORIS file; "
                f"nearest: {', '.join(nearest(leaf, known))}"
            )
        groups.setdefault(stem, {})[leaf] = name
    return groups


def names_in_model(path: Path, stems: Iterable[str], layout: Layout | None, part: str | None) -> dict[str, str]:
    """Module of the file -> module of the model: of the model itself, or of its child that is called as the part is.

    Raises:
        FileError: a name that fits no module, or two.
    """
    stems = list(stems)
    if layout is None:
        return {stem: stem for stem in stems}
    wanted = {}
    for stem in stems:
        prefix = _prefix(stem)
        rest, child = stem.removeprefix(prefix + "_"), PREFIXES[prefix]
        spellings = [rest, rest.removeprefix(_flat(LEVEL))]
        wanted[stem] = spellings + [f"{child}_{s}" for s in spellings if child]
    modules = sorted({*layout.sites, *(n.rpartition(".")[0] for n in layout.parameters)})
    original = original_names(modules)
    hint = parts_hint((p for s in stems if (p := PREFIXES[_prefix(s)])), part) or _why_unmapped(stems)
    return resolve(path, wanted, modules, lambda name: {_flat(name), _flat(original.get(name, name))}, hint)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _why_unmapped(stems: Iterable[str]) -> str:
    for stem in stems:
        for block, family in UNMAPPED.items():
            if block in stem:
                return (
                    f"{block}* are blocks of the original code of {family}, whose q, k and v are one weight: "
                    "give that model, or convert the file with diffusers first"
                )
    return ""


def stems(entries: list[Entry], prefix: str | None) -> dict[str, str]:
    """{name of an entry: what a file calls its module}. Names that begin with a model of a pipeline get that model's prefix.

    Args:
        prefix: of all others; None is lora_te for the modules of a text encoder of CLIP and lora_unet for the rest.

    Raises:
        CompositionError: two modules whose names differ in dots and underscores only. UnknownName: no such prefix.
    """
    if prefix is not None and prefix not in PREFIXES:
        raise UnknownName.of("prefix", prefix, PREFIXES)
    by_child = {part: p for p, part in reversed(PREFIXES.items()) if part is not None}
    two = any(e.name.startswith("text_encoder_2.") for e in entries)
    clip = any(e.name.removeprefix(LEVEL).startswith("encoder.layers.") for e in entries)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for e in entries:
        child, _, rest = e.name.partition(".")
        if child in PARTS and rest and not (child == "transformer" and prefix == "lycoris"):
            own = "lora_te1" if child == "text_encoder" and two else by_child[child]
        else:
            own, rest = prefix or ("lora_te" if clip else "lora_unet"), e.name
        if own.startswith("lora_te") and rest.startswith("encoder.layers."):
            rest = LEVEL + rest
        stem = found[e.name] = f"{own}_{_flat(rest)}"
        if stem in owners:
            raise CompositionError(f"kohya: {owners[stem]} and {e.name} would both be called {stem}; the format has no dots")
        owners[stem] = e.name
    return found
