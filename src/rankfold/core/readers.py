"""Modules of torch's own that read parameters of modules inside them without calling those.

nn.MultiheadAttention reads its output projection: whatever changes that is put in its place for the call.
nn.TransformerEncoderLayer runs as one fused call where nobody trains, and nn.TransformerEncoder packs padded batches for it: both
go their ordinary way while an adapter is on. Off, or folded, they run as they always did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["children_read", "is_reader", "unfused"]

FUSED: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""What each looks at before it takes the fused way, and the value that says no. Nothing else reads these attributes."""


def is_reader(module: nn.Module) -> bool:
    """Whether a change of something inside `module` needs `module`'s own forward to be ours."""
    return isinstance(module, (nn.MultiheadAttention, *(cls for cls, _, _ in FUSED)))


def children_read(module: nn.Module) -> list[nn.Module]:
    """The modules inside whose parameters `module` reads, and which it never calls."""
    return [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []


@contextmanager
def unfused(module: nn.Module) -> Iterator[None]:
    """The module without its fused way, for one call."""
    known = [(name, no) for cls, name, no in FUSED if isinstance(module, cls) and hasattr(module, name)]
    before = {name: getattr(module, name) for name, _ in known}
    try:
        for name, no in known:
            setattr(module, name, no)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
