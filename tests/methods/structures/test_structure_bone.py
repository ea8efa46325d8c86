"""Bone: block-affine change by a loop over blocks, both block indices, peft's "bat"."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, move, same, slots, tensors, tiny

from rankfold.core import check_sites, find_sites
from rankfold.errors import TargetError
from rankfold.linalg import Blockwise, Dense, contains, difference
from rankfold.methods.structures.bone import Bone


def looped(r, blocks):
    def weight(W, t):
        rows = []
        for j in range(W.shape[0] // r):
            row = []
            for k in range(W.shape[1] // r):
                C = t.C[j if blocks == "out" else k]
                block = W[j * r : (j + 1) * r, k * r : (k + 1) * r]
                row.append(block + block @ C + C)
            rows.append(torch.cat(row, 1))
        return torch.cat(rows, 0)

    return weight


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("blocks", "plan"), [("out", "effective"), ("in", "structured")])
def test_is_the_loop_over_blocks(rank, blocks, plan):
    structure = Bone(rank=rank, blocks=blocks)
    check_definition(structure, looped(rank, blocks), runs=(plan, "plain"))
    check_start(structure)


def test_in_form_never_builds_the_base():
    _, store = attached(Bone(rank=4, blocks="in"))
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    expr = slot.weight(t)
    assert not any(isinstance(term, Blockwise) for term in expr.children())
    change = difference(expr, slot.base)
    assert contains(change, slot.base)
    torch.testing.assert_close(change.dense(), looped(4, "in")(slot.base.W, t) - slot.base.W, rtol=1e-12, atol=1e-12)


def test_one_input_block_is_the_out_form_with_tied_blocks():
    W, C = torch.randn(12, 4, dtype=torch.float64), torch.randn(1, 4, 4, dtype=torch.float64)
    from collections import namedtuple

    from rankfold.core import Site

    T, site = namedtuple("T", "C"), Site("x", (12, 4))
    inner = Bone(rank=4, blocks="in").weight(Dense(W), T(C), site).dense()
    outer = Bone(rank=4).weight(Dense(W), T(C.expand(3, 4, 4)), site).dense()
    torch.testing.assert_close(inner, outer, rtol=1e-12, atol=1e-12)


def test_refuses_sizes_that_blocks_do_not_tile():
    model = tiny()
    with pytest.raises(TargetError, match="do not tile"):
        check_sites(model, Bone(rank=3), find_sites(model), automatic=False)
    good, dropped = check_sites(torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4)), Bone(rank=3), find_sites(
        torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))), automatic=True)  # fmt: skip
    assert [s.name for s in good] == ["0"]
    assert dropped[0][0] == "1"


def test_agrees_with_peft():
    from peft import MissConfig

    config = MissConfig(r=4, init_weights="bat", target_modules=["0", "2"])
    check_against_peft(Bone(rank=4), config, lambda t, layer: [(t.C, layer.miss_block["default"], same)])
