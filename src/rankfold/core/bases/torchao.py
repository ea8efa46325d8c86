"""torchao: weights of nn.Linear that are tensors of its own classes (`Int8Tensor`, `IntxUnpackedToInt8Tensor`, the int4 layouts).

A layout that can't be dequantised (those made for one kernel) is read by its product with the columns of the identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.linalg import like

from ..base import Base
from ..site import Site
from ._quantised import BLOCK_BYTES, QuantisedBase, at_most_float32

__all__ = ["Torchao", "base"]


def base(module: nn.Module, site: Site) -> Base:
    return Torchao(module, site)


@dataclass(frozen=True, eq=False)
class Torchao(QuantisedBase):
    """Numbers of few bits with a scale (and a zero) for each row, or for each group of a row's entries."""

    @property
    def format(self) -> str:
        bits = getattr(self.stored, "target_dtype", None)  # of the formats with several widths
        found = re.search(r"int\d|float8|nf4", str(bits) if bits is not None else type(self.stored).__name__.lower())
        return found[0] if found else type(self.stored).__name__.lower()

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def _opaque(self) -> bool:
        own = [cls for cls in type(self.stored).__mro__ if cls.__module__.startswith("torchao.quant")]
        return not any("dequantize" in vars(cls) for cls in own)

    @property
    def step(self) -> int:
        return self.total_rows if self._opaque else int(self.stored.block_size[0])

    def storage(self) -> tuple[Tensor, ...]:
        W = self.stored
        names = (*W.tensor_data_names, *getattr(W, "optional_tensor_data_names", ()))
        return tuple(t for name in names if isinstance(t := getattr(W, name, None), Tensor))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        W = self.stored
        any_dtype = type(W).__name__ == "Int8Tensor"  # the others take activations of their own dtype alone
        z = x.to(at_most_float32(x.dtype) if any_dtype else W.dtype)
        return F.linear(z, W, None if bias is None else like(bias, z)).to(x.dtype)

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        W = self.stored.detach()
        if self._opaque:
            return self._by_columns().to(dtype)
        part = W if (start, stop) == (0, self.total_rows) else W[start:stop]
        if type(W).__name__ == "Int8Tensor":  # without rounding to the dtype of the weight, as its product does
            return part.dequantize(output_dtype=dtype)
        return part.dequantize().to(dtype)

    def _by_columns(self) -> Tensor:
        W, width = self.stored.detach(), self.shape[1]
        columns = max(1, BLOCK_BYTES // (4 * max(width, self.total_rows)))
        eye = torch.eye(width, dtype=W.dtype, device=W.device)
        return torch.cat([F.linear(part, W) for part in eye.split(columns)]).mT

    @torch.no_grad()
    def rounded(self, W: Tensor) -> Tensor:
        stored, name = self.stored, type(self.stored).__name__
        options: dict[str, Any] = {}
        if name == "Int8Tensor" and stored.block_size[0] == 1:
            from torchao.quantization.granularity import PerGroup, PerRow

            whole = stored.block_size[-1] == self.shape[1]
            options["granularity"] = PerRow() if whole else PerGroup(stored.block_size[-1])
        elif name == "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quant_primitives import MappingType

            shifted = bool(stored.zero_point.any())
            options = {
                "block_size": stored.block_size,
                "target_dtype": stored.target_dtype,
                "mapping_type": MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC,
            }
        else:
            raise LayoutError(f"{self.site.name}: rankfold can't write the format {name}; fold keeps a dense copy")
        return type(stored).from_hp(W.to(stored.dtype).contiguous(), **options).dequantize().float()
