"""Cutting a model with FSDP2: what is refused, and that the adapters stay whole. One process; two are law 9's."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import rankfold as rf
from rankfold.core.sharding import close, is_sharded, shard
from rankfold.errors import LayoutError


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])


class Tied(nn.Module):
    """A head that shares the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_without_processes_the_launcher_is_named():
    with pytest.raises(LayoutError, match="torchrun"):
        shard(blocks())


def test_cutting_twice_is_refused(group):
    model = shard(blocks())
    assert is_sharded(model)
    with pytest.raises(LayoutError, match="cut already"):
        shard(model)


def test_a_folded_model_is_not_cut(group):
    model = blocks()
    adaptation = rf.adapt(model, "lora", rank=1)
    adaptation.fold()
    with pytest.raises(LayoutError, match="unfold first"):
        shard(model)
    assert not is_sharded(model)


def test_all_tensors_of_the_adapter_stay_whole(group):
    model = blocks()
    adaptation = rf.adapt(model, "vera", rank=2)  # with tensors that are frozen and shared
    shard(model)
    assert all(isinstance(module.weight, DTensor) for module in model[:3])
    assert not any(isinstance(t, DTensor) for t in adaptation.tensors().values())


def test_blocks_are_cut_one_by_one(group):
    model = shard(blocks())
    assert all(is_sharded(block) for block in model)


def test_what_a_forward_left_whole_is_closed(group):
    model = shard(Tied())
    with torch.no_grad():
        model(torch.arange(3))
    assert not isinstance(model.embed.weight, DTensor)  # what this test is about
    close(model)
    assert isinstance(model.embed.weight, DTensor)


def test_adapters_that_are_cut_along_are_refused_by_the_forward(group):
    model = blocks()
    rf.adapt(model, "lora", rank=1)
    fully_shard(model)
    with pytest.raises(LayoutError, match="ignored_params"):
        model(torch.ones(1, 4))


def test_a_shared_weight_that_is_cut_is_not_folded_for_one_user(group):
    model = Tied()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["head"])
    shard(model)
    with pytest.raises(LayoutError, match="one weight, cut over processes"):
        adaptation.fold()
    assert torch.isfinite(model(torch.arange(3))).all()  # it is as it was


def test_removed_from_a_cut_model_the_base_runs_as_before(group):
    model, x = blocks(), torch.ones(2, 4)
    expected = model(x)
    rf.adapt(model, "dora", rank=2)
    shard(model)
    rf.adaptation(model).remove()
    assert torch.equal(model(x), expected)
    assert is_sharded(model)


def test_a_packed_base_is_refused_by_name(group):
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    rf.quantise(model, "int8")
    with pytest.raises(LayoutError, match="0 and 1 more are stored in few bits"):
        shard(model)
    assert not is_sharded(model)
