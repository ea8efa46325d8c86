"""nn.Embedding, stored [vocabulary, dim]: the map [dim, vocabulary], of which a forward pass picks columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..site import Site
from .kind import base_rows
from .linear import Transposed, own_forward

if TYPE_CHECKING:
    from ..host import Host
    from ..store import Slot

__all__ = ["Embedding"]


class Embedding(Transposed):
    name = "embedding"
    automatic = False
    tokens = True

    def makes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites the weight during the forward pass"
        return own_forward(module, nn.Embedding)

    def site(self, host: Host, module: nn.Module, slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor:
        return host.program(slots, module.training).expression().columns(x)

    def plain_rows(self, host: Host, module: nn.Module, like_site: Site, rows: tuple[int, int], x: Tensor) -> Tensor:
        return base_rows(module, like_site, rows).columns(x)
