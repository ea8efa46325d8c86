"""The small conventions of factors: which sign, how to split, how many ranks pay."""

from typing import Literal

import torch
from torch import Tensor

from rankfold.errors import OptionError

__all__ = ["break_even", "rank_for_ratio", "sign_fix", "split"]


def sign_fix(U: Tensor, Vh: Tensor, side: Literal["U", "V"] = "U") -> tuple[Tensor, Tensor]:
    """Flip pairs (u_i, v_i) so that the entry of largest size in each u_i (or v_i) is positive; the product is unchanged.

    A singular vector is defined up to its sign; without a rule, files and streams change from one machine to the next.

    Args:
        U: [..., m, r], components in columns.
        Vh: [..., r, n], components in rows.
        side: "U" looks at columns of U, "V" at rows of Vh (the rule of EVA).

    >>> sign_fix(torch.tensor([[0.6], [-0.8]]), torch.tensor([[1.0, 0.0]]))
    (tensor([[-0.6000], [ 0.8000]]), tensor([[-1., -0.]]))
    """
    components = side_rows(U, Vh, side)  # [..., r, length]
    if components.shape[-1] == 0 or components.shape[-2] == 0:
        return U, Vh
    largest = components.gather(-1, components.abs().argmax(dim=-1, keepdim=True))  # [..., r, 1]
    sign = torch.where(largest < 0, -1.0, 1.0).to(components)
    return U * sign.mT, Vh * sign


def side_rows(U: Tensor, Vh: Tensor, side: str) -> Tensor:
    if side == "U":
        return U.mT
    if side == "V":
        return Vh
    raise OptionError(f'sign_fix: side {side!r}; use "U" or "V"')


def split(U: Tensor, S: Tensor, Vh: Tensor, balance: Literal["UV", "U", "V"] = "UV") -> tuple[Tensor, Tensor]:
    """B [..., m, r] and A [..., r, n] with B A = U diag(S) Vh.

    Args:
        balance: where S goes. "UV": B = U√S, A = √S Vh (columns of B as long as rows of A); "U": B = U S, A = Vh;
            "V": B = U, A = S Vh.

    >>> B, A = split(torch.eye(2), torch.tensor([4.0, 1.0]), torch.eye(2))
    >>> B.diagonal(), A.diagonal()
    (tensor([2., 1.]), tensor([2., 1.]))
    """
    if balance == "UV":
        root = S.sqrt()
        return U * root.unsqueeze(-2), root.unsqueeze(-1) * Vh
    if balance == "U":
        return U * S.unsqueeze(-2), Vh
    if balance == "V":
        return U, S.unsqueeze(-1) * Vh
    raise OptionError(f'split: balance {balance!r}; use "UV", "U" or "V"')


def break_even(out: int, in_: int) -> float:
    """The rank at which two factors hold as many numbers as the matrix: out·in / (out + in).

    >>> break_even(512, 512), break_even(512, 2048)
    (256.0, 409.6)
    """
    return out * in_ / (out + in_)


def rank_for_ratio(ratio: float, out: int, in_: int, align: int = 1) -> int | None:
    """The rank whose factors hold `ratio` of the matrix's numbers: ⌊ratio·out·in/(out + in)⌋, at least 1.

    None means: keep the matrix, since two factors of that rank would hold as much or more.

    Args:
        ratio: kept fraction of the parameters, in (0, ∞).
        align: round up to a multiple of it, for kernels that like multiples of 8, 64 or 128.

    >>> rank_for_ratio(0.5, 512, 2048), rank_for_ratio(0.5, 512, 2048, align=64), rank_for_ratio(1.0, 512, 512)
    (204, 256, None)
    """
    if not ratio > 0 or align < 1:
        raise OptionError(f"rank_for_ratio: ratio {ratio} must be positive and align {align} at least 1")
    rank = max(1, int(ratio * break_even(out, in_)))
    rank = -(-rank // align) * align
    return None if rank >= break_even(out, in_) else rank
