"""SALT: the leading singular values scaled and shifted, the rest of the spectrum changed by a product of low rank.

"SALT: Singular Value Adaptation with Low-Rank Transformation", 2025, arXiv:2503.16055 (row 82 of our list of papers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, kaiming, register
from rankfold.linalg import LowRank, Operator


def small_normal(ctx: StartContext) -> Tensor:
    return ctx.random.normal(ctx.shape, std=0.01)


@register("structure", "salt", paper="salt2025")
@dataclass(frozen=True, kw_only=True)
class SALT(Structure):
    """W' = U ρ(S') Vᵀ from W = U diag(S) Vᵀ: S' has a∘S + b on the first `rank` places, diag(S) + X Y on the others.

    With ρ the identity the change is U_p diag((a − 1)∘S + b) V_pᵀ + U_t X Y V_tᵀ, of rank `rank` + `tail`, and exports as such a
    LoRA. Starts at W: a is one, b and Y are zero.

    Args:
        rank: p, how many singular values are scaled and shifted; min(out, in) leaves no tail.
        tail: q, inner width of X: [min(out, in) − p, q] and Y.
        relu: ρ. "off"; "full" is the published code, max(·, 0) of the whole matrix, the off-diagonal entries of X Y included;
            "diagonal" cuts off the singular values alone. Either makes a change of any rank.
        start: "zero", as the code for SAM2; "sam" draws X and Y of size 0.01, off the base.
        penalty: weight λ of the loss term λ·Σ_sites (‖diagonal's change‖ + ‖X Y‖); the published settings have 0.

    Cost per site: 2·p + 2·q·(min(out, in) − p) parameters; U, S and V are stored, min(out, in)·(out + in + 1) numbers.

    >>> site = Site("query", (12, 8))
    >>> {name: spec.shape for name, spec in SALT(rank=3, tail=2).tensors(site).items() if spec.trainable}
    {'a': (3,), 'b': (3,), 'X': (5, 2), 'Y': (2, 5)}
    """

    init: ClassVar[str] = "spectrum"

    rank: Annotated[int, Ge(1)] = 16
    tail: Annotated[int, Ge(1)] = 4
    relu: Literal["off", "diagonal", "full"] = "off"
    start: Literal["zero", "sam"] = "zero"
    penalty: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "sam":
            object.__setattr__(self, "starts", "elsewhere")

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), k, p = site.shape, min(site.shape), self.rank
        bases = {
            "U": Spec((out, k), "B", False, start=kaiming),
            "S": Spec((k,), "core", False, start=1.0),
            "V": Spec((k, in_), "A", False),
        }
        top = {"a": Spec((p,), start=1.0), "b": Spec((p,), start=0.0)}
        x, y = (kaiming, 0.0) if self.start == "zero" else (small_normal, small_normal)
        rest = {"X": Spec((k - p, self.tail), start=x), "Y": Spec((self.tail, k - p), start=y)} if p < k else {}
        return {**bases, **top, **rest}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        p, moved = self.rank, (t.a - 1) * t.S[..., : self.rank] + t.b
        if self.relu != "off":
            return LowRank(t.U, t.V, core=self._cut(t, moved))
        B, A = t.U[..., :p] * moved.unsqueeze(-2), t.V[..., :p, :]
        if hasattr(t, "X"):
            B, A = torch.cat([B, t.U[..., p:] @ t.X], -1), torch.cat([A, t.Y @ t.V[..., p:, :]], -2)
        return LowRank(B, A)

    def _cut(self, t: Tensors, moved: Tensor) -> Tensor:
        """ρ(S') − diag(S), [k, k]."""
        k, p, S = t.S.shape[-1], self.rank, torch.diag_embed(t.S)
        change = torch.nn.functional.pad(torch.diag_embed(moved), (0, k - p, 0, k - p))
        if hasattr(t, "X"):
            change = change + torch.nn.functional.pad(t.X @ t.Y, (p, 0, p, 0))
        free = torch.zeros_like(S, dtype=torch.bool) if self.relu == "full" else ~torch.eye(k, dtype=torch.bool, device=S.device)
        return torch.where(free, change, torch.maximum(change, -S))  # max(S + c, 0) − S

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        at = [t[site.key] for site in sites]
        parts = [(s.a - 1) * s.S[..., : self.rank] + s.b for s in at] + [s.X @ s.Y for s in at if hasattr(s, "X")]
        norms = [(part.square().sum() + 1e-12).sqrt() for part in parts]  # a plain norm has no gradient at zero
        return {"salt": self.penalty * torch.stack(norms).sum()}
