"""What structures of an inner width share: the scale that rank, alpha and power make, and the pair B and A."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .site import Site
from .structure import Spec, Structure

__all__ = ["ScaledStructure", "pair"]


@dataclass(frozen=True, kw_only=True)
class ScaledStructure(Structure):
    """A structure with an inner width and a scale s = alpha / rank**power, or 1 where alpha is None.

    The three are declared in each file of a method, with their bounds and defaults: what a catalogue lists stands in its source.
    power 1 is that of LoRA (Hu et al. 2021), 1/2 that of rsLoRA (Kalajdzievski 2023), whose step keeps its size as rank grows.

    >>> from rankfold.methods.structures.lora import LoRA
    >>> lora = LoRA(rank=4, alpha=8)
    >>> lora.scale, lora.at_rank(2).alpha, LoRA(rank=4, alpha=8, power=0.5).scale
    (2.0, 4.0, 4.0)
    """

    rank: int
    alpha: float | None
    power: float

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank**self.power

    def at_rank(self, rank: int, alpha: float | None = None) -> Structure:
        """The same structure at another rank with its scale kept: alpha follows as rank**power, unless it is given."""
        if alpha is None and rank == self.rank:
            return self
        if alpha is None and self.alpha is not None:
            alpha = self.scale * rank**self.power
        return dataclasses.replace(self, rank=rank, alpha=alpha)


def pair(site: Site, rank: int) -> dict[str, Spec]:
    """B: [out, rank] and A: [rank, in] by the roles that inits and updates know.

    >>> {name: (spec.role, spec.shape) for name, spec in pair(Site("query", (12, 8)), 2).items()}
    {'B': ('B', (12, 2)), 'A': ('A', (2, 8))}
    """
    out, in_ = site.shape
    return {"B": Spec((out, rank), role="B"), "A": Spec((rank, in_), role="A")}
