"""MiSS: input shards summed and mapped by one matrix; uneven last shard, mini, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, move, tensors, tiny

from rankfold.core import check_sites, find_sites
from rankfold.errors import TargetError
from rankfold.methods.structures.miss import MiSS


def shards(r):
    """ΔW entry by entry: column i of the change is column i mod r of D, rows of D repeated."""

    def weight(W, t):
        out, in_ = W.shape
        rows = torch.arange(out) % t.D.shape[0]
        return W + t.D[rows][:, torch.arange(in_) % r]

    return weight


@pytest.mark.parametrize("structure", [MiSS(rank=4), MiSS(rank=5), MiSS(rank=3, mini=4), MiSS(rank=7, mini=2)], ids=str)
def test_is_one_matrix_repeated_over_shards(structure):
    check_definition(structure, shards(structure.rank), runs=("fused", "structured", "effective", "plain"))
    check_start(structure)


def test_mini_of_all_outputs_is_the_plain_form():
    assert (
        MiSS(rank=4, mini=20).tensors(find_sites(tiny())[0])["D"].shape == MiSS(rank=4).tensors(find_sites(tiny())[0])["D"].shape
    )


def test_keeps_no_input_for_backward():
    """The tiling is frozen, so the gradient of D needs the summed shards alone: r numbers a token."""
    model, store = attached(MiSS(rank=4), torch.nn.Sequential(torch.nn.Linear(64, 64)))
    move(store)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(10, 64))
    assert (10, 4) in kept
    assert (10, 64) not in kept


def test_mini_must_divide_the_outputs():
    model = tiny()
    with pytest.raises(TargetError, match="mini 3 does not divide"):
        check_sites(model, MiSS(rank=4, mini=3), find_sites(model), automatic=False)


@pytest.mark.parametrize(("rank", "mini"), [(4, None), (5, None), (4, 2)])
def test_agrees_with_peft(rank, mini):
    from peft import MissConfig

    config = MissConfig(r=rank, target_modules=["0", "2"], init_weights=True if mini is None else "mini", mini_r=mini or 1)

    def pair(t, layer):
        return [(t.D, layer.miss_block["default"], lambda D: D.mT)]

    check_against_peft(MiSS(rank=rank, mini=mini), config, pair)
    assert tensors(attached(MiSS(rank=rank))[1])[0].D.shape == (20, rank)
