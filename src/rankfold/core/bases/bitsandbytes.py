"""bitsandbytes: NF4 and FP4 (`Linear4bit`; Dettmers et al., "QLoRA", 2023), int8 (`Linear8bitLt`; "LLM.int8()", 2022).

On a CPU with AVX512-BF16 the library repacks a `Linear4bit` at its first evaluation, for good and with scales rounded to bf16,
and from then on passes no gradient through it. Here such a weight is read in either packing, and never repacked.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.linalg import like

from ..base import Base
from ..site import Site
from ._quantised import QuantisedBase, at_most_float32

__all__ = ["EightBit", "FourBit", "base"]


def base(module: nn.Module, site: Site) -> Base:
    return EightBit(module, site) if hasattr(module, "state") else FourBit(module, site)


def library() -> Any:
    """Imported by whoever made the module that is read here."""
    import bitsandbytes

    return bitsandbytes


@dataclass(frozen=True, eq=False)
class FourBit(QuantisedBase):
    """Two numbers a byte in blocks of the flattened weight, each with its largest magnitude (itself in 8 bits where nested)."""

    @property
    def _state(self) -> Any:
        return getattr(self.stored, "quant_state", None) or self.module.quant_state

    @property
    def format(self) -> str:
        return self._state.quant_type

    @property
    def dtype(self) -> torch.dtype:
        state = self._state
        return getattr(state, "original_dtype", state.dtype)

    @property
    def step(self) -> int:
        size = self._state.blocksize
        return size // gcd(size, self.shape[1])

    def storage(self) -> tuple[Tensor, ...]:
        state = self._state
        nested = (state.offset, state.state2.absmax) if state.nested else ()
        return (self.stored.data, state.absmax, *nested)

    def _plain(self) -> tuple[Tensor, Tensor]:
        """(two numbers a byte [out·in / 2], the blocks' magnitudes in float32), whichever packing the library has chosen."""
        state, packed = self._state, self.stored.data
        if getattr(state, "packing_format_for_cpu", False):
            view = copy.copy(state)  # the library's inverse writes into the state that it is given
            view.original_nested = False
            packed, _ = library().functional._convert_weight_packed_for_cpu_inverse(packed, view)
            return packed.view(torch.uint8).reshape(-1), state.absmax.mT.float().reshape(-1)
        absmax = state.absmax
        if state.nested:
            absmax = library().functional.dequantize_blockwise(absmax, state.state2) + state.offset
        return packed.view(torch.uint8).reshape(-1), absmax.float()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self.module
        dtype = at_most_float32(module.compute_dtype or x.dtype)
        z = x.to(dtype)
        y = library().matmul_4bit(z, self.stored, quant_state=self._state, bias=None if bias is None else like(bias, z))
        return y.to(x.dtype)

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        state, width = self._state, self.shape[1]
        packed, absmax = self._plain()
        size = state.blocksize
        here = library().functional.QuantState(
            absmax=absmax[start * width // size : -(-stop * width // size)],
            shape=torch.Size((stop - start, width)),
            code=state.code,
            blocksize=size,
            quant_type=state.quant_type,
            dtype=dtype,
        )
        return library().functional.dequantize_4bit(packed[start * width // 2 : -(-stop * width // 2)].view(-1, 1), here)

    @torch.no_grad()
    def rounded(self, W: Tensor) -> Tensor:
        state = self._state
        nested = state.nested or getattr(state, "original_nested", False)
        packed, again = library().functional.quantize_4bit(
            W.float().contiguous(), blocksize=state.blocksize, compress_statistics=nested, quant_type=state.quant_type
        )
        return library().functional.dequantize_4bit(packed, again).float()


@dataclass(frozen=True, eq=False)
class EightBit(QuantisedBase):
    """One byte a number, and the largest magnitude of each row. In training on a CPU the library multiplies by the dequantised
    weight; elsewhere it rounds the activations to 8 bits too, through which the gradient passes as if they were exact."""

    @property
    def format(self) -> str:
        return "int8"

    @property
    def _largest(self) -> Tensor:
        """[out]: the library keeps it at the weight until the module's own first forward, then in the module's state."""
        found = getattr(self.stored, "SCB", None)
        if found is None:
            state: Any = self.module.state
            found = state.SCB
        return found.to(self.stored.device)

    @property
    def dtype(self) -> torch.dtype:
        bias = self.module.bias
        return bias.dtype if isinstance(bias, Tensor) else torch.float32

    def storage(self) -> tuple[Tensor, ...]:
        return self.stored.data, self._largest

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        own: Any = self.module.state
        state = library().MatmulLtState()
        state.CB, state.SCB = self.stored.data, self._largest
        state.threshold, state.has_fp16_weights, state.is_training = own.threshold, False, self.module.training
        z = x.to(at_most_float32(x.dtype))
        return library().matmul(z, self.stored, bias=None if bias is None else like(bias, z), state=state).to(x.dtype)

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        scale = self._largest[start:stop, None] / 127.0
        return self.stored.data[start:stop].to(dtype).mul_(scale.to(dtype))

    @torch.no_grad()
    def rounded(self, W: Tensor) -> Tensor:
        packed, largest, _ = library().functional.int8_vectorwise_quant(W.half().contiguous())
        return packed.float() * (largest.float() / 127.0)[:, None]
