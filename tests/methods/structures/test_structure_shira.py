"""SHiRA: values scattered to fixed places; the three masks, rank, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, move, same, slots, tensors, tiny

from rankfold.core import Site, check_sites, find_sites
from rankfold.errors import TargetError
from rankfold.methods.structures.shira import SHiRA


def scattered(W, t):
    return W + torch.zeros(W.numel(), dtype=W.dtype).index_add(0, t.index.long(), t.values).view(W.shape)


@pytest.mark.parametrize("structure", [SHiRA(rank=2), SHiRA(density=0.3, mask="wm"), SHiRA(density=0.4, mask="struct")], ids=str)
def test_is_w_plus_values_at_their_places(structure):
    check_definition(structure, scattered, runs=("structured", "effective", "plain"))
    check_start(structure)
    for t in tensors(attached(structure)[1]):
        assert (t.index.diff() > 0).all()  # the order in which files and peft keep the values


def test_everything_outside_the_index_is_bitwise_w():
    model, store = attached(SHiRA(rank=2))
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    W = slot.weight(t).dense()
    changed = (model[0].weight != W).flatten().nonzero().flatten()
    assert torch.equal(changed, t.index.long())
    assert len(changed) == 2 * (12 + 20) == SHiRA(rank=2).count(slot.site)


def test_wm_takes_the_largest_entries():
    model, store = attached(SHiRA(density=0.25, mask="wm"))
    size = model[0].weight.abs().flatten()
    index = tensors(store)[0].index.long()
    assert len(index) == 60
    rest = torch.ones_like(size, dtype=torch.bool)
    rest[index] = False
    assert size[index].min() >= size[rest].max()


@pytest.mark.parametrize(
    ("shape", "density"), [((20, 12), 0.3), ((12, 20), 0.5), ((30, 30), 0.1), ((9, 40), 0.02), ((40, 9), 1.0)]
)
def test_struct_takes_every_fth_row_and_the_diagonal(shape, density):
    structure = SHiRA(density=density, mask="struct")
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]))
    _, store = attached(structure, model)
    mask = torch.zeros(shape).flatten()
    mask[tensors(store)[0].index.long()] = 1
    mask = mask.view(shape)
    assert mask.sum() == structure.count(Site("x", shape))
    assert mask.diagonal().min() == 1
    whole = (mask.sum(1) == shape[1]).nonzero().flatten()
    steps = whole.diff().unique()
    assert whole[0] == 0
    assert len(steps) <= 1
    off = mask.clone()
    off[whole] = 0
    off.diagonal().zero_()
    assert off.sum() == 0
    if density >= 0.1:
        assert abs(float(mask.mean()) - density) <= 0.5 * density


def test_random_values_at_random_places_have_nearly_full_rank():
    """n (ln n + 4) entries: LoRA of as many parameters would have rank 4."""
    n = 64
    structure = SHiRA(density=(torch.log(torch.tensor(float(n))) + 4).item() / n)
    _, store = attached(structure, torch.nn.Sequential(torch.nn.Linear(n, n)))
    move(store)
    t = tensors(store)[0]
    change = torch.zeros(n * n).index_add(0, t.index.long(), t.values.detach()).view(n, n)
    assert torch.linalg.matrix_rank(change) >= 0.95 * n


def test_more_entries_than_the_matrix_has_are_refused():
    model = tiny()
    with pytest.raises(TargetError, match="asks for 256 entries"):
        check_sites(model, SHiRA(rank=8), find_sites(model), automatic=True)


def test_agrees_with_peft():
    from peft import ShiraConfig

    def places(store, net):
        for t, layer in zip(tensors(store), (net[0], net[2])):
            width = layer.in_features
            layer.shira_indices["default"] = torch.stack([t.index // width, t.index % width])

    config = ShiraConfig(r=2, target_modules=["0", "2"])
    with torch.sparse.check_sparse_tensor_invariants():
        check_against_peft(
            SHiRA(rank=2), config, lambda t, layer: [(t.values, layer.shira_weight["default"], same)], prepare=places
        )
