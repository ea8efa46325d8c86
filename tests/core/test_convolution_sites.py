"""Convolutions as sites: every plan against W' put into the library's own convolution, in float64."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import rankfold as rf
from rankfold.errors import LayoutError, TargetError

RUNS = [
    ("auto", "auto"),
    ("fused", "auto"),
    ("structured", "keep"),
    ("structured", "recompute"),
    ("effective", "auto"),
    ("plain", "auto"),
]


def layer(kind, **options):
    torch.manual_seed(0)
    return kind(4, 6, **options).double()


LAYERS = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2}, (2, 4, 9)),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "dilation": (1, 2)}, (2, 4, 6, 7)),
    "3d": (nn.Conv3d, {"kernel_size": (1, 2, 2), "padding": (0, 1, 1), "bias": False}, (2, 4, 3, 4, 3)),
    "same, uneven": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same"}, (2, 4, 5, 4)),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}, (2, 4, 5, 4)),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}, (2, 4, 5, 4)),
    "reflect": (nn.Conv1d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (2, 4, 5)),
    "replicate, grouped": (nn.Conv2d, {"kernel_size": 2, "padding": 1, "padding_mode": "replicate", "groups": 2}, (2, 4, 5, 4)),
    "grouped 1d": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "dilation": 2}, (2, 4, 9)),
    "grouped 3d": (nn.Conv3d, {"kernel_size": 2, "groups": 2, "padding": 1}, (2, 4, 2, 3, 2)),
    "one image": (nn.Conv2d, {"kernel_size": 3}, (4, 5, 4)),
    "no images": (nn.Conv2d, {"kernel_size": 3}, (0, 4, 5, 4)),
}


def shaken(adaptation):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def changed(conv, t, magnitude=False):
    """W + B A group by group, in the layout of the weight, and rows brought to the lengths `m`."""
    W = conv.weight.detach()
    groups = conv.groups
    maps = W.reshape(groups, W.shape[0] // groups, -1)
    B, A = (f if groups > 1 else f[None] for f in (t["B"], t["A"]))
    V = torch.stack([maps[k] + B[k] @ A[k] for k in range(groups)])
    if magnitude:
        V = t["m"].reshape(groups, -1)[..., None] * V / V.detach().norm(dim=-1, keepdim=True)
    return V.reshape(W.shape)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("case", LAYERS)
def test_every_plan_is_the_convolution_with_the_changed_weight(case, method):
    kind, options, shape = LAYERS[case]
    conv = layer(kind, **options)
    pristine = copy.deepcopy(conv)
    model = nn.Sequential(conv)
    a = rf.adapt(model, method, rank=2, targets=["0"])
    shaken(a)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    leaves = {n.rpartition("/")[2]: t.detach().clone().requires_grad_() for n, t in a.tensors().items()}
    xd = x.clone().requires_grad_()
    weight = changed(pristine, leaves, method == "dora")
    expected = torch.func.functional_call(pristine, {"weight": weight}, (xd,))
    probe = torch.cos(torch.arange(expected.numel(), dtype=torch.float64)).view(expected.shape)
    grads = torch.autograd.grad((expected * probe).sum(), [xd, *leaves.values()])
    for plan, memory in RUNS:
        a.store.plan, a.store.memory = plan, memory
        xo = x.clone().requires_grad_()
        y = model(xo)
        own = torch.autograd.grad((y * probe).sum(), [xo, *a.tensors().values()])
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        for found, wanted in zip(own, grads):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    a.store.plan, a.store.memory = "auto", "auto"
    a.fold()
    torch.testing.assert_close(model(x), expected.detach(), rtol=1e-11, atol=1e-11)


def test_the_site_is_the_map_of_a_patch():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, (1, 3), groups=2), nn.Linear(3, 3))
    sites = {s.name: s for s in rf.adapt(copy.deepcopy(model), "lora", rank=1, targets="all").sites}
    assert (sites["0"].shape, sites["0"].batch) == ((6, 36), None)
    assert (sites["1"].shape, sites["1"].batch) == ((4, 9), 2)
    assert [s.name for s in rf.adapt(model, "lora", rank=1).sites] == [
        "2"
    ]  # "all-linear" leaves convolutions to whoever names them


def test_lora_never_forms_its_change():
    """Among the tensors that a step makes none is as large as the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    conv = nn.Conv2d(32, 64, 3, padding=1)
    model = nn.Sequential(conv)
    a = rf.adapt(model, "lora", rank=2, targets=["0"])
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            fresh = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            own = conv.weight.untyped_storage().data_ptr()
            sizes.extend(t.numel() for t in fresh if t.untyped_storage().data_ptr() != own and t.untyped_storage().nbytes() > 8)
            return out

    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    with Watch():
        a.model(x).sum().backward()
    assert max(sizes) < conv.weight.numel()
    sizes.clear()
    a.store.plan = "effective"
    with Watch():
        a.model(x).sum().backward()
    assert max(sizes) == conv.weight.numel()  # the watch sees what it looks for


def test_channels_last_stays():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    a = rf.adapt(model, "dora", rank=2, targets=["0"])
    shaken(a)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    a.fold()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), y.detach(), rtol=1e-5, atol=1e-5)


def test_dropout_is_one_draw_for_every_plan():
    """The image is dropped once for all the patches that see an entry, as peft's is."""
    model = nn.Sequential(layer(nn.Conv2d, kernel_size=3))
    a = rf.adapt(model, "dropout+lora", rank=2, p=0.5, targets=["0"])
    shaken(a)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    outputs = []
    for plan in ("fused", "structured", "plain"):
        a.store.plan = plan
        torch.manual_seed(0)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], model.eval()(x))


def test_u14_weighted_sums_of_convolution_adapters():
    for kind, shape in ((nn.Conv1d, (2, 4, 5)), (nn.Conv2d, (2, 4, 5, 5)), (nn.Conv3d, (2, 4, 3, 3, 3))):
        conv = layer(kind, kernel_size=2)
        pristine, model, x = copy.deepcopy(conv), nn.Sequential(conv), torch.randn(shape, dtype=torch.float64)
        a = rf.adapt(model, "lora", rank=2, targets=["0"], name="one")
        shaken(a)
        rf.adapt(model, "lora", rank=3, targets=["0"], name="two", seed=1)
        for p in a.parameters("two"):
            p.data.normal_()
        t = [{n.rpartition("/")[2]: v.detach() for n, v in a.tensors(name).items()} for name in ("one", "two")]
        W = pristine.weight.detach()
        whole = W + 0.5 * (changed(pristine, t[0]) - W) - 2.0 * (changed(pristine, t[1]) - W)
        a.use("one", "two", weight=[0.5, -2.0])
        torch.testing.assert_close(model(x), torch.func.functional_call(pristine, {"weight": whole}, (x,)))


@pytest.mark.parametrize(
    ("model", "target", "reason"),
    [
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), "0", "transposed convolution"),
        (nn.Sequential(nn.Conv2d(4, 6, 3)), "0[0:3]", "rows of a convolution"),
    ],
)
def test_what_can_not_be_adapted_is_refused_by_name(model, target, reason):
    with pytest.raises(TargetError, match=reason):
        rf.adapt(model, "lora", rank=1, targets=[target])


def test_gates_that_look_at_the_input_see_patches_and_are_refused_over_groups():
    conv = layer(nn.Conv2d, kernel_size=3, stride=2)
    pristine, model = copy.deepcopy(conv), nn.Sequential(conv)
    a = rf.adapt(model, "mixture", rank=2, experts=2, targets=["0"])
    shaken(a)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    t = {n.rpartition("/")[2]: v.detach() for n, v in a.tensors().items()}
    patches = nn.functional.unfold(x, 3, stride=2).mT  # [2, 4, 36]
    gate = (patches @ t["R"].mT).softmax(-1).repeat_interleave(2, -1)
    change = ((patches @ t["A"].mT) * gate) @ t["B"].mT
    torch.testing.assert_close(model(x), pristine(x) + change.mT.reshape(2, 6, 2, 2))
    a.store.plan = "effective"
    with pytest.raises(LayoutError, match="depends on the input"):
        model(x)
    with pytest.raises(TargetError, match="each map of a stack has its own"):
        rf.adapt(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "mixture", rank=2, targets=["0"])


def test_an_output_changed_in_place_is_said():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True))
    rf.adapt(model, "dora", rank=2, targets=["0"])
    with pytest.raises(LayoutError, match="in place"):
        model(torch.randn(2, 4, 5, 5)).sum().backward()


def test_eva_finds_the_directions_of_patches():
    """The leading directions of the patches, by one SVD of all of them; by groups, of each group's own."""
    for groups in (1, 2):
        model = nn.Sequential(layer(nn.Conv2d, kernel_size=2, groups=groups))
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64) * torch.tensor([9.0, 3.0, 7.0, 0.5], dtype=torch.float64)[:, None, None]
        a = rf.adapt(
            model, "eva", rank=2, rho=1, targets=["0"], batches=[x], loss=lambda m, b: m(b).square().mean(), iterations=0
        )
        A = next(t for n, t in a.tensors().items() if n.endswith("/A"))
        for k in range(groups):
            part = x[:, k * 4 // groups : (k + 1) * 4 // groups]
            rows = nn.functional.unfold(part, 2).mT.flatten(0, 1)
            Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
            own = A[k] if groups > 1 else A
            torch.testing.assert_close((own @ Vh.mT).abs(), torch.eye(2, dtype=torch.float64), rtol=1e-2, atol=2e-2)


def resnet():
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4
    )  # fmt: skip
    return hf.ResNetForImageClassification(config).train()


def kept(model, x):
    """Bytes that the graph holds for backward, each storage once, without parameters, buffers and the input."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x).logits
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    return sum(size for at, size in seen.items() if at not in own), y


@pytest.mark.parametrize(("method", "allowed"), [("lora", 1.10), ("dora", 1.10), ("hira", 1.01)])
def test_u6_adapters_over_a_convnet_keep_bytes(method, allowed):
    """The floor is the frozen net with a gradient through it; here peft's DoRA keeps 1.77 of it."""
    floor_model, x = resnet(), torch.randn(4, 3, 32, 32, requires_grad=True)
    for p in floor_model.parameters():
        p.requires_grad_(False)
    floor, _ = kept(floor_model, x)
    model = resnet()
    a = rf.adapt(model, method, rank=4, targets=["*convolution"], exclude=["*embedder.embedder.convolution"])
    shaken(a)
    assert len(a.sites) >= 5
    found, y = kept(model, x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in a.parameters())
    assert found <= allowed * floor, f"{found / floor:.3f} of the floor"
