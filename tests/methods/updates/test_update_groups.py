"""AdamW and LoRA+: which tensor learns at which rate and decays towards what, against peft's groups."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.methods.updates.adamw import AdamW
from rankfold.methods.updates.loraplus import LoRAPlus
from rankfold.training.contracts import Trainable
from rankfold.training.edits import keys_by_role

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))


def rates(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_decay_pulls_an_offset_back_to_its_start():
    model = net()
    handle = rf.adapt(model, "pissa", rank=3)
    optimizer = handle.optimizer(lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(1.0)
    for _ in range(200):
        for p in handle.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for slot in handle.slots():
        keys = keys_by_role(slot)
        for role in "BA":
            torch.testing.assert_close(
                handle.store.tensor(keys[role]).detach(), handle.store.tensor(keys[role + "0"]).detach(), rtol=0, atol=1e-4
            )
    with handle.disabled():
        base = model(X)
    torch.testing.assert_close(model(X), base, rtol=0, atol=1e-3)


def test_plain_lora_decays_to_zero_and_magnitudes_stay():
    model = net()
    handle = rf.adapt(model, "dora", rank=3)
    optimizer = handle.optimizer(lr=0.1, weight_decay=0.5)
    before = handle.tensors()["default/0/A"].detach().clone()
    length = keys_by_role(handle.slots()[0])["magnitude"]
    magnitude = handle.tensors()[length].detach().clone()
    for p in handle.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(handle.tensors()["default/0/A"].detach(), 0.95 * before)
    assert torch.equal(handle.tensors()[length], magnitude)


def test_the_first_step_of_b_is_the_ratio_larger():
    steps = {}
    for ratio in (1.0, 16.0):
        model = net()
        handle = rf.adapt(model, "loraplus", rank=3, lr_ratio=ratio)
        optimizer = handle.optimizer(lr=1e-3)
        model(X).square().mean().backward()
        optimizer.step()
        steps[ratio] = handle.tensors()["default/2/B"].detach().clone()
    torch.testing.assert_close(steps[16.0], 16.0 * steps[1.0], rtol=1e-5, atol=0)


def test_a_ratio_of_one_is_adamw_bitwise():
    results = []
    for method in ("lora+update:loraplus", "lora"):
        model = net()
        handle = rf.adapt(model, method, rank=3, **({"lr_ratio": 1.0} if "plus" in method else {}))
        optimizer = handle.optimizer(lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        results.append(model(X))
    assert torch.equal(*results)


@pytest.mark.parametrize("peft_groups", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_tensor_is_in_one_group_at_its_rate(peft_groups, decay):
    handle = rf.adapt(net(), "dora+update:loraplus", rank=3, peft_groups=peft_groups)
    optimizer = handle.optimizer(lr=0.5, weight_decay=decay)
    found = rates(optimizer)
    assert sorted(found) == sorted(id(p) for p in handle.parameters())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(handle.parameters())
    for slot in handle.slots():
        keys = keys_by_role(slot)
        rate = {role: found[id(handle.store.tensor(keys[role]))] for role in ("A", "B", "magnitude")}
        assert rate == {"A": 0.5, "B": 8.0, "magnitude": 8.0 if peft_groups else 0.5}


def test_an_embedding_s_fast_factor_is_the_one_that_starts_at_zero():
    A, B = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    tensors = [Trainable("A", A, "A", kind="embedding"), Trainable("B", B, "B", kind="embedding")]
    found = rates(LoRAPlus(lr_ratio=4.0).optimizer(tensors, lr=1.0))
    assert (found[id(A)], found[id(B)]) == (4.0, 1.0)
    found = rates(LoRAPlus(lr_ratio=4.0, peft_groups=True).optimizer(tensors, lr=1.0))
    assert found[id(A)] == found[id(B)] == pytest.approx(1e-6)


def test_groups_are_peft_s():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["0", "2"], use_dora=True))
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16.0)
    names = {id(p): n for n, p in theirs.named_parameters()}
    expected = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            role = "B" if "lora_B" in names[id(p)] else "A" if "lora_A" in names[id(p)] else "magnitude"
            expected.setdefault(role, set()).add(group["lr"])
    handle = rf.adapt(net(), "dora+update:loraplus", rank=3, peft_groups=True)
    found = rates(handle.optimizer(lr=0.5))
    ours = {}
    for slot in handle.slots():
        for role, key in keys_by_role(slot).items():
            ours.setdefault(role, set()).add(found[id(handle.store.tensor(key))])
    assert ours == expected


def test_options_reach_torch():
    p = Trainable("p", nn.Parameter(torch.ones(2, 2)), "B")
    group = AdamW(beta1=0.5, beta2=0.6, eps=1e-3).optimizer([p], lr=0.1, weight_decay=0.2).param_groups[0]
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.1, 0.2)
