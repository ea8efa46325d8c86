"""How near is near: one table for all laws, relative Frobenius distances by the dtype of the base.

The sites are tiny (no dimension above 12), so that rounding hardly accumulates: a figure here is a few tens of units in the last
place.
"""

from dataclasses import dataclass

import torch

__all__ = ["TOLERANCES", "Tolerance", "distance"]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative distances that a law allows.

    Args:
        start: of the output at the start of a method that declares "base", where it is not bitwise.
        value: of a forward pass, against the float64 definition.
        grad: of a gradient, against the float64 definition.
    """

    start: float
    value: float
    grad: float


TOLERANCES = {
    torch.float64: Tolerance(start=1e-13, value=1e-11, grad=1e-10),
    torch.float32: Tolerance(start=2e-6, value=1e-5, grad=1e-4),
    # two layers of bf16 activations, each rounded to 2**-9 of itself
    torch.bfloat16: Tolerance(start=8e-3, value=2e-2, grad=5e-2),
}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; the plain norm where `expected` is zero; NaN and Inf are infinitely far."""
    gap, size = ((found.double() - expected.double()).norm().item(), expected.double().norm().item())
    value = gap / size if size > 0 else gap
    return value if value == value else float("inf")
