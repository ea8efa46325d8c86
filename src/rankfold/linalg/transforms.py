"""Fixed orthogonal bases: the discrete cosine and the Walsh-Hadamard transform."""

import math

import torch
from torch import Tensor

from rankfold.errors import OptionError

__all__ = ["dct_matrix", "hadamard_transform"]


def dct_matrix(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """C [n, n] with C Cᵀ = I: C[j, k] = √(2/n)·cos(π j (2k+1) / 2n), row 0 times √½ (the orthonormal DCT-II).

    C x are the cosine coefficients of x; the columns of Cᵀ are the basis.

    >>> C = dct_matrix(4)
    >>> C[0], torch.allclose(C @ C.T, torch.eye(4), atol=1e-6)
    (tensor([0.5000, 0.5000, 0.5000, 0.5000]), True)
    """
    j = torch.arange(n, dtype=torch.int64)
    turns = j.unsqueeze(1) * (2 * j + 1) % (4 * n)  # whole multiples of 2π taken out in integers: exact for any n
    C = torch.cos(turns.to(torch.float64) * (math.pi / (2 * max(n, 1)))) * math.sqrt(2 / max(n, 1))
    C[:1] *= math.sqrt(0.5)
    return C.to(dtype)


def hadamard_transform(X: Tensor) -> Tensor:
    """X H over the last axis [..., n], n a power of two, H the symmetric ±1 matrix with H H = n·I; n log n sums.

    >>> hadamard_transform(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor([2., 0., 0., 2.])
    """
    n = X.shape[-1]
    if n < 1 or n & (n - 1):
        raise OptionError(f"hadamard_transform: last axis has {n} entries; pad it to a power of two")
    half = 1
    while half < n:
        pairs = X.reshape(*X.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        X = torch.stack([a + b, a - b], dim=-2).reshape(*X.shape)
        half *= 2
    return X
