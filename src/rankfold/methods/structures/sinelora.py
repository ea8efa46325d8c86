"""SineLoRA and LoRAN: a sine of the product of two factors, entry by entry, whose rank is not bounded by theirs.

Ji et al., "Efficient Learning With Sine-Activated Low-rank Matrices", 2024, arXiv:2403.19243; Deng et al., "Enhancing Low-Rank
Adaptation with Structured Nonlinear Transformations", 2025, arXiv:2509.21870.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from rankfold.core import Context, Site, Spec, Structure, Tensors, kaiming, register
from rankfold.linalg import Elementwise, LowRank, Operator


@register("structure", "sinelora", paper="ji2024sinelora")
@dataclass(frozen=True, kw_only=True)
class SineLoRA(Structure):
    """ΔW = g·sin(ω B A), or B A + g·sin(ω B A) ∘ B A, entry by entry, with B: [out, rank] and A: [rank, in].

    Starts at W (B zero). A large ω gives a change of high rank from small factors, and steps that are ω times as large. The sine
    is of the weight's change, so that it folds; some reimplementations take it of the adapter's output, which is another method.

    Args:
        rank: inner width.
        form: "sine", or "loran": a product bent a little, that keeps its slope near zero.
        frequency: ω, a whole number as in both papers; the larger, the worse bf16 gradients are conditioned.
        gain: g; None is 1/√out ("sine"), the value for which ΔW is as large as a row of W, or 5e-5 ("loran").

    Cost per site: rank·(out + in) parameters; W' is built per step.

    >>> from collections import namedtuple
    >>> t = namedtuple("Tensors", "B A")(torch.randn(9, 1), torch.randn(1, 9))
    >>> int(torch.linalg.matrix_rank(SineLoRA(rank=1, frequency=50).delta(t, Site("query", (9, 9))).dense())) > 5
    True
    """

    rank: Annotated[int, Ge(1)] = 16
    form: Literal["sine", "loran"] = "sine"
    frequency: Annotated[int, Ge(1)] = 200
    gain: Annotated[float, Ge(0)] | None = None

    def tensors(self, site: Site) -> dict[str, Spec]:
        out, in_ = site.shape
        return {"B": Spec((out, self.rank), start=0.0), "A": Spec((self.rank, in_), start=kaiming)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        gain = self.gain if self.gain is not None else 5e-5 if self.form == "loran" else site.shape[0] ** -0.5
        return Elementwise(LowRank(t.B, t.A), bent if self.form == "loran" else sine, (self.frequency, gain))


def sine(x: Tensor, frequency: float, gain: float) -> Tensor:
    return gain * torch.sin(frequency * x)


def bent(x: Tensor, frequency: float, gain: float) -> Tensor:
    return x + gain * torch.sin(frequency * x) * x
