"""The folder of Hugging Face's peft (0.21): adapter_config.json and adapter_model.safetensors, for LoRA, rsLoRA and DoRA.

Written so that it is exact: the factors' bytes as they are, the scale in lora_alpha and alpha_pattern (folding it into a bf16 B
would cost 2e-3), and init_lora_weights true, because peft runs other inits again at load time. Read so that nothing is guessed:
the tensors' names are the truth, no pattern is run as a regular expression, and an option that would change the function is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.errors import CompositionError, FileError

from ..adapter import Adapter, Entry
from ..algebra import join_rows
from ..files import LIMITS, Limits, atomic_folder, read_json, read_tensors, recover_folder, write_json, write_tensors
from ..fingerprint import fingerprint
from . import peft_multihead as multihead
from . import peft_stacks as stacks
from . import peft_tokens
from .peft_config import CONFIG, TENSORS, checked, factor_names, rank_of, scale_of, written

__all__ = ["CONFIG", "TENSORS", "read_peft", "write_peft"]

PREFIX = "base_model.model."

Factors = dict[str, Tensor]


def write_peft(path: str | Path, adapter: Adapter, base_model: str | None = None) -> list[str]:
    """Write the adapter as a folder that peft loads, and return notes on what a reader should know.

    Row slices are joined into one entry of their weight (exactly; ranks add). Extra tensors become `modules_to_save`, which peft
    takes as whole modules; a bias alone goes in as a trained bias, rows of an embedding as trainable tokens. Entries of rank 0
    are left out.

    Args:
        base_model: what `base_model_name_or_path` says.

    Raises:
        CompositionError: rows rescaled by a gain, or magnitudes at some sites only: peft has one switch for all.
        FileError: the folder can't be written.

    >>> import tempfile, torch
    >>> adapter = Adapter.of([Entry("layers.0.q", torch.ones(3, 1), torch.ones(1, 2), scale=2.0)])
    >>> _ = write_peft(path := tempfile.mkdtemp(), adapter)
    >>> read_peft(path).entries["layers.0.q"].scale
    2.0
    """
    adapter = join_rows(adapter)
    notes = [f"{k}: rank 0, no change, left out" for k, e in adapter.entries.items() if not e.rank and e.additive]
    entries = [e for e in adapter.entries.values() if e.rank or not e.additive]
    _writable(entries)
    entries = multihead.paired(entries)
    extras, token_rows, token_values = peft_tokens.taken(adapter.extras)
    tensors: Factors = {f"{PREFIX}{module}.{peft_tokens.PART}": t for module, t in token_values.items()}
    places = stacks.places([e.name for e in entries if e.kind in stacks.EXPERTS]) | multihead.places(entries)
    for e in entries:
        a, b = factor_names(e.kind == "embedding")
        where = PREFIX + places.get(e.name, e.name)
        tensors[f"{where}.{a}"], tensors[f"{where}.{b}"] = stacks.stored(e)
        if e.magnitude is not None:
            m = e.magnitude
            tensors[f"{where}.lora_magnitude_vector"] = m if e.kernel is None else m.reshape(1, -1, *(1,) * len(e.kernel))
    targets = [t for e in entries if (t := multihead.attention_of(e)) is not None]
    names = {e.name.rpartition(".")[0] if e.kind in stacks.EXPERTS else e.name for e in targets}
    modules: set[str] = set()
    biases: set[str] = set()
    saved = {name.rpartition(".")[0] for name in extras if not name.endswith(".bias")}
    for name, value in extras.items():
        module, _, parameter = name.rpartition(".")
        inside = any(n.startswith(module + ".") for n in names)
        if parameter == "bias" and module not in saved:
            wrapped = places.get(module, module)
            biases.add(module if wrapped == module else wrapped.partition(".base_layer")[0])
            tensors[f"{PREFIX}{wrapped}.base_layer.bias" if module in names or wrapped != module else PREFIX + name] = value
        elif inside or module in names or not module:
            why = "it belongs to no module" if not module else "a site inside its module" if inside else "its site"
            raise CompositionError(f"{name}: peft can't store this extra tensor: {why}{' is adapted too' if module else ''}")
        else:
            tensors[PREFIX + name] = value
            modules.add(module)
    if modules:
        notes.append(f"peft takes modules whole: every parameter of {', '.join(sorted(modules))} must be among the extra tensors")
    bias = "none" if not biases else "lora_only" if biases <= names else "all"
    config = _config(targets, sorted(modules), bias, adapter.metadata, base_model)
    if token_rows:
        config[peft_tokens.CONFIG_KEY] = token_rows
    with atomic_folder(path, owns=(CONFIG, TENSORS)) as folder:
        write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        write_json(folder / CONFIG, config)
    return notes


def _writable(entries: list[Entry]) -> None:
    if not entries:
        raise CompositionError("the adapter changes no weight; peft has no folder for that")
    gained = [e.key for e in entries if e.gain is not None]
    if gained:
        raise CompositionError(f"{gained[0]}: rows rescaled by a gain; peft stores lengths of rows. Give Entry.magnitude instead")
    plain = [e.key for e in entries if e.magnitude is None]
    if plain and len(plain) < len(entries):
        raise CompositionError(
            f"magnitudes at {len(entries) - len(plain)} of {len(entries)} sites (none at {plain[0]}): "
            "peft has one switch, use_dora, for all of them"
        )
    stacked = [e.key for e in entries if e.batch is not None and e.magnitude is not None]
    if stacked:
        raise CompositionError(f"{stacked[0]}: magnitudes over experts or groups of a convolution; peft has DoRA for neither")
    empty = [e.key for e in entries if not e.rank]
    if empty:
        raise CompositionError(f"{empty[0]}: a magnitude over rank 0; peft needs a rank of at least 1")


def _alpha(e: Entry) -> float:
    alpha = e.scale * stacks.rank_of(e)
    return int(alpha) if float(alpha).is_integer() else alpha  # peft declares it as an integer


def _config(
    entries: list[Entry], modules: list[str], bias: str, metadata: Mapping[str, Any], base_model: str | None
) -> dict[str, Any]:
    rank, alpha = stacks.rank_of(entries[0]), _alpha(entries[0])
    experts = [e.name for e in entries if e.kind in stacks.EXPERTS]
    return written(
        metadata.get("task_type"),
        base_model,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_pattern(e.name): stacks.rank_of(e) for e in entries if stacks.rank_of(e) != rank},
        alpha_pattern={_pattern(e.name): _alpha(e) for e in entries if _alpha(e) != alpha},
        use_rslora=False,  # alpha holds the whole scale: scale = alpha / r at every site
        use_dora=entries[0].magnitude is not None,
        target_modules=[e.name for e in entries if e.kind not in stacks.EXPERTS] or None,
        **({"target_parameters": experts} if experts else {}),
        modules_to_save=modules or None,
        bias=bias,
        fan_in_fan_out=any(e.kind == "conv1d" for e in entries),
    )


def _pattern(name: str) -> str:
    """peft runs these keys as regular expressions on the end of a name, first match first: anchored, only this site is meant."""
    return "^" + name.replace(".", r"\.")


def read_peft(path: str | Path, limits: Limits = LIMITS) -> Adapter:
    """Read a folder that peft wrote, exactly: s · B A at every site, magnitudes, saved modules and biases as extras.

    The config's switches must be ones that are known not to matter, or off. `metadata` keeps task_type, base_model, options, and,
    where peft stored copies of base weights beside an adapted embedding, their fingerprint under "base_copies".

    Raises:
        FileError: not such a folder; damaged, hostile or pickled tensors; another method than LoRA; an option that would change
            the function; an alpha_pattern that would have to be run as a regular expression; ranks that contradict the config.
    """
    path = Path(path)
    recover_folder(path)
    if not (path / TENSORS).exists() and (path / "adapter_model.bin").exists():
        read_tensors(path / "adapter_model.bin", limits)  # refuses it, and says why
    config = checked(read_json(path / CONFIG, limits=limits), path / CONFIG)
    parts: dict[str, Factors] = {}
    extras: Factors = {}
    copies: Factors = {}
    rows: Factors = {}
    for name, t in read_tensors(path / TENSORS, limits).items():
        site, part = _split(name, path / TENSORS)
        if part in ("weight", "bias") or part is None:
            extras[site] = t
        elif part == peft_tokens.PART:
            rows[site] = t
        elif part == "base_layer.weight":
            copies[f"{site}.weight"] = t
        elif part == "base_layer.bias":
            if config["bias"] == "none":
                copies[f"{site}.bias"] = t
            else:
                extras[f"{site}.bias"] = t
        else:
            parts.setdefault(site, {})[part] = t
    parts = stacks.named(parts, config.get("target_parameters") or [], path / TENSORS)
    extras |= peft_tokens.read_rows(rows, config, path / TENSORS)
    entries = []
    for site, own in parts.items():
        attention = site.removesuffix(multihead.INSIDE)
        entry = _entry(attention, own, config, path)
        if multihead.is_attention(attention, parts):
            found = multihead.renamed(entry, site)
            entries += [] if found is None else [found]
            if (bias := extras.pop(f"{site}.bias", None)) is not None and site != attention:
                extras[f"{attention}.out_proj.bias"] = bias
        else:
            entries.append(entry)
    metadata: dict[str, Any] = {
        "method": "dora" if config["use_dora"] else "lora",
        "format": "peft",
        "task_type": config.get("task_type"),
        "base_model": config.get("base_model_name_or_path"),
        "options": {k: config[k] for k in ("r", "lora_alpha", "use_rslora", "lora_dropout") if k in config},
    }
    if copies:
        metadata["base_copies"] = fingerprint(copies)
    return Adapter.of(entries, extras, metadata)


def _split(name: str, path: Path) -> tuple[str, str | None]:
    """(site, part) of a stored name; part is None for a tensor of the model itself."""
    plain = name.removeprefix(PREFIX)
    for part in (
        "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
        "base_layer.weight", "base_layer.bias", peft_tokens.PART,
    ):  # fmt: skip
        if plain.endswith("." + part):
            return plain.removesuffix("." + part), part
    if plain.endswith(".lora_magnitude_vector.weight"):
        return plain.removesuffix(".lora_magnitude_vector.weight"), "lora_magnitude_vector"
    foreign = [p for p in plain.split(".") if p.startswith(("lora_", "token_adapter", "trainable_tokens", "base_layer"))]
    if foreign:
        raise FileError(f"{path}: tensor {name!r}: its part {foreign[0]!r} is not one of LoRA or DoRA that rankfold knows")
    return plain.replace(".modules_to_save.", "."), None


def _entry(site: str, own: Factors, config: Mapping[str, Any], path: Path) -> Entry:
    where = path / TENSORS
    embedding = "lora_embedding_A" in own or "lora_embedding_B" in own
    names = factor_names(embedding)
    known = {*names, "lora_magnitude_vector"}
    missing = [n for n in names if n not in own]
    if missing or own.keys() - known:
        raise FileError(f"{where}: {site} lacks {', '.join(missing) or 'nothing'}; it has: {', '.join(sorted(own))}")
    A, B = own[names[0]], own[names[1]]
    if not (A.is_floating_point() and B.is_floating_point()):
        raise FileError(f"{where}: {site}: factors of {B.dtype} and {A.dtype}; they must be floating point")
    expected = rank_of(config, site)
    read = stacks.read(site, A, B, expected, bool(stacks.targeted(site, config.get("target_parameters") or [])), where)
    A, B, rank = read.A, read.B, read.rank
    if expected is not None and expected != rank:
        raise FileError(f"{where}: {site} is of rank {rank}, {CONFIG} says {expected}")
    magnitude = own.get("lora_magnitude_vector")
    if (magnitude is not None) != config["use_dora"]:
        has = "a" if magnitude is not None else "no"
        raise FileError(f"{where}: {site} has {has} magnitude, and {CONFIG} says use_dora={config['use_dora']}")
    if magnitude is not None:
        if magnitude.numel() != B[..., 0].numel():
            raise FileError(f"{where}: {site}: {magnitude.numel()} magnitudes for {B[..., 0].numel()} rows")
        magnitude = magnitude.reshape(B.shape[:-1])
    scale = scale_of(config, site, rank)
    kind = "embedding" if embedding else ("conv1d" if config["fan_in_fan_out"] else "linear")
    return Entry(site, B, A, scale, read.kind or kind, magnitude=magnitude, kernel=read.kernel)
