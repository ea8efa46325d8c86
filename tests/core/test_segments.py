"""Segments of adapters in one batch against the loop over rows, in float64."""

from __future__ import annotations

import pytest
import torch

from rankfold.kernels.segments import WIDTH, add_gathered, add_one, add_segments, gathered, looped, split

RANKS = [0, 3, 8, 9, 24, 16]
CHOICES = {
    "one each, in order": [2, 1],
    "one each": [5, 1, 3, 4, 2],
    "skewed": [1] * 11 + [2, 3, 1, 0],
    "even": [4, 3, 4, 3, 2, 2],
    "with the base": [0, 0, 3, 0],
}


def arena(numbers: int, seed: int) -> torch.Tensor:
    """[slots, 24, numbers], zero above each slot's rank."""
    t = torch.randn(len(RANKS), 24, numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for slot, rank in enumerate(RANKS):
        t[slot, rank:] = 0
    return t


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_are_the_loop(choice: str, tokens: int) -> None:
    slots = CHOICES[choice]
    A, B = arena(5, 0), arena(7, 1)
    x = torch.randn(len(slots), tokens, 5, dtype=torch.float64)
    y = torch.randn(len(slots), tokens, 7, dtype=torch.float64)
    expected = y + looped(x, A, B, torch.tensor(slots))
    cut = split(slots, [RANKS[s] for s in slots])
    rows = x if cut.straight else x[cut.rows].view(len(cut.blocks), -1, 5)
    own = lambda t: torch.stack([t[slot, WIDTH * part : WIDTH * (part + 1)] for slot, part in cut.blocks])
    got = add_segments(y.clone(), torch.bmm(rows, own(A).mT), own(B), cut) if cut.blocks else y.clone()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    base = [n for n, s in enumerate(slots) if s == 0]
    assert torch.equal(got[base], y[base])
    index = torch.tensor(slots)
    parts = A.unflatten(1, (-1, WIDTH)).flatten(0, 1), B.unflatten(1, (-1, WIDTH)).flatten(0, 1)
    torch.testing.assert_close(y + gathered(x, *parts, index, 24 // WIDTH), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(add_gathered(y.clone(), torch.bmm(x, A[index].mT), B[index]), expected, rtol=0, atol=1e-12)


def test_only_ranks_and_rows_that_are_there_become_blocks() -> None:
    assert len(split([1, 4], [3, 24]).blocks) == 1 + 24 // WIDTH
    assert len(split([1] * 32, [8] * 32).blocks) == 1
    assert len(split([0, 0], [0, 0]).blocks) == 0
    for others in range(1, 16):  # the worst skew: one adapter with all the other rows
        slots = [1] * (32 - others) + list(range(2, 2 + others))
        cut = split(slots, [8] * 32)
        assert len(cut.blocks) <= 2 * (others + 1)
        assert len(cut.rows) <= 2 * 32 + others


@pytest.mark.parametrize("whole", [True, False])
def test_one_adapter_for_all(whole: bool) -> None:
    x, y = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 9, dtype=torch.float64)
    A, B = arena(5, 0)[4], arena(7, 1)[4]
    part = torch.randn(4, 3, 7, dtype=torch.float64) if whole else y[..., 1:8]
    expected = part + x @ A.mT @ B
    torch.testing.assert_close(add_one(part, (x @ A.mT).flatten(0, 1), B), expected, rtol=0, atol=1e-12)
