"""Random numbers that depend on a key alone: the same under resume, sharding, recomputation and any order of calls.

A key such as (seed, purpose, name, step) is hashed to a Philox counter generator (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011). From its bits on, only +, -, x, / and square roots are used, which IEEE 754 rounds
alike everywhere; a library's logarithm or cosine would differ in the last place from one machine to the next.
"""

import hashlib
import json
from math import prod

import numpy as np
import torch
from torch import Tensor

from rankfold.errors import OptionError

__all__ = ["Random", "checksum"]

CHUNK = 1 << 16  # pairs of normals at a time: the float64 scratch stays in the cache
LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476
HALF_PI = 1.5707963267948966
COSINE = [1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200, 1 / 20922789888000]
SINE = [1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000, 1 / 355687428096000]
ATANH = [1 / (2 * k + 1) for k in range(12)]


class Random:
    """A stream of random numbers fixed by its key; two streams with different keys are independent.

    Successive draws from one object continue its stream. Whatever is stored or regenerated takes a fresh object per
    tensor, keyed by what the tensor is for. Everything is drawn on the CPU in float32 and then cast to `dtype`.

    Args:
        key: strings and integers, in order; ("a", 1) and ("a", "1") are different keys.

    Raises:
        OptionError: a part of the key that is neither string nor integer, or bounds that hold no number.

    >>> Random(0, "init", "layer.0", 0).normal((2, 2))
    tensor([[ 2.1794,  0.1037],
            [ 0.2713, -0.0425]])
    >>> torch.equal(Random(0, "init").normal((3,)), Random(0, "init").normal((6,))[:3])
    True
    """

    def __init__(self, *key: str | int):
        for part in key:
            if isinstance(part, bool) or not isinstance(part, str | int):
                raise OptionError(f"random key {key!r}: {part!r} is a {type(part).__name__}; use strings and integers")
        self.key = key
        text = json.dumps(key, separators=(",", ":"))
        digest = hashlib.sha256(text.encode("ascii")).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def __repr__(self) -> str:
        return f"Random({', '.join(map(repr, self.key))})"

    def child(self, *parts: str | int) -> "Random":
        """A fresh stream whose key is this one's, prolonged; it does not move this stream."""
        return Random(*self.key, *parts)

    def normal(self, shape: tuple[int, ...], std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, std²) by Box and Muller (1958), worked in float64 and rounded to float32 before the cast."""
        count = prod(shape)
        values = np.empty(count + count % 2, dtype=np.float32)
        for start in range(0, len(values), 2 * CHUNK):
            part = values[start : start + 2 * CHUNK]
            words = self._words(len(part))
            first, second = box_muller(words[0::2], words[1::2])
            part[0::2] = first * std
            part[1::2] = second * std
        return torch.from_numpy(values[:count]).reshape(shape).to(dtype)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform on [low, high): in float32 the value `high` never occurs (a cast to a shorter type may round to it)."""
        if not low < high:
            raise OptionError(f"uniform: low {low} must lie below high {high}")
        unit = (self._words(prod(shape)) >> np.uint64(11)) * 2.0**-53
        values = (low + (high - low) * unit).astype(np.float32)
        top = np.nextafter(np.float32(high), np.float32(low))
        return torch.from_numpy(np.minimum(values, top)).reshape(shape).to(dtype)

    def signs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """+1 or -1, one bit each."""
        count = prod(shape)
        octets = self._words(-(-count // 64)).astype("<u8").view(np.uint8)
        bits = np.unpackbits(octets, count=count, bitorder="little")
        return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(shape).to(dtype)

    def integers(self, shape: tuple[int, ...], high: int) -> Tensor:
        """int64 in [0, high), without bias: words beyond the last full multiple of `high` are drawn again."""
        if not 1 <= high <= 2**62:
            raise OptionError(f"integers: high {high} must lie in [1, 2**62]")
        words = self._words(prod(shape))
        limit = np.uint64((1 << 64) - 1 - (1 << 64) % high)
        while (redo := words > limit).any():
            words[redo] = self._words(int(redo.sum()))
        return torch.from_numpy((words % np.uint64(high)).astype(np.int64)).reshape(shape)

    def randint(self, low: int, high: int) -> int:
        """One Python integer in [low, high): low may occur, high never does.

        >>> sorted({Random("dylora", step).randint(1, 4) for step in range(50)})
        [1, 2, 3]
        """
        if not low < high:
            raise OptionError(f"randint: low {low} must lie below high {high}, which is exclusive")
        return low + int(self.integers((1,), high - low))

    def permutation(self, n: int) -> Tensor:
        """int64 [n]: 0 .. n-1 in random order."""
        return torch.from_numpy(np.argsort(self._words(n), kind="stable"))

    def choice(self, n: int, k: int) -> Tensor:
        """int64 [k]: distinct, ascending, every k-subset of 0 .. n-1 equally likely.

        >>> Random("rows").choice(1000, 4)
        tensor([205, 429, 528, 613])
        """
        if not 0 <= k <= n:
            raise OptionError(f"choice: cannot take {k} distinct of {n}; ask for 0 to {n}")
        if 4 * k >= n:
            return self.permutation(n)[:k].sort().values
        drawn = np.empty(0, dtype=np.int64)
        while True:  # few repeats are expected: one round nearly always does
            drawn = np.concatenate([drawn, self.integers((k + k // 2 + 8,), n).numpy()])
            values, first = np.unique(drawn, return_index=True)
            if len(values) >= k:
                return torch.from_numpy(np.sort(drawn[np.sort(first)[:k]]))

    def haar(self, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols] with orthonormal columns (rows >= cols) or rows, uniform over all such matrices.

        Q of the QR factorisation of a normal matrix, with the diagonal of R made positive: without that the law is not
        uniform (Mezzadri 2007). LAPACK builds may differ in the last place, so what is regenerated carries a checksum.
        """
        tall, thin = max(rows, cols), min(rows, cols)
        Q, R = torch.linalg.qr(self.normal((tall, thin), dtype=torch.float64))
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        return (Q if rows >= cols else Q.mT.contiguous()).to(torch.float32).to(dtype)

    def _words(self, count: int) -> np.ndarray:
        return self._philox.random_raw(count) if count else np.empty(0, dtype=np.uint64)


def checksum(tensor: Tensor) -> str:
    """Short hex digest of shape and first 64 values (as float32): tells whether a regenerated basis is the saved one.

    >>> checksum(Random(0, "basis").normal((8, 8))), checksum(Random(1, "basis").normal((8, 8)))
    ('01bc6c1733bce6f7', '9bd9f4e490e8f382')
    """
    head = tensor.detach().reshape(-1)[:64].to("cpu", torch.float32).numpy().astype("<f4")
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + head.tobytes()).hexdigest()[:16]


def box_muller(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent normals (float64) from each pair of 64-bit words: radius from the first, angle from the second."""
    unit = ((first >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]: the logarithm is finite
    radius = np.sqrt(-2.0 * log(unit))
    quarter = second >> np.uint64(62)  # which quarter turn; the rest is the angle within it, from -π/4 to π/4
    angle = (((second << np.uint64(2)) >> np.uint64(11)) * 2.0**-53 - 0.5) * HALF_PI
    square = angle * angle
    cosine = horner(COSINE, square)
    sine = angle * horner(SINE, square)
    turned = (quarter & np.uint64(1)).astype(bool)
    radius = np.where(quarter >= 2, -radius, radius)
    return radius * np.where(turned, -sine, cosine), radius * np.where(turned, cosine, sine)


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive float64 values: x = m·2^e, ln m = 2·atanh((m-1)/(m+1)) with m near 1."""
    m, e = np.frexp(x)
    small = m < SQRT_HALF
    m = np.where(small, 2.0 * m, m)
    s = (m - 1.0) / (m + 1.0)
    return (e - small) * LN2 + 2.0 * s * horner(ATANH, s * s)


def horner(coefficients: list[float], x: np.ndarray) -> np.ndarray:
    """Σ cₖ xᵏ, by separate products and sums (a fused multiply-add would round differently)."""
    value = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value *= x
        value += c
    return value
