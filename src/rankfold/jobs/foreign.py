"""Files of kohya, LyCORIS, diffusers and torchtune: recognised by their keys, matched to a model, made ready to be attached."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter
from rankfold.adapters.files import read_header
from rankfold.adapters.formats.diffusers import is_diffusers, read_diffusers
from rankfold.adapters.formats.foreign import Change, Foreign, Layout
from rankfold.adapters.formats.kohya import is_kohya, read_kohya
from rankfold.adapters.formats.rotary import Heads
from rankfold.adapters.formats.torchtune import is_torchtune, read_torchtune
from rankfold.adapters.native import NativeAdapter, SiteRecord
from rankfold.core.attaching import specs_of
from rankfold.core.base import base_of
from rankfold.core.kinds import kind_named
from rankfold.core.site import Site
from rankfold.core.targets import every_site
from rankfold.errors import FileError
from rankfold.training.method import Method, method

__all__ = ["FOREIGN", "Source", "file_format", "fitted", "heads_of", "layout_of", "only_file", "origin", "read_foreign"]

Source = Literal["kohya", "diffusers", "torchtune"]
FOREIGN = ("kohya", "diffusers", "torchtune")


def only_file(path: str | Path) -> Path:
    """The one .safetensors file that a path means: itself, or what the folder holds.

    Raises:
        FileError: a folder with none, or with several.
    """
    path = Path(path)
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        said = ", ".join(f.name for f in files[:8])
        raise FileError(
            f"{path}: holds {f'several .safetensors files ({said}); give one of them' if files else 'no .safetensors file'}"
        )
    return files[0]


def file_format(path: Path) -> Source | None:
    """Whose adapter a .safetensors file holds, by its keys; None if of nobody known."""
    names = list(read_header(path).tensors)
    if is_torchtune(names):
        return "torchtune"
    if is_kohya(names):
        return "kohya"
    return "diffusers" if is_diffusers(names) else None


def layout_of(model: nn.Module) -> Layout:
    """Sites and parameters of the base."""
    sites = {s.name: (s.shape[0] * (s.batch or 1), s.shape[1]) for s in every_site(model) if s.rows is None}
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith("rankfold.")}
    return Layout(sites, parameters)


def heads_of(model: nn.Module) -> Heads | None:
    """Numbers of heads by a transformers config; None without one."""
    config: Any = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    keys = getattr(config, "num_key_value_heads", None)
    return Heads(str(getattr(config, "model_type", "")), queries, keys if isinstance(keys, int) else queries)


def read_foreign(path: str | Path, source: Source, model: nn.Module | None = None, part: str | None = None) -> Foreign:
    """The content of the file, its names matched to the model's; without a model under its own names.

    Raises:
        FileError: damaged, hostile, unknown keys, or not fitting the model.
    """
    layout = None if model is None else layout_of(model)
    if source == "torchtune":
        folder = Path(path)
        return read_torchtune(folder.parent if folder.is_file() else folder, layout, None if model is None else heads_of(model))
    return (read_kohya if source == "kohya" else read_diffusers)(only_file(path), layout, part)


def origin(form: str, dtypes: tuple[str, ...]) -> dict[str, str]:
    """What a record remembers of a file from elsewhere: it trains on in float32, whatever it was stored in.

    >>> origin("kohya", ("float16",))
    {'read_from': 'kohya', 'stored_dtype': 'float16'}
    """
    return {"read_from": form, "stored_dtype": ", ".join(dtypes)}


def fitted(found: Foreign, model: nn.Module, source: str) -> Adapter | NativeAdapter:
    """What can be attached: an adapter in normal form where every change is a LoRA, else a record of the method whose tensors
    they are. Changes of several kinds, and Kronecker factors that no one setting of the method has, are multiplied out to LoRAs,
    exactly, with a warning of their rank. Differences of whole weights are the method `full` if there is nothing else, and extra
    tensors beside other changes.

    Raises:
        FileError: no change of a weight.
    """
    sites = {s.name: s for s in every_site(model) if s.rows is None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = {} if found.changes else {n: d for n, d in found.differences.items() if _is_weight(n, sites)}
    extras = {n: _sum(parameters[n], d) for n, d in found.differences.items() if n not in whole}
    about = {"extras": extras, "trained": origin(found.format, found.dtypes)}
    if not found.changes:
        if not whole:
            raise FileError(f"{source}: changes no weight of a linear layer, convolution or embedding")
        return _whole(whole, sites, model, about)
    if found.methods != ("lora",):
        record = _factored(list(found.changes.values()), sites, about) if len(found.methods) == 1 else None
        if record is not None:
            return record
        products = {n: c.product() for n, c in found.changes.items()}
        warnings.warn(
            f"{source}: its changes ({', '.join(found.methods)}) are no one method here; read as LoRA, exactly, of rank up to "
            f"{max(c.rank or 0 for c in products.values())}",
            stacklevel=3,
        )
        found = replace(found, changes=products)
    adapter = found.adapter(extras)
    return Adapter(adapter.entries, adapter.extras, {**adapter.metadata, "dtypes": found.dtypes})


def _is_weight(name: str, sites: Mapping[str, Site]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and owner in sites


def _sum(base: Tensor, difference: Tensor) -> Tensor:
    dtype = torch.promote_types(base.dtype, torch.float32)
    return base.detach().cpu().to(dtype) + difference.to(dtype)


def _record(site: Site, rank: int | None = None, alpha: float | None = None) -> SiteRecord:
    return SiteRecord(site.name, site.kind, site.shape, site.rows, rank, site.batch, site.group, site.tied, alpha)


def _whole(
    differences: Mapping[str, Tensor], sites: Mapping[str, Site], model: nn.Module, about: dict[str, Any]
) -> NativeAdapter:
    modules = dict(model.named_modules())
    records, tensors = [], {}
    for name, difference in differences.items():
        site = sites[name.rpartition(".")[0]]
        W = base_of(modules[site.module], site).gather().dense()
        records.append(_record(site))
        tensors[site.key] = {"value": _sum(W, kind_named(site.kind).view(difference, site))}
    return NativeAdapter("full", {}, tuple(records), tensors, **about)


def _factored(changes: list[Change], sites: Mapping[str, Site], about: dict[str, Any]) -> NativeAdapter | None:
    """A record of the method whose tensors these are; None where no one setting of it has their shapes."""
    kind = changes[0].method
    rescaled = any(c.magnitude is not None for c in changes)
    name = f"magnitude+{kind}" if rescaled else kind
    ranks = {c.name: c.rank or 1 for c in changes} if kind != "kron" else {c.name: _kron_rank(c) for c in changes}
    settings: list[dict[str, Any]] = [{}]
    if kind == "kron":
        sizes = sorted({n for c in changes for n in _outer(c)})
        settings = [{"factor": f, "both": b} for b in (False, True) for f in (None, *sizes)]
    common = Counter(ranks.values()).most_common(1)[0][0]
    for setting in settings:
        chosen = method(name, rank=common, **setting)
        records, tensors = [], {}
        for c in changes:
            site, rank = sites[c.name], ranks[c.name]
            own = _placed(chosen, site, rank, c.scale * rank, c)
            if own is None:
                break
            records.append(_record(site, rank, c.scale * rank))
            tensors[site.key] = own
        if len(records) == len(changes):
            return NativeAdapter(chosen.text, chosen.options, tuple(records), tensors, **about)
    return None


def _placed(chosen: Method, site: Site, rank: int, alpha: float, change: Change) -> dict[str, Tensor] | None:
    """The change's tensors as the structure calls them; None where it has other shapes."""
    specs = specs_of(chosen.structure.at_rank(rank, alpha), site)
    own: dict[str, Tensor] = {}
    for name, spec in specs.items():
        tensor = change.magnitude if spec.role == "magnitude" else change.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != tuple(spec.shape):
            return None
        own[name] = tensor
    return own if len(own) == len(change.tensors) + (change.magnitude is not None) else None


def _outer(change: Change) -> tuple[int, int]:
    t = change.tensors
    return (t["P"].shape[0], t["P"].shape[1]) if "P" in t else (t["P1"].shape[0], t["P2"].shape[1])


def _kron_rank(change: Change) -> int:
    """The rank of the factors; where none is factored, one from which on none would be."""
    if change.rank is not None:
        return change.rank
    return max(1, ceil(max(*change.tensors["P"].shape, *change.tensors["Q"].shape) / 2))
