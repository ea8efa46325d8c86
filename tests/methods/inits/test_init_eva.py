"""EVA: A from the inputs' principal directions, against the batch PCA and against peft."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import Site
from rankfold.errors import DataError, OptionError
from rankfold.linalg.random import Random
from rankfold.methods.inits.eva import EVA
from rankfold.training.contracts import Roles


def data(batches=6, rows=200, width=12):
    scale = torch.tensor([9.0, 6.0, 4.0, 2.5, 1.5] + [0.3] * (width - 5))
    turn = Random("turn").haar(width, width)
    return [Random("rows", k).normal((rows, width)) * scale @ turn + 2.0 for k in range(batches)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))


def first_rows(handle, site="0"):
    return handle.tensors()[f"default/{site}/A"].detach()


def test_a_spans_the_principal_directions_of_the_inputs():
    model, batches = net(), data()
    before = model(batches[0])
    handle = rf.adapt(model, "lora+init:eva", rank=3, batches=batches, **{"init.tau": 2.0})
    X = torch.cat(batches).double()
    _, _S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    A = first_rows(handle)
    assert float((A.double() * Vh[:3]).sum(1).abs().min()) > 0.999
    torch.testing.assert_close(A @ A.mT, torch.eye(3), rtol=0, atol=1e-5)
    assert handle.tensors()["default/0/B"].abs().sum() == 0
    assert torch.equal(model(batches[0]), before)


def test_centring_matters_where_the_mean_is_not_zero():
    batches = [b + 40 for b in data()]
    mean = torch.cat(batches).mean(0)
    mean = mean / mean.norm()
    leading = {}
    for center in (True, False):
        handle = rf.adapt(net(), "lora+init:eva", rank=2, batches=batches, **{"init.center": center})
        leading[center] = abs(float(first_rows(handle)[0] @ mean))
    assert leading[False] > 0.99
    assert leading[True] < 0.5


def test_the_order_of_batches_hardly_matters():
    one, other = (
        first_rows(rf.adapt(net(), "lora+init:eva", rank=3, batches=batches, **{"init.tau": 2.0}))
        for batches in (data(), data()[::-1])
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)


def test_whitening_divides_by_the_root_of_the_singular_values():
    plain, white = (
        first_rows(rf.adapt(net(), "lora+init:eva", rank=3, batches=data(), **{"init.whiten": w, "init.tau": 2.0}))
        for w in (False, True)
    )
    X = torch.cat(data())
    S = torch.linalg.svdvals(X - X.mean(0))[:3]
    torch.testing.assert_close(white, plain / S.sqrt()[:, None], rtol=2e-2, atol=1e-4)


def test_it_looks_no_longer_than_it_must():
    taken = []

    class Batches(list):
        def __iter__(self):
            for k, b in enumerate(super().__iter__()):
                taken.append(k)
                yield b

    rf.adapt(net(), "lora+init:eva", rank=2, targets=["0"], batches=Batches(data(30)))
    assert 1 <= max(taken) < 15


def test_redistribution_keeps_the_budget_and_the_scale():
    model = net()
    inputs = {"0": torch.cat(data()), "2": model[1](model[0](torch.cat(data()))).detach()}
    shares = {k: (s := torch.linalg.svdvals(x - x.mean(0)).square()) / s.sum() for k, x in inputs.items()}
    bids = sorted(((float(v), k) for k, values in shares.items() for v in values[:2]), reverse=True)
    handle = rf.adapt(model, "eva", rank=1, alpha=2, batches=data(), **{"init.tau": 2.0})
    ranks = {s.site.key: s.structure.core.rank for s in handle.slots()}
    chosen = [k for _, k in bids[:2]]
    assert ranks == {k: chosen.count(k) for k in ("0", "2") if k in chosen}
    assert {s.structure.scale for s in handle.slots()} == {2.0}


@pytest.mark.parametrize(("rank", "rho", "count"), [(3, 2.0, 6), (3, 1.0, 3), (3, 1.1, 4), (5, 2.0, 9)])
def test_rho_times_the_rank_are_scored(rank, rho, count):
    init, site = EVA(rho=rho), Site("0", (9, 12))
    stream = init.collect(site, Roles({"B": (9, rank), "A": (rank, 12)}, rank, 1.0))
    stream.observe(data()[0])
    scores = init.scores(site, stream)
    assert len(scores) == count
    assert bool((scores[:-1] >= scores[1:]).all())


def test_without_data_or_with_too_little_it_says_so():
    with pytest.raises(OptionError, match="give batches"):
        rf.adapt(net(), "lora+init:eva", rank=2)
    with pytest.raises(DataError, match="saw 2 rows, its rank is 4"):
        rf.adapt(net(), "lora+init:eva", rank=4, batches=[torch.randn(2, 12)])


def test_an_embedding_starts_by_its_own_law():
    model = nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 9))
    ids = [torch.arange(40)]
    handle = rf.adapt(model, "lora+init:eva", rank=2, targets=["0", "1"], batches=ids)
    assert handle.tensors()["default/0/B"].abs().sum() == 0
    torch.testing.assert_close(first_rows(handle, "1") @ first_rows(handle, "1").mT, torch.eye(2), rtol=0, atol=1e-5)


class Two(nn.Module):
    """Two layers that read one input, and one that reads their sum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x) + self.k(x)))


def test_directions_and_ranks_are_peft_s():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, batches = Two(), data(rows=400)
    config = peft.LoraConfig(
        r=3, target_modules=["q", "k", "o"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.999)
    )
    theirs = peft.get_eva_state_dict(
        model, batches, config, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    handle = rf.adapt(Two_from(model), "lora+init:eva", rank=3, batches=batches, **{"init.rho": 1.0, "init.tau": 2.0})
    for site in ("q", "k", "o"):
        ours = first_rows(handle, site)
        assert float((ours * theirs[site]).sum(1).abs().min()) > 0.99, site


def Two_from(model):
    copy = Two()
    copy.load_state_dict(model.state_dict())
    return copy


def test_explained_variance_is_peft_s():
    peft = pytest.importorskip("peft")
    from rankfold.training.streams import InputDirections

    theirs = peft.utils.incremental_pca.IncrementalPCA(n_components=4, copy=True, lowrank=True, lowrank_seed=42)
    ours = InputDirections(12, 4)
    for batch in data():
        theirs.partial_fit(batch)
        ours.observe(batch)
    torch.testing.assert_close(ours.explained(), theirs.explained_variance_ratio_[:4].to(ours.explained()), rtol=1e-2, atol=0)
