"""Quantising the linear layers of a model in place, by torchao or bitsandbytes, and remembering which weights they were."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.fingerprint import fingerprint
from rankfold.errors import LayoutError, MissingExtra, OptionError, TargetError

from ..base import base_of
from ..site import Site
from ..store import store_of
from ..targets import Targets, find_sites
from . import is_packed

__all__ = ["FORMATS", "SOURCE", "quantise"]

FORMATS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes", "bnb-int8": "bitsandbytes"}
"""The library of each format."""

SOURCE = "_rankfold_source"
"""Attribute of a quantised module: (hash of the weight that it was made from, hash of what it holds)."""

GROUPS = {"int4": 32, "nf4": 64}
"""Entries of a row that share one scale."""


@torch.no_grad()
def quantise(
    model: nn.Module, format: str, *, targets: str | Sequence[str] | Targets = "all-linear", exclude: str | Sequence[str] = ()
) -> dict[str, float]:
    """Store the linear layers of a model in few bits, in place; gives ‖W − Q(W)‖ / ‖W‖ by layer. Adapters come afterwards.

    Each layer remembers the fingerprint of the weight that it was made from, so that an adapter moves freely between the dense
    model and its quantised copies. Weights that several modules share, and layers of other kinds, stay as they are.

    Args:
        format: "int8" (a scale for each row) and "int4" (for 32 entries of a row) by torchao; "nf4" (QLoRA, Dettmers et al. 2023:
            normal quantiles in blocks of 64, their scales in 8 bits) and "bnb-int8" (LLM.int8()) by bitsandbytes. On a CPU
            torchao keeps each number of int4 in a byte; NF4 takes half a byte everywhere.
        targets, exclude: as in `rf.adapt`; "all-linear" leaves out output heads, routers and embeddings.

    Raises:
        OptionError: no such format. MissingExtra: its library is not installed.
        TargetError: nothing to quantise, or rows that don't divide into groups.
        LayoutError: the model has adapters already, or the library can't make the format of this dtype on this device.

    >>> import rankfold as rf
    >>> model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    >>> rf.quantise(model, "int2")
    Traceback (most recent call last):
    ...
    rankfold.errors.OptionError: quantise: no format 'int2'; there are int8, int4, nf4, bnb-int8
    """
    if format not in FORMATS:
        raise OptionError(f"quantise: no format {format!r}; there are {', '.join(FORMATS)}")
    library = FORMATS[format]
    if importlib.util.find_spec(library) is None:
        raise MissingExtra.of(f"format {format}", library, "quant")
    if store_of(model) is not None:
        raise LayoutError("quantise: the model has adapters already. Quantise it first, then rf.adapt or rf.load")
    modules = dict(model.named_modules())
    sites = [s for s in find_sites(model, targets, exclude) if s.kind == "linear" and s.tied is None and s.rows is None]
    sites = [s for s in sites if type(modules[s.module]) is nn.Linear and not is_packed(modules[s.module])]
    if not sites or (sites[0].module == "" and library == "bitsandbytes"):
        raise TargetError(f"quantise: {type(model).__name__} has no linear layer with a weight of its own among {targets!r}")
    group = GROUPS.get(format, 1)
    uneven = [s for s in sites if s.shape[1] % group]
    if uneven:
        raise TargetError(
            f"quantise: {format} has one scale for {group} entries of a row, and rows of {uneven[0].name} have "
            f"{uneven[0].shape[1]}. Leave it out: exclude={[s.name for s in uneven[:3]]}, or choose int8"
        )
    return {site.name: _quantise_one(model, site, format) for site in sites}


def _quantise_one(model: nn.Module, site: Site, format: str) -> float:
    module = model.get_submodule(site.module)
    W: Any = module.weight
    if W.dtype == torch.float64:
        raise LayoutError(f"quantise: {site.name} is float64, which no format starts from; model.float() first")
    before = fingerprint({"weight": W.detach()}).tensors["weight"].hash
    try:
        made = _MAKERS[format](module, W.detach())
    except (RuntimeError, AssertionError, ValueError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LayoutError(
            f"quantise: {FORMATS[format]} can't make {format} of {W.dtype} on {W.device}: {reason}. "
            f"Try another of {', '.join(FORMATS)}, or another device"
        ) from error
    if made is not module:
        owner, _, leaf = site.module.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made)
    held = base_of(made, site).dense()
    made.__dict__[SOURCE] = (before, fingerprint({"weight": held}).tensors["weight"].hash)
    return float((W.detach().float() - held).norm() / W.detach().float().norm().clamp_min(1e-30))


def _torchao(module: nn.Module, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(module, config)
    return module


def _int8(module: nn.Module, W: Tensor) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(module, Int8WeightOnlyConfig())


def _int4(module: nn.Module, W: Tensor) -> nn.Module:
    if W.device.type == "cuda":  # packed for its tensor cores
        from torchao.quantization import Int4WeightOnlyConfig

        return _torchao(module, Int4WeightOnlyConfig(group_size=GROUPS["int4"], int4_packing_format="tile_packed_to_4d"))
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    dtypes: Any = torch  # whose stubs know no dtype of four bits
    return _torchao(module, IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=PerGroup(GROUPS["int4"])))


def _like(module: nn.Module, cls: Any, weight: Any, **options: Any) -> nn.Module:
    """A layer of bitsandbytes with the module's bias and mode, its weight quantised where the module's lies."""
    old: Any = module
    made = cls(old.in_features, old.out_features, old.bias is not None, device="meta", **options)
    made.weight = weight.to(old.weight.device)
    made.bias = old.bias
    return made.train(old.training)


def _nf4(module: nn.Module, W: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made: Any = _like(module, Linear4bit, Params4bit(W.clone(), requires_grad=False, quant_type="nf4"), quant_type="nf4")
    made.weight.module, made.quant_state = made, made.weight.quant_state
    made.support_avx512bf16_for_cpu = False  # evaluation would repack the weight for good, its scales rounded to bf16
    return made


def _bnb_int8(module: nn.Module, W: Tensor) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight = Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    return _like(module, Linear8bitLt, weight, has_fp16_weights=False)


_MAKERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "int8": _int8,
    "int4": _int4,
    "nf4": _nf4,
    "bnb-int8": _bnb_int8,
}
