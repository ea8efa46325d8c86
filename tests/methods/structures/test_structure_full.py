"""Full: an owned copy; bitwise start with bias, gradients of full fine-tuning, base untouched."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, gradients, inputs, tensors, tiny, trained

from rankfold.methods.structures.full import Full


def test_is_the_copy():
    check_definition(Full(), lambda W, t: t.value, runs=("structured", "effective", "plain"))


def test_starts_at_the_base_bitwise():
    check_start(Full())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_bitwise_those_of_the_base_itself(dtype):
    plain = tiny(dtype)
    x = inputs(dtype)
    truth = gradients(plain(x), [x, plain[0].weight, plain[2].weight])
    model, store = attached(Full(), tiny(dtype))
    got = gradients(model(x), [x, *(t.value for t in tensors(store))])
    for a, b in zip(got, truth):
        assert torch.equal(a, b)


def test_a_step_moves_the_copy_and_not_the_base():
    model, store = attached(Full())
    before = model[0].weight.clone()
    model(inputs()).square().sum().backward()
    torch.optim.SGD(trained(store), lr=0.1).step()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None
    assert (tensors(store)[0].value - before).abs().max() > 0


def test_masters_of_a_bf16_base_are_float32():
    _, store = attached(Full(), tiny(torch.bfloat16))
    assert {p.dtype for p in trained(store)} == {torch.float32}
