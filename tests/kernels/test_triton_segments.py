"""Segmented products in Triton, by the interpreter, against one row after the other in float64."""

import pytest
import torch

pytest.importorskip("triton")

from rankfold.kernels.segments import looped
from rankfold.kernels.triton.segments import add_runs, gathered, runs


PARTS, K = 3, 8


def arena(width, ranks, dtype, seed):
    """[slots·3, 8, width] within wider rows, zero above each slot's own rank."""
    wide = torch.randn(len(ranks) * PARTS, K * width + 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    view = wide.narrow(1, 3, K * width).unflatten(1, (K, width))
    for slot, own in enumerate(ranks):
        for rank in range(own, PARTS * K):
            view[slot * PARTS + rank // K, rank % K] = 0.0
    return view


def whole(view):
    """[slots, 24, width] in float64."""
    return view.double().unflatten(0, (-1, PARTS)).flatten(1, 2)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "mixed": ([3, 1, 3, 0, 2, 1, 3], 1),
    "one": ([2], 1),
    "sequences": ([1, 3, 1], 21),
    "long ones": ([1, 3, 0], 70),
    "all the base": ([0, 0], 2),
    "nobody": ([], 1),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_segments(case, dtype, tolerance):
    slots, tokens = CASES[case]
    ranks = [0, 3, 17, 20]
    A, B = arena(37, ranks, dtype, 0), arena(70, ranks, dtype, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(slots), tokens, 37, generator=generator).to(DEVICE, dtype)
    y = torch.randn(len(slots), tokens, 70, generator=generator).to(DEVICE, dtype)
    cut = runs(slots, [ranks[s] for s in slots], tokens, DEVICE)
    found = add_runs(y.clone().flatten(0, 1), x.flatten(0, 1), A, B, PARTS, cut).view(y.shape)
    if not slots:
        assert found.shape == y.shape
        return
    change = looped(x.double(), whole(A), whole(B), torch.tensor(slots))
    assert (found.double() - y.double() - change).norm() <= tolerance * (y.double() + change).norm()
    base = [n for n, s in enumerate(slots) if s == 0]
    assert torch.equal(found[base], y[base])
    by_index = gathered(x, A, B, torch.tensor(slots, device=DEVICE), PARTS)
    assert (by_index.double() - change).norm() <= tolerance * change.norm()
    assert not by_index[base].any()
