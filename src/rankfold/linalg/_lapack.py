"""LAPACK, asked again when it fails: first in float64, then by another algorithm. Never NaN."""

import torch
from torch import Tensor

from rankfold.errors import NumericError
from rankfold.linalg._matrix import wide

FAILURE = torch.linalg.LinAlgError


def thin_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., m, k], S [..., k] descending, Vh [..., k, n] with k = min(m, n)."""
    *batch, m, n = M.shape
    if min(m, n) == 0:
        return M.new_zeros(*batch, m, 0), M.new_zeros(*batch, 0), M.new_zeros(*batch, 0, n)
    for attempt in (M, wide(M)):
        try:
            U, S, Vh = torch.linalg.svd(attempt, full_matrices=False)
        except FAILURE:
            continue
        if torch.isfinite(S).all():
            return U.to(M.dtype), S.to(M.dtype), Vh.to(M.dtype)
    U, S, Vh = gram_svd(wide(M))
    return U.to(M.dtype), S.to(M.dtype), Vh.to(M.dtype)


def gram_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD by eigenvectors of the smaller Gram matrix: always converges, but loses half the digits of small values.

    The other side comes from a QR factorisation of MᵀU ≈ V·diag(S), which is orthonormal even where S is zero.
    """
    m, n = M.shape[-2:]
    if m > n:
        U, S, Vh = gram_svd(M.mT)
        return Vh.mT, S, U.mT
    _, U = eigh(M @ M.mT)
    U = U.flip(-1)  # descending
    V, R = torch.linalg.qr(M.mT @ U)
    d = R.diagonal(dim1=-2, dim2=-1)
    order = d.abs().argsort(dim=-1, descending=True)
    S = d.abs().gather(-1, order)
    V = V * torch.where(d < 0, -1.0, 1.0).to(V).unsqueeze(-2)
    return take_columns(U, order), S, take_columns(V, order).mT


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending and eigenvectors of symmetric H [..., n, n]; a failure is retried with a tiny shift of scale."""
    if H.shape[-1] == 0:
        return H.new_zeros(H.shape[:-1]), H
    scale = H.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
    for attempt in (H, H / scale):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except FAILURE:
            continue
        if torch.isfinite(values).all():
            return (values if attempt is H else values * scale.squeeze(-1)), vectors
    raise NumericError(f"eigenvalues of a {H.shape[-1]} x {H.shape[-1]} matrix: LAPACK did not converge, not even after scaling")


def orthonormal(M: Tensor) -> Tensor:
    """[..., m, k] with orthonormal columns that span those of M [..., m, k], m >= k."""
    return torch.linalg.qr(M).Q


def take_columns(M: Tensor, index: Tensor) -> Tensor:
    return M.gather(-1, index.unsqueeze(-2).expand_as(M))
