"""Kron (LoKr): block (i, j) is P_ij Q; splitting of sizes, factored factors, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, gradients, inputs, same, tensors

from rankfold.core import Site
from rankfold.methods.structures.kron import Kron, split


def blocks(s=1.0):
    def weight(W, t):
        P = t.P if hasattr(t, "P") else t.P1 @ t.P2
        Q = t.Q if hasattr(t, "Q") else t.Q1 @ t.Q2
        return W + s * torch.cat([torch.cat([P[i, j] * Q for j in range(P.shape[1])], 1) for i in range(P.shape[0])], 0)

    return weight


CASES = [
    (Kron(rank=9), {"P": (4, 3), "Q": (5, 4)}),
    (Kron(rank=1, alpha=3), {"P": (4, 3), "Q1": (5, 1), "Q2": (1, 4)}),
    (Kron(rank=1, both=True), {"P1": (4, 1), "P2": (1, 3), "Q1": (5, 1), "Q2": (1, 4)}),
    (Kron(rank=2, factor=2, alpha=6), {"P": (2, 2), "Q1": (10, 2), "Q2": (2, 6)}),
]


@pytest.mark.parametrize(("structure", "shapes"), CASES, ids=lambda c: "".join(c) if isinstance(c, dict) else "")
def test_is_the_block_matrix(structure, shapes):
    assert {n: spec.shape for n, spec in structure.tensors(Site("x", (20, 12))).items()} == shapes
    check_definition(structure, blocks(structure.scale), runs=("structured", "effective", "plain"), size=0.8)
    check_start(structure)
    assert structure.scale == (1.0 if structure.alpha is None else 3.0)


def test_splits_sizes_as_peft_does():
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 200), 384, 512, 768, 1408, 1536, 4096, 11008]:
        for factor in (None, 1, 2, 3, 4, 5, 8, 16, 50):
            assert tuple(split(size, factor)) == factorization(size, factor or -1), (size, factor)


def test_first_gradient_reaches_p_alone():
    model, store = attached(Kron(rank=1))
    for t in tensors(store):
        gP, gQ1, gQ2 = gradients(model(inputs()), [t.P, t.Q1, t.Q2])
        assert gP.abs().max() > 0
        assert gQ1.abs().max() == gQ2.abs().max() == 0


@pytest.mark.parametrize(("structure", "shapes"), CASES, ids=lambda c: "".join(c) if isinstance(c, dict) else "")
def test_agrees_with_peft(structure, shapes):
    from peft import LoKrConfig

    config = LoKrConfig(
        r=structure.rank,
        alpha=structure.alpha or structure.rank,
        decompose_both=structure.both,
        decompose_factor=structure.factor or -1,
        target_modules=["0", "2"],
    )
    theirs = {"P": "lokr_w1", "P1": "lokr_w1_a", "P2": "lokr_w1_b", "Q": "lokr_w2", "Q1": "lokr_w2_a", "Q2": "lokr_w2_b"}

    def pair(t, layer):
        return [(getattr(t, n), getattr(layer, theirs[n])["default"], same) for n in t._fields]

    check_against_peft(structure, config, pair, size=0.8)
