"""MatryoshkaLoRA: the sum over ranks is one product with a fixed diagonal; its weights, its special cases, inference."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, inputs, tensors, trained

from rankfold.errors import OptionError
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.matryoshka import Matryoshka

SHARES = {"one": lambda r: 1.0, "inverse": lambda r: 1 / r, "root": lambda r: r**-0.5}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ranks", [None, (1, 3, 6), (6,)])
def test_is_the_sum_over_its_ranks(share, ranks):
    ladder = ranks or (1, 2, 4, 6)
    changed = lambda W, t: W + sum(SHARES[share](r) * t.B[:, :r] @ t.A[:r] for r in ladder)
    structure = Matryoshka(rank=6, ranks=ranks, share=share)
    check_definition(structure, changed, runs=("fused", "structured", "effective", "plain"))


def test_the_example_of_the_paper():
    assert Matryoshka(rank=16, ranks=(1, 2, 4, 8, 16)).diagonal().tolist() == [5, 4, 3, 3, 2, 2, 2, 2, *[1] * 8]


def test_one_rank_is_lora_and_a_start_is_the_base():
    check_start(Matryoshka(rank=4))
    ones, lora = (attached(s) for s in (Matryoshka(rank=4, ranks=(4,)), LoRA(rank=4)))
    for t, u in zip(tensors(ones[1]), tensors(lora[1])):
        with torch.no_grad():
            u.B.normal_(generator=torch.Generator().manual_seed(0))
            t.B.copy_(u.B)
            t.A.copy_(u.A)
    assert torch.allclose(ones[0](inputs()), lora[0](inputs()), atol=1e-12)
    assert sum(p.numel() for p in trained(ones[1])) == sum(p.numel() for p in trained(lora[1]))


def test_dropping_the_diagonal_in_evaluation_gives_another_function():
    model, store = attached(Matryoshka(rank=4, share="root", inference="drop"))
    for t in tensors(store):
        t.B.data.normal_(generator=torch.Generator().manual_seed(0))
    model.train()
    trained_for = model(inputs())
    model.eval()
    store.version += 1
    W = model[0].weight + 0.5 * tensors(store)[0].B @ tensors(store)[0].A
    V = model[2].weight + 0.5 * tensors(store)[1].B @ tensors(store)[1].A
    linear = torch.nn.functional.linear
    expected = linear(torch.tanh(linear(inputs(), W, model[0].bias)), V, model[2].bias)
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(inputs()), trained_for, atol=1e-3)


@pytest.mark.parametrize("ranks", [(4, 2), (1, 2), (2, 2, 4), ()])
def test_ranks_that_do_not_ascend_to_the_rank_are_refused(ranks):
    with pytest.raises(OptionError, match="ascend"):
        Matryoshka(rank=4, ranks=ranks)
