"""One weight that may be changed.

A `Site` speaks of the map R^in -> R^out, whatever the storage: methods see `(out, in)` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["SITE_KINDS", "Site"]

SITE_KINDS = ("linear", "conv1d", "embedding", "convolution", "grouped", "experts", "multihead", "rows", "tied")
"""How a weight may stand in a model: what the laws are tried on. `grouped` (a convolution with groups), `rows` and `tied` are no
`Site.kind`: batch, rows and tied say so."""
WITHIN = frozenset({"experts", "experts-transposed", "multihead"})
"""Kinds whose module holds several weights: the name of a site ends with the parameter's."""
CHILD = {("multihead", "out_proj"): "out_proj.weight"}
"""Weights of a child that the module reads without calling it."""


@dataclass(frozen=True)
class Site:
    """One weight of the model as a map: its module's path, shape (out, in), and how it stands among the others.

    Args:
        name: path of the module, "encoder.layer.0.attention.self.query"; of the parameter where one module holds several weights,
            "layers.0.mlp.experts.down_proj".
        shape: (out, in) of the map.
        kind: of core/kinds/ (linear, conv1d: transposed linear, embedding, ...), or block (where a side module stands).
        rows: half-open range of output rows, for a fused weight (q, k, v in one).
        batch: number of stacked maps (experts); tensors get it as leading dimension, methods never see it.
        group: name shared by sites that read the same input; None means not known.
        tied: canonical name of the storage, where several modules share it.

    >>> Site("h.0.attn.c_attn", (768, 768), kind="conv1d", rows=(0, 768)).key
    'h.0.attn.c_attn[0:768]'
    """

    name: str
    shape: tuple[int, int]
    kind: str = "linear"
    rows: tuple[int, int] | None = None
    batch: int | None = None
    group: str | None = None
    tied: str | None = None

    @cached_property
    def key(self) -> str:
        """The name that files and messages use: the path, with the row range where there is one."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def module(self) -> str:
        """Path of the module that holds the weight and whose forward is changed."""
        return self.name.rpartition(".")[0] if self.kind in WITHIN else self.name

    @property
    def param(self) -> str:
        """Name of the weight within that module; with the child's where a child holds it."""
        if self.kind not in WITHIN:
            return "weight"
        last = self.name.rpartition(".")[2]
        return CHILD.get((self.kind, last), last)

    @property
    def weight(self) -> str:
        """Full name of the stored weight."""
        return f"{self.module}.{self.param}" if self.module else self.param
