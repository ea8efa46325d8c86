"""Weights that are stored packed, one file per library. A library is imported only where a module of the model is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.linalg import like

from ..site import Site

if TYPE_CHECKING:
    from ..base import Base

__all__ = ["forward_of", "is_packed", "packed_base", "packed_class", "refusal"]

BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def packed_class(module: nn.Module) -> Any:
    """The class of bitsandbytes that a module is, whose own forward its base stands in for; None for other modules."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes.") and cls.__name__ in BITSANDBYTES:
            return cls
    return None


def _by_torchao(weight: Any) -> bool:
    return any(cls.__module__.startswith("torchao.") for cls in type(weight).__mro__)


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weight is stored in a format of bitsandbytes or torchao.

    >>> is_packed(nn.Linear(2, 2))
    False
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and type(weight) is nn.Parameter:
        return False
    return _by_torchao(weight) or (packed_class(module) is not None and type(weight).__module__.startswith("bitsandbytes."))


def packed_base(module: nn.Module, site: Site) -> Base | None:
    """The base that knows the format of the module's weight; None where that is a plain tensor."""
    if not is_packed(module):
        return None
    if packed_class(module) is not None:
        from .bitsandbytes import base
    else:
        from .torchao import base
    return base(module, site)


def refusal(module: nn.Module, site: Site) -> str | None:
    """Why a packed weight can't be changed here, or None."""
    if not is_packed(module):
        return None
    weight: Any = module.weight
    if site.kind != "linear":
        return f"its weight is stored as {type(weight).__name__}, which is read in linear layers only, not as {site.kind}"
    cls = packed_class(module)
    if cls is not None and cls.__name__ == "Linear4bit":
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            return "its weight is not quantised yet: bitsandbytes does that in model.to(DEVICE)"
        if weight.device.type == "cpu" and site.shape[1] % state.blocksize:  # seen in 0.50.2: with scales of other blocks
            return f"on a CPU bitsandbytes misreads rows of {site.shape[1]} in blocks of {state.blocksize}; leave it dense"
    if cls is not None and cls.__name__ == "Linear8bitLt" and str(weight.dtype) != "torch.int8":
        return "its weight is no int8 (has_fp16_weights=True, or model.to(DEVICE) is still to come)"
    return None


def forward_of(module: nn.Module, native: Any) -> Any:
    """`native`, or a plain product where folding has put a dense weight into a module whose own forward wants a packed one."""
    return _dense_forward if packed_class(module) is not None and not is_packed(module) else native


def _dense_forward(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, like(module.weight, x), None if module.bias is None else like(module.bias, x))
