"""The adapter of torchtune in its own names: "layers.0.attn.q_proj.lora_a.weight", with adapter_config.json beside it.

torchtune's names are Meta's. Its checkpointer also writes peft's folder for most models, which `read_peft` reads; this is for
the rest. Rotary embedding turns pairs of rows of q and k: Meta's order has the two rows of a pair beside each other, that of
transformers has them half a head apart. torchtune keeps Meta's order for the families in `INTERLEAVED`, so there the rows of B at
q_proj and k_proj (and their magnitudes) are moved, as its own conversion of the base does: [heads, half, 2] -> [heads, 2, half].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankfold.errors import FileError, nearest

from ..files import LIMITS, Limits, read_header, read_json, read_tensors
from .foreign import Foreign, Layout, dtype_names
from .lycoris import build, promised
from .matching import resolve
from .numbers import number, rank_number
from .peft_config import CONFIG, TENSORS
from .rotary import Heads, halves_of_pairs

__all__ = ["INTERLEAVED", "is_torchtune", "read_torchtune"]

INTERLEAVED = {"llama", "mistral", "gemma", "gemma2"}
"""Values of `config.model_type` in transformers for which torchtune's q and k are in Meta's order."""
PLAIN = {"qwen2", "qwen3"}
MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
LEAVES = {"lora_a.weight": "lora_down.weight", "lora_b.weight": "lora_up.weight", "magnitude": "dora_scale"}


def is_torchtune(names: list[str]) -> bool:
    """Whether the tensor names of a file are of this kind.

    >>> is_torchtune(["layers.0.attn.q_proj.lora_a.weight"]), is_torchtune(["layers.0.attn.q_proj.lora_A.weight"])
    (True, False)
    """
    return any(n.endswith(("lora_a.weight", "lora_b.weight")) for n in names)


def read_torchtune(
    path: str | Path, layout: Layout | None = None, heads: Heads | None = None, limits: Limits = LIMITS
) -> Foreign:
    """Read LoRA and DoRA of torchtune, from a folder with one safetensors file and adapter_config.json.

    Args:
        layout: of the model. None keeps the file's names and order of rows.
        heads: of the model's attention; needed for q and k.

    Raises:
        FileError: no adapter_config.json (alpha stands only there); a key of another kind, or one that fits no module; shapes
            that don't fit; q or k of a model whose order of rows in torchtune is not known.
    """
    path = Path(path)
    config = _config(path)
    file = path / TENSORS
    if not file.is_file():
        file = next(iter(sorted(path.glob("*.safetensors"))), file)
    header = read_header(file, limits)
    groups: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        stem, leaf = _split(file, name)
        groups.setdefault(stem, {})[leaf] = name
    names = {s: s for s in groups}
    if layout is not None:
        names = resolve(file, {s: [_translated(s)] for s in groups}, layout.sites, lambda name: [name])
    moved = {s for s in groups if layout is not None and s.endswith((".attn.q_proj", ".attn.k_proj"))}
    for stem, change in promised(file, groups, header.tensors, names, layout, limits).items():
        if change.rank != config["r"]:
            raise FileError(f"{file}: {stem} is of rank {change.rank}, {CONFIG} says {config['r']}")
        if stem in moved:
            _known_order(file, stem, heads, change.shape[0])
    tensors = read_tensors(file, limits)
    changes = {}
    for stem, own in groups.items():
        mine = {leaf: tensors[n] for leaf, n in own.items()}
        if stem in moved and heads is not None and heads.model_type in INTERLEAVED:
            count = heads.queries if stem.endswith("q_proj") else heads.keys
            mine |= {k: halves_of_pairs(mine[k], count) for k in ("lora_up.weight", "dora_scale") if k in mine}
        changes[names[stem]] = build(names[stem], mine, float(config["lora_alpha"]), f"{file}: {stem}")
    return Foreign(
        "torchtune", changes, {}, dtype_names(header.tensors.values()), {"options": {k: config[k] for k in ("r", "lora_alpha")}}
    )


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise FileError(f"{path}: no {CONFIG}, which alone says what alpha is. Give the folder that torchtune wrote")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise FileError(f"{path / CONFIG}: must be an object")
    known = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "task_type"}
    on = sorted(k for k, v in config.items() if k not in known and v not in (None, False, {}, []))
    if on:
        raise FileError(f"{path / CONFIG}: {on[0][:40]}={str(config[on[0]])[:40]}: rankfold does not know what that does")
    config["r"] = rank_number(config.get("r"), f"{path / CONFIG}: r")
    if not number(config.get("lora_alpha"), f"{path / CONFIG}: lora_alpha") > 0:
        raise FileError(f"{path / CONFIG}: lora_alpha {config['lora_alpha']} is not what torchtune writes there")
    return config


def _split(file: Path, name: str) -> tuple[str, str]:
    for leaf, called in LEAVES.items():
        if name.endswith("." + leaf):
            return name.removesuffix("." + leaf), called
    end = ".".join(name.split(".")[-2:])
    raise FileError(
        f"{file}: the key {name!r} is none of a LoRA or DoRA that torchtune writes; "
        f"nearest ending: {', '.join(nearest(end, LEAVES))}"
    )


def _translated(stem: str) -> str:
    """The name in transformers; the stem itself where torchtune has no such layer, so that the message names it."""
    if stem == "output":
        return "lm_head"
    layers, _, rest = stem.partition(".")
    number, _, module = rest.partition(".")
    return f"model.layers.{number}.{MODULES[module]}" if layers == "layers" and number.isdigit() and module in MODULES else stem


def _known_order(file: Path, stem: str, heads: Heads | None, rows: int) -> None:
    if heads is None or heads.model_type not in INTERLEAVED | PLAIN:
        kind = "of unknown kind" if heads is None else repr(heads.model_type)
        raise FileError(
            f"{file}: {stem}: the order of its rows in torchtune is known for {', '.join(sorted(INTERLEAVED | PLAIN))}; "
            f"this model is {kind}. Have torchtune write peft's folder instead"
        )
    count = heads.queries if stem.endswith("q_proj") else heads.keys
    if rows % (2 * count):
        raise FileError(f"{file}: {stem}: {rows} rows are not {count} heads of an even size")
