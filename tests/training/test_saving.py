"""Folders that don't fit: refused by name, and the model keeps the adapters that it has."""

import pytest
import safetensors.torch
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import FileError, OptionError
from rankfold.training.loop import LoopSettings, train


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 4))


def edited(folder, change):
    """The folder with its tensors passed through `change`: {name: tensor} -> {name: tensor}."""
    file = folder / "adapter.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("shared:")},
        lambda tensors: {n: t[:, :5].contiguous() if n.startswith("shared:") else t for n, t in tensors.items()},
        lambda tensors: {**tensors, "shared:shared:C": torch.ones(1)},
    ],
    ids=["missing", "of another shape", "one too many"],
)
def test_shared_tensors_are_never_made_anew(tmp_path, change):
    folder = edited(rf.adapt(network(), "vera", rank=4).save(tmp_path / "adapter"), change)
    with pytest.raises(FileError, match="shared tensors"):
        rf.load(network(), folder)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (network(10), r"0 changes a map \(6, 8\) \(linear\); in this model 0 is \(6, 10\) \(linear\)"),
        (nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Linear(6, 4)), "this model has no site '0'; nearest: 2"),
        (nn.Sequential(nn.Embedding(6, 8), nn.Tanh(), nn.Linear(6, 4)), r"in this model 0 is \(8, 6\) \(embedding\)"),
    ],
    ids=["wider", "no weight", "embedding"],
)
def test_force_is_about_values_and_not_about_shapes(tmp_path, model, reason):
    folder = rf.adapt(network(), "lora", rank=2).save(tmp_path / "adapter")
    with pytest.raises(FileError, match=reason):
        rf.load(model, folder, force=True)
    assert "rankfold" not in model._modules


def test_a_failed_load_leaves_what_is_on(tmp_path):
    saved = rf.adapt(network(), "lora", rank=2, targets=["0"], extras=["2"]).save(tmp_path / "adapter")
    folder = edited(saved, lambda tensors: {n: t[:2].contiguous() if n == "extra:2.weight" else t for n, t in tensors.items()})
    model = network()
    adaptation = rf.adapt(model, "lora", rank=2, name="first")
    with pytest.raises(FileError, match="does not fit"):
        rf.load(model, folder, name="second")
    assert list(adaptation.active) == adaptation.names == ["first"]
    with pytest.raises(OptionError, match="plan"):
        rf.load(model, folder, plan="fussed")


def test_a_restored_state_is_no_foreign_optimizer_s(tmp_path):
    def go_on(**settings):
        model = network()
        adaptation = rf.adapt(model, "loraplus", rank=2, targets=["0"])
        for _ in range(2):
            model(torch.ones(2, 8))
        loop = LoopSettings(epochs=10, progress=False, folder=tmp_path / "run", checkpoint_minutes=1e-9, **settings)
        return train(model, adaptation, [torch.ones(2, 8)], lambda m, x: m(x).square().mean(), loop)

    go_on(max_steps=2)
    assert len(go_on(max_steps=4, resume=True).steps) == 4
