"""VeRA: two vectors around shared random factors; slices of one basis, counts, start law, peft."""

import torch
from structure_checks import (
    attached,
    check_against_peft,
    check_definition,
    check_start,
    gradients,
    inputs,
    same,
    tensors,
    trained,
)

from rankfold.methods.structures.vera import VeRA


def test_is_two_diagonals_around_the_basis():
    weight = lambda W, t: W + torch.diag(t.b) @ t.B @ torch.diag(t.d) @ t.A
    check_definition(VeRA(rank=5), weight, runs=("fused", "structured", "effective", "plain"))


def test_starts_at_the_base_even_where_the_rank_exceeds_the_matrix():
    check_start(VeRA(rank=6))
    check_start(VeRA(rank=64))


def test_two_sites_read_leading_slices_of_one_basis_that_is_stored_once():
    _, store = attached(VeRA(rank=6))
    first, second = tensors(store)
    assert (first.A.shape, first.B.shape) == ((6, 12), (20, 6))
    assert (second.A.shape, second.B.shape) == ((6, 20), (8, 6))
    assert torch.equal(first.A, second.A[:, :12])
    assert torch.equal(second.B, first.B[:8])
    assert sorted(p.numel() for p in store.parameters()) == [6, 6, 8, 20, 6 * 20, 20 * 6]
    assert sum(p.numel() for p in trained(store)) == 20 + 6 + 8 + 6


def test_basis_has_variance_two_over_fan_in():
    _, store = attached(VeRA(rank=300))
    basis = {n: p for n, p in store.named_parameters() if "shared" in n}
    for name, fan_in in (("A", 20), ("B", 300)):
        (p,) = [p for n, p in basis.items() if n.endswith(name)]
        assert p.shape[1] == fan_in
        assert p.abs().max() <= (6 / fan_in) ** 0.5
        assert abs(float(p.var()) / (2 / fan_in) - 1) < 0.1


def test_first_gradient_reaches_b_alone():
    model, store = attached(VeRA(rank=4))
    for t in tensors(store):
        gb, gd = gradients(model(inputs()), [t.b, t.d])
        assert gb.abs().max() > 0
        assert gd.abs().max() == 0


def test_agrees_with_peft():
    from peft import VeraConfig

    def bases(store, net):
        first, second = tensors(store)
        for layer in (net[0], net[2]):
            layer.vera_A["default"].data = second.A.detach().clone()
            layer.vera_B["default"].data = first.B.detach().clone()

    def pair(t, layer):
        return [(t.b, layer.vera_lambda_b["default"], same), (t.d, layer.vera_lambda_d["default"], same)]

    check_against_peft(VeRA(rank=5), VeraConfig(r=5, target_modules=["0", "2"]), pair, prepare=bases)
