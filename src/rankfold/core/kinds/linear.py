"""nn.Linear, stored [out, in], and transformers' Conv1D, which stores the transpose."""

from __future__ import annotations

from torch import Tensor, nn

from ..bases import is_packed, packed_class
from ..site import Site
from .kind import Kind

__all__ = ["Linear", "Transposed"]


class Linear(Kind):
    name = "linear"

    def makes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        if is_packed(module):  # its tensor has a shape of its own
            return [Site(path, (int(module.out_features), int(module.in_features)), self.name)]  # type: ignore[arg-type]
        return super().sites(path, module)

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        return W.to(stored.dtype)

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        return own_forward(module, packed_class(module) or nn.Linear)


class Transposed(Kind):
    name = "conv1d"

    def makes(self, module: nn.Module) -> bool:
        # recognised without importing transformers
        return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)

    def _shape(self, weight: Tensor) -> tuple[int, int]:
        return int(weight.shape[1]), int(weight.shape[0])

    def view(self, stored: Tensor, site: Site) -> Tensor:
        return stored.mT

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        return W.mT.to(stored.dtype).contiguous()


def own_forward(module: nn.Module, library: type[nn.Module]) -> str | None:
    """The refusal of a subclass that computes something else than the library's class."""
    kind = getattr(type(module), "_native", type(module))
    return None if kind.forward is library.forward else f"its class {kind.__name__} has a forward of its own"
