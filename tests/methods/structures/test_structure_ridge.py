"""RidgeLoRA: W times a ridge and a product, in series."""

import torch
from structure_checks import attached, check_definition, check_start, tensors, trained

from rankfold.linalg import difference
from rankfold.methods.structures.ridge import Ridge


def weight(W, t):
    return W @ (t.intensity * torch.diag(t.d) + 2.0 * t.B @ t.A)


def test_is_w_times_a_ridge_and_a_product():
    check_definition(Ridge(rank=3, alpha=6), weight, runs=("structured", "effective", "plain"))


def test_starts_at_the_base_bitwise():
    check_start(Ridge(rank=4))


def test_the_map_in_front_of_w_is_of_full_rank_and_w_is_not_in_the_change_twice():
    _, store = attached(Ridge(rank=2))
    slot, t = next(iter(store.members["a"].slots.values())), tensors(store)[0]
    for p in (t.B, t.d):
        p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    change = difference(slot.weight(t), slot.base).dense()
    W = slot.base.dense()
    truth = W @ (t.intensity * torch.diag(t.d) + t.B @ t.A) - W
    torch.testing.assert_close(change, truth, rtol=1e-11, atol=1e-11)
    assert int(torch.linalg.matrix_rank(change)) == 12
    assert sum(p.numel() for p in trained(store)) == 2 * 2 * 12 + 12 + 1 + 2 * 2 * 20 + 20 + 1
