"""LoRA and rsLoRA: definition, start, scale law, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, gradients, inputs, same, slots, tensors

from rankfold.methods.structures.lora import LoRA


@pytest.mark.parametrize("structure", [LoRA(rank=3), LoRA(rank=3, alpha=5), LoRA(rank=4, alpha=6, power=0.5)], ids=str)
def test_is_w_plus_s_b_a(structure):
    s = {None: 1.0, 5.0: 5 / 3, 6.0: 3.0}[structure.alpha]
    check_definition(structure, lambda W, t: W + s * t.B @ t.A, runs=("fused", "structured", "effective", "plain"))


def test_starts_at_the_base():
    check_start(LoRA(rank=4))


def test_first_gradient_reaches_b_alone():
    model, store = attached(LoRA(rank=3))
    for t in tensors(store):
        gB, gA = gradients(model(inputs()), [t.B, t.A])
        assert gB.abs().max() > 0
        assert gA.abs().max() == 0


def test_rank_stable_scale_keeps_the_size_of_the_output():
    sizes = {power: [] for power in (0.5, 1.0)}
    for rank in (4, 16, 64, 256):
        generator = torch.Generator().manual_seed(rank)
        B, A, x = (torch.randn(s, generator=generator) for s in ((300, rank), (rank, 300), (300, 50)))
        for power, found in sizes.items():
            found.append(float((LoRA(rank=rank, alpha=8, power=power).scale * (B @ (A @ x))).std()))
    assert max(sizes[0.5]) < 1.1 * min(sizes[0.5])
    for r, size in zip((4, 16, 64, 256), sizes[1.0]):
        assert size == pytest.approx(sizes[1.0][0] * (r / 4) ** -0.5, rel=0.1)


@pytest.mark.parametrize("stable", [False, True])
def test_agrees_with_peft(stable):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=stable, target_modules=["0", "2"])
    structure = LoRA(rank=4, alpha=6, power=0.5 if stable else 1.0)

    def pair(t, layer):
        return [(t.A, layer.lora_A["default"].weight, same), (t.B, layer.lora_B["default"].weight, same)]

    check_against_peft(structure, config, pair)


def test_another_seed_is_another_start_and_the_same_seed_the_same():
    starts = [tensors(attached(LoRA(rank=2), seed=seed)[1])[0].A for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    first, second = (slot.t(attached(LoRA(rank=2))[1]) for slot in slots(attached(LoRA(rank=2))[1]))
    assert first.A.shape != second.A.shape
