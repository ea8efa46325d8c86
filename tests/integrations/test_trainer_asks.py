"""What users of other tools' adapters under a Trainer asked for (U15 to U18): dtypes, unused parameters, checkpointing."""

from contextlib import nullcontext

import pytest
import torch
from small_models import arguments, assert_bitwise, batch, llama, losses, rows, tensors
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

import rankfold as rf
from rankfold.integrations.transformers import Trainer

IDS = torch.arange(3, 19).view(2, 8)


def shake(adaptation):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(k))


# U15: fp32 adapter beside a bf16 base


@pytest.mark.parametrize("base", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_u15_masters_are_float32_beside_a_half_base_and_files_keep_the_dtype(base, tmp_path):
    model = llama().to(base)
    adaptation = rf.adapt(model, "dora", rank=4, seed=1, extras=["lm_head"])
    assert {p.dtype for p in adaptation.parameters()} == {torch.float32}
    Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    assert {p.dtype for p in adaptation.parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("rankfold")} == {base}
    adaptation.save(tmp_path / "saved")
    fresh = llama().to(base)
    loaded = rf.load(fresh, tmp_path / "saved")
    assert_bitwise(tensors(loaded), tensors(adaptation))
    assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_u15_masters_can_be_in_the_base_s_dtype(tmp_path):
    """One dtype everywhere, for whoever must have it: the adapter's tensors alone are cast."""
    model = llama().to(torch.bfloat16)
    adaptation = rf.adapt(model, "lora", rank=4)
    model.rankfold.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in adaptation.parameters()} == {torch.bfloat16}
    shake(adaptation)
    adaptation.save(tmp_path / "saved")
    fresh = llama().to(torch.bfloat16)
    rf.load(fresh, tmp_path / "saved")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits, rtol=2e-2, atol=2e-2)


# U16: no cast between A and B


class Products(TorchDispatchMode):
    """Dtypes of the operands of every product of matrices that has a dimension of the rank and one of the tokens."""

    def __init__(self, rank, tokens):
        super().__init__()
        self.sizes, self.found = {rank, tokens}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            operands = [a for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2]
            if self.sizes <= {n for a in operands for n in a.shape}:
                self.found |= {a.dtype for a in operands}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.float32),
    ],
    ids=str,
)
def test_u16_both_factors_run_in_the_dtype_of_the_layer(method, base, autocast, expected):
    model = llama().to(base)
    adaptation = rf.adapt(model, method, rank=5, alpha=5)
    shake(adaptation)
    ids = IDS.repeat(1, 6)[:1, :11]  # a number of tokens that is no width
    with Products(rank=5, tokens=11) as seen, torch.autocast("cpu", autocast) if autocast else nullcontext():
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.found == {expected}
    assert {p.grad.dtype for p in adaptation.parameters()} == {torch.float32}


def test_u16_factors_of_two_dtypes_train(tmp_path):
    """A in float32 and B in bfloat16 on a bfloat16 base: each has a gradient of its own dtype, and the losses are near."""

    def run(half):
        model = llama().to(torch.bfloat16 if half else torch.float32)
        adaptation = rf.adapt(model, "lora", rank=4, seed=1)
        shake(adaptation)
        for key, p in adaptation.tensors().items() if half else ():
            p.data = p.data.bfloat16() if key.endswith("B") else p.data
        trainer = Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows())
        trainer.train()
        return losses(trainer), {p.dtype for p in adaptation.parameters()}

    (mixed, dtypes), (exact, _) = run(True), run(False)
    assert dtypes == {torch.float32, torch.bfloat16}
    assert mixed == pytest.approx(exact, rel=0.01)


# U17: copies of whole modules leave nothing unused


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["keeping", "recomputing", "reentrant"])
def test_u17_extras_leave_no_unused_parameter(one_process_group, reentrant):
    model = llama()
    adaptation = rf.adapt(model, "dora", rank=4, extras=["lm_head", "norms"])
    shake(adaptation)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith("rankfold.") for n in trainable)  # the head itself is frozen beside its copy
    assert not model.lm_head.weight.requires_grad
    wrapped = DistributedDataParallel(model.train(), find_unused_parameters=False)
    for _ in range(3):  # a parameter without a gradient makes the second forward raise
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in trainable)
        model.zero_grad()


# U18: gradient checkpointing keeps the adapter's gradients


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def pictures():
    g = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=g), "labels": k % 2} for k in range(18)]


@pytest.mark.parametrize(
    ("made", "data", "reentrant"),
    [
        (llama, rows, False),
        (llama, rows, True),
        pytest.param(vit, pictures, False, marks=pytest.mark.full),
        (vit, pictures, True),
    ],
)
def test_u18_checkpointing_under_the_trainer_keeps_every_gradient(made, data, reentrant, tmp_path):
    def run(**options):
        adaptation = rf.adapt(made(), "dora", rank=4, seed=1)
        trainer = Trainer(adaptation.model, arguments(tmp_path, **options), train_dataset=data())
        trainer.train()
        return losses(trainer), trainer.adaptation._get(None).engine.reached

    kwargs = {"use_reentrant": reentrant}
    (plain, sites), (recomputed, reached) = run(), run(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    assert reached == sites
    assert recomputed == pytest.approx(plain, abs=1e-6)
    assert abs(plain[0] - plain[-1]) > 1e-3


def test_u19_a_resumed_run_goes_on_at_the_loss_where_it_was(tmp_path):
    """Optimizer, schedule and adapter come back: without the optimizer's memory the next loss is another one."""
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = Trainer(rf.adapt(llama(), "lora", rank=4, seed=1).model, arguments(tmp_path, **options), train_dataset=rows())
    whole.train()
    fresh = Trainer(rf.adapt(llama(), "lora", rank=4, seed=7).model, arguments(tmp_path, **options), train_dataset=rows())
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(fresh) == losses(whole)
    model = llama()
    rf.load(model, tmp_path / "checkpoint-4")  # the adapter alone
    anew = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows())
    anew.train()
    first = batch(rows()[:4])
    assert losses(anew)[0] != losses(whole)[4]
    assert model(**first).loss.isfinite()
