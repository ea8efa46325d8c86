"""The LoRA file of diffusers, new and old: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight".

Forms of one key, in the order in which diffusers wrote them; the model of the pipeline stands before it:

    attn1.processor.to_q_lora.down.weight     attention processors; to_out_lora is of to_out.0, to_q of q_proj in a text encoder
    attn1.to_q.lora.down.weight               and lora_linear_layer.down.weight in text encoders
    attn1.to_q.lora_A.weight                  as peft, with lora_magnitude_vector for DoRA

The scale is alpha / rank. alpha is a tensor beside the factors, or stands in the header (`lora_adapter_metadata`, the config of
peft for each model); without either the scale is 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.errors import FileError, nearest

from ..files import LIMITS, Limits, parse_json, read_header, read_tensors
from .foreign import Change, Foreign, Layout, dtype_names
from .lycoris import build, promised, stored_alpha
from .matching import PARTS, only_part, parts_hint, resolve
from .peft_config import alpha_of, checked

__all__ = ["is_diffusers", "read_diffusers"]

CONFIG = "lora_adapter_metadata"
LEAVES = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale", "lora_magnitude_vector.weight": "dora_scale", "alpha": "alpha",
}  # fmt: skip
"""How a key ends, and what lycoris.py calls that tensor."""
PROCESSORS = {
    "to_q_lora": ("to_q", "q_proj"), "to_k_lora": ("to_k", "k_proj"), "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}  # fmt: skip
"""A layer of an attention processor, and what the module is called in a U-Net and in a text encoder."""


def is_diffusers(names: list[str]) -> bool:
    """Whether the tensor names of a file are of this kind.

    >>> is_diffusers(["unet.mid_block.to_q.lora.up.weight"]), is_diffusers(["lora_unet_mid_block_to_q.alpha"])
    (True, False)
    """
    ends = tuple(leaf for leaf in LEAVES if leaf != "alpha") + tuple(f"{p}.down.weight" for p in PROCESSORS)
    return any(n.endswith(ends) for n in names)


def read_diffusers(path: str | Path, layout: Layout | None = None, part: str | None = None, limits: Limits = LIMITS) -> Foreign:
    """Read LoRA and DoRA of any generation of diffusers.

    Args:
        layout: of the model; its names decide what a key means. None keeps the file's names.
        part: read the keys of one model of the pipeline only: unet, transformer, text_encoder, ...

    Raises:
        FileError: damaged or hostile; a key of another kind, or one that fits no module, or two; shapes that don't fit each other
            or the model; a number that could not be meant.
        UnknownName: no such part.
    """
    path = Path(path)
    header = read_header(path, limits)
    stems = {name: _split(path, name) for name in header.tensors}
    kept = only_part(path, stems, part, lambda name: _owner(stems[name][0]), {p: p for p in PARTS})
    groups: dict[str, dict[str, str]] = {}  # key of a module -> tensor as lycoris.py calls it -> full name
    for name in kept:
        stem, leaf = stems[name]
        if leaf in groups.setdefault(stem, {}):
            raise FileError(f"{path}: {name!r} and {groups[stem][leaf]!r} are one tensor in two spellings")
        groups[stem][leaf] = name
    infos = {n: header.tensors[n] for own in groups.values() for n in own.values()}
    configs = _configs(path, header.metadata)
    names = _module_names(path, groups, layout, part)
    expected = promised(path, groups, infos, names, layout, limits, _vector)
    alphas = {stem: _configured(stem, change, configs) for stem, change in expected.items()}
    ranks = sorted({c.rank or 0 for s, c in expected.items() if "alpha" not in groups[s] and alphas[s] is None})
    if len(ranks) > 1:
        warnings.warn(
            f"{path}: ranks {', '.join(map(str, ranks))} and no alpha: read at scale 1, as diffusers does now; "
            "older ones scaled all but one rank. Compare outputs",
            stacklevel=2,
        )
    tensors = read_tensors(path, limits)
    changes: dict[str, Change] = {}
    for stem, own in groups.items():
        mine = _vector({leaf: tensors[n] for leaf, n in own.items()})
        alpha = stored_alpha(mine)
        alpha = alphas[stem] if alpha is None else alpha
        changes[names[stem]] = build(names[stem], mine, alpha, f"{path}: {stem}")
    return Foreign("diffusers", changes, {}, dtype_names(infos.values()))


def _split(path: Path, name: str) -> tuple[str, str]:
    plain = name.removeprefix("base_model.model.").replace(".processor.", ".")
    for leaf, called in LEAVES.items():
        if plain.endswith("." + leaf):
            return plain.removesuffix("." + leaf), called
    for layer in PROCESSORS:
        for side, called in (("down", "lora_down.weight"), ("up", "lora_up.weight")):
            if plain.endswith(f".{layer}.{side}.weight"):
                return plain.removesuffix(f".{side}.weight"), called
    end = ".".join(name.split(".")[-2:])
    raise FileError(
        f"{path}: the key {name!r} is none of a LoRA or DoRA that rankfold knows in a file of diffusers; "
        f"nearest ending: {', '.join(nearest(end, LEAVES))}"
    )


def _vector(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft stores magnitudes of a convolution as [1, out, 1, 1]."""
    m = own.get("dora_scale")
    return dict(own) if m is None or m.ndim < 3 or m.shape[0] != 1 else {**own, "dora_scale": m.flatten()}


def _spellings(stem: str) -> list[str]:
    owner, _, layer = stem.rpartition(".")
    spelled = [f"{owner}.{name}" for name in PROCESSORS[layer]] if layer in PROCESSORS else [stem]
    child, _, rest = stem.partition(".")
    if child in PARTS and rest:
        spelled += [s.removeprefix(child + ".") for s in spelled]
    return spelled + [s.replace("text_model.", "", 1) for s in spelled if "text_model." in s]  # transformers 5 dropped that level


def _module_names(path: Path, groups: Mapping[str, object], layout: Layout | None, part: str | None) -> dict[str, str]:
    if layout is None:
        return {stem: stem for stem in groups}
    hint = parts_hint((p for s in groups if (p := _owner(s)) in PARTS), part)
    return resolve(path, {s: _spellings(s) for s in groups}, layout.sites, lambda name: [name], hint)


def _owner(stem: str) -> str:
    """The model of the pipeline, where the key begins with one."""
    return stem.partition(".")[0]


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The config of peft for each model of the pipeline, checked as peft's own file is."""
    text = metadata.get(CONFIG)
    if text is None:
        return {}
    flat = parse_json(text, path, CONFIG)
    if not isinstance(flat, dict):
        raise FileError(f"{path}: {CONFIG} is a {type(flat).__name__}, not an object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        child, dot, option = key.partition(".")
        if not dot or child not in PARTS:
            raise FileError(f"{path}: {CONFIG} has {key[:60]!r}; its keys begin with one of {', '.join(PARTS)}")
        configs.setdefault(child, {"peft_type": "LORA"})[option] = value
    return {child: checked(config, f"{path}: {CONFIG}: {child}") for child, config in configs.items()}


def _configured(stem: str, change: Change, configs: Mapping[str, Mapping[str, Any]]) -> float | None:
    """alpha that makes alpha / rank the scale that the config says; None where there is no config."""
    child, _, rest = stem.partition(".")
    if (config := configs.get(child)) is None:
        return None
    alpha = alpha_of(config, rest)
    return alpha * math.sqrt(change.rank or 1) if config["use_rslora"] else alpha
