"""The kinds of sites, one file each. The first kind that a module makes is its kind."""

from __future__ import annotations

from torch import nn

from .convolution import Convolution, TransposedConvolution
from .embedding import Embedding
from .experts import Experts, TransposedExperts
from .kind import Kind, by_weight, held, weight_of
from .linear import Linear, Transposed
from .multihead import Multihead

__all__ = ["ALL", "Kind", "by_weight", "held", "kind_named", "kind_of", "weight_of"]

ALL: tuple[Kind, ...] = (
    Linear(),
    Transposed(),
    Embedding(),
    Convolution(),
    TransposedConvolution(),
    Experts(),
    TransposedExperts(),
    Multihead(),
)
_BY_NAME = {kind.name: kind for kind in ALL}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module's weight, or None."""
    return next((kind for kind in ALL if kind.makes(module)), None)


def kind_named(name: str) -> Kind:
    """The kind of that `Site.kind`."""
    return _BY_NAME[name]
