"""Dropout: masks on the input of the change alone, the same in forward and backward; expectation; DoRA's order."""

import pytest
import torch
from structure_checks import attached, gradients, inputs, loss_of, move, slots, tensors, tiny, trained
from torch.nn.functional import linear

from rankfold.core import PLANS, Context, Offset, fold
from rankfold.errors import LayoutError, OptionError
from rankfold.linalg.dropout import Dropout as Mask
from rankfold.methods.structures.dropout import Dropout
from rankfold.methods.structures.hra import HRA
from rankfold.methods.structures.kron import Kron
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.magnitude import Magnitude

INNER = [LoRA(rank=3, alpha=5), Kron(rank=9), HRA(rank=4), Magnitude(inner=LoRA(rank=3)), Offset(inner=LoRA(rank=3))]
NAMES = [type(s).__name__ for s in INNER]


@pytest.fixture
def masks(monkeypatch):
    """Multiples of 1 / (1 − p) that the passes draw, in order; whoever asks for the same seed and shape again gets the same."""
    import rankfold.linalg.dropout as operator

    drawn: dict = {}

    def keep(shape, p, seed, device):
        key = (tuple(shape[-1:]), seed)
        if key not in drawn:
            drawn[key] = torch.rand(15, shape[-1], generator=torch.Generator().manual_seed(seed % 1000)) >= p
        return drawn[key].view(shape)

    monkeypatch.setattr(operator, "keep_mask", keep)
    return drawn


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
def test_base_sees_all_of_x_and_the_change_sees_the_rest(inner, masks):
    model, store = attached(Dropout(p=0.3, inner=inner))
    move(store)
    x = inputs()
    wanted = [x, *trained(store)]
    ran = set()
    for plan in PLANS:
        masks.clear()
        torch.manual_seed(11)
        store.plan = plan
        try:
            y = model.train()(x)
        except LayoutError:
            continue
        got = gradients(y, wanted)
        ran.add(plan)
        h = x
        for module, slot, t, mask in zip((model[0], model[2]), slots(store), tensors(store), list(masks.values())):
            W = inner.weight(slot.base, t, slot.site).dense()
            dropped = h * mask.view(h.shape) / 0.7
            h = linear(h, module.weight, module.bias) + dropped @ (W - module.weight).T
            h = torch.tanh(h) if module is model[0] else h
        assert len(masks) == 2
        torch.testing.assert_close(y, h, rtol=1e-10, atol=1e-10)
        for a, b in zip(got, gradients(h, wanted)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert {"auto", "structured", "plain"} <= ran
    assert "effective" not in ran


def test_evaluation_is_the_structure_itself_and_folds():
    model, store = attached(Dropout(p=0.5, inner=LoRA(rank=3)))
    move(store)
    plain, other = attached(LoRA(rank=3))
    move(other)
    x = inputs()
    assert torch.equal(model.eval()(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))
    model.eval()
    fold(store)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_passes_differ_and_a_seed_repeats_them():
    model, store = attached(Dropout(p=0.5, inner=LoRA(rank=3)))
    move(store)
    x = inputs()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


def test_expectation_is_the_change():
    model, store = attached(Dropout(p=0.25, inner=LoRA(rank=3)), torch.nn.Sequential(torch.nn.Linear(12, 20)).double())
    move(store)
    x = inputs()
    with torch.no_grad():
        runs = torch.stack([model(x) for _ in range(2000)])
        exact = model.eval()(x)
    standard_error = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - exact).abs() < 5 * standard_error).all()
    assert standard_error.min() > 0


def test_start_is_the_base_and_p_zero_draws_nothing():
    for p in (0.0, 0.4):
        model, _ = attached(Dropout(p=p, inner=LoRA(rank=3)))
        assert torch.equal(model(inputs()), tiny()(inputs()))
    for p, training, drops in ((0.4, True, True), (0.4, False, False), (0.0, True, False)):
        _, store = attached(Dropout(p=p, inner=LoRA(rank=3)))
        expr = slots(store)[0].weight(tensors(store)[0], Context(training=training, seed=1))
        assert any(isinstance(getattr(term, "right", None), Mask) for term in expr.children()) == drops
    with pytest.raises(OptionError, match="less than 1"):
        Dropout(p=1.0, inner=LoRA())


def test_gradient_checkpointing_draws_the_same_masks_again():
    from torch.utils.checkpoint import checkpoint

    model, store = attached(Dropout(p=0.5, inner=LoRA(rank=3)))
    move(store)
    x = inputs()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(loss_of(run(x)), [x, *trained(store)]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
