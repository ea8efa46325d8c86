"""Stacked experts of transformers 5 as sites: every plan against W' put into the library's own module, in float64."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import rankfold as rf
from rankfold.errors import InactiveError, LayoutError, TargetError

RUNS = [
    ("auto", "auto"),
    ("fused", "auto"),
    ("structured", "keep"),
    ("structured", "recompute"),
    ("effective", "auto"),
    ("plain", "auto"),
]
SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)


def moe(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, intermediate_size=12, num_local_experts=4))
    elif kind == "qwen3-moe":
        config = hf.Qwen3MoeConfig(**SMALL, intermediate_size=24, moe_intermediate_size=12, num_experts=4, head_dim=8)
        model = hf.Qwen3MoeForCausalLM(config)
    else:  # hidden and intermediate size are equal, as in the released models: only the flag tells how W lies
        config = hf.GptOssConfig(
            **SMALL, intermediate_size=16, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2
        )  # fmt: skip
        model = hf.GptOssForCausalLM(config)
        for name, p in model.named_parameters():  # the library starts biases at zero
            if name.endswith("_bias") or ".router." in name:
                nn.init.normal_(p, std=0.3)
    return model.eval()


MODELS = ["mixtral", "qwen3-moe", "gpt-oss"]


def experts_of(kind, implementation="eager"):
    """One module of experts in float64 with a call of its own: (module, hidden, index, weights); expert 3 gets no token."""
    model = moe(kind).double()
    model.set_experts_implementation(implementation)
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [0, 1], [0, 2]])
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    return module, hidden, index, weights


def shaken(adaptation):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def changed(module, param, t, method):
    """W' expert by expert from the formula, in the layout of the parameter."""
    stored = module._parameters[param].detach()
    maps = []
    for k in range(len(stored)):
        W = stored[k].T if module.is_transposed else stored[k]
        V = W + t["B"][k] @ t["A"][k]
        if method == "hira":
            V = W + W * (t["B"][k] @ t["A"][k])
        if method == "dora":
            V = t["m"][k][:, None] * V / V.detach().norm(dim=1, keepdim=True)
        maps.append(V.T if module.is_transposed else V)
    return torch.stack(maps)


@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_plan_is_the_library_with_the_changed_weights(kind, method):
    module, hidden, index, weights = experts_of(kind)
    pristine = copy.deepcopy(module)
    model = nn.ModuleDict({"experts": module})
    model.forward = lambda *args: model["experts"](*args)
    a = rf.adapt(model, method, rank=2)  # "all-linear" takes both
    assert [s.key for s in a.sites] == ["experts.gate_up_proj", "experts.down_proj"]
    shaken(a)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in a.tensors().items()}
    own = {p: {n.rpartition("/")[2]: t for n, t in leaves.items() if f"experts.{p}/" in n} for p in ("gate_up_proj", "down_proj")}
    values = {p: changed(pristine, p, t, method) for p, t in own.items()}
    xd, wd = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = torch.func.functional_call(pristine, values, (xd, index, wd))
    probe = torch.cos(torch.arange(expected.numel(), dtype=torch.float64)).view(expected.shape)
    grads = torch.autograd.grad((expected * probe).sum(), [xd, wd, *leaves.values()])
    for plan, memory in RUNS:
        a.store.plan, a.store.memory = plan, memory
        xo, wo = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        try:
            y = model(xo, index, wo)
        except LayoutError:
            assert (method, plan) == ("hira", "fused")
            continue
        found = torch.autograd.grad((y * probe).sum(), [xo, wo, *a.tensors().values()])
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        for ours, theirs in zip(found, grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for gradient in found[2:]:
        assert gradient[0].abs().max() > 0
        assert gradient[3].abs().max() == 0  # nobody sent a token there
    a.store.plan, a.store.memory = "auto", "auto"
    a.fold()
    torch.testing.assert_close(model(hidden, index, weights), expected.detach(), rtol=1e-11, atol=1e-11)
    a.unfold()
    with a.disabled():
        assert torch.equal(model(hidden, index, weights), pristine(hidden, index, weights))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_library_s_implementations_agree_with_ours_at_the_start(implementation):
    for kind in MODELS:
        model = moe(kind)
        model.set_experts_implementation(implementation)
        before = model(IDS).logits.detach()
        a = rf.adapt(model, "lora", rank=2, targets=["*experts*"])
        torch.testing.assert_close(model(IDS).logits.detach(), before, rtol=1e-4, atol=1e-5)
        with a.disabled():
            assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", MODELS)
def test_ours_is_in_the_library_s_registry(kind):
    """experts_implementation="rankfold": the plain products where no adapter is on, the changed ones where one is."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = moe(kind)
    a = rf.adapt(model, "lora", rank=2, targets=["*experts*"])
    assert "rankfold" in ALL_EXPERTS_FUNCTIONS
    shaken(a)
    changed_ = model(IDS).logits.detach()
    outputs = {}
    for implementation in ("eager", "rankfold"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(IDS).logits, changed_)  # the host runs, whatever the configuration names
        with a.disabled():
            outputs[implementation] = model(IDS).logits.detach()
        plain = moe(kind)
        plain.set_experts_implementation(implementation)
        assert torch.equal(plain(IDS).logits, outputs[implementation])
    assert not torch.equal(outputs["rankfold"], changed_)
    torch.testing.assert_close(outputs["rankfold"], outputs["eager"], rtol=1e-4, atol=1e-5)
    config = copy.deepcopy(model.config)
    assert config._experts_implementation == "rankfold"
    assert torch.isfinite(type(model)(config)(IDS).logits).all()


@pytest.mark.parametrize("kind", MODELS)
def test_our_implementation_is_the_library_s_with_its_gradients(kind):
    from rankfold.core.kinds.experts import implementation

    module, hidden, index, weights = experts_of(kind)
    for p in module.parameters():
        p.requires_grad_(True)
    grads = []
    for run in (type(module).forward, implementation):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        y = run(module, x, index, w)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, w, *module.parameters()])])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    module._is_expert_parallel = True
    with pytest.raises(LayoutError, match="grouped_mm"):
        implementation(module, hidden, index, weights)


@pytest.mark.parametrize("method", ["lora", "pissa"])
@pytest.mark.parametrize("kind", MODELS)
def test_no_step_asks_how_many_tokens_an_expert_got(kind, method, monkeypatch):
    """Sizes stay on the device: nothing waits for it, forward or backward."""
    module, hidden, index, weights = experts_of(kind)
    module, hidden, weights = module.float(), hidden.float().requires_grad_(), weights.float()
    model = nn.ModuleDict({"experts": module})
    a = rf.adapt(model, method, rank=4)

    def asked(self, *args):
        raise AssertionError("asked for a value")

    for name in ("nonzero", "__bool__", "item", "tolist", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    module(hidden, index, weights).sum().backward()
    monkeypatch.undo()
    assert all(p.grad is not None for p in a.parameters())
    monkeypatch.setattr(torch.Tensor, "tolist", asked)
    with pytest.raises(AssertionError, match="asked for a value"):  # in float64 torch has no grouped product
        module.double()(hidden.double(), index, weights.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_torch_s_grouped_product_is_the_loop(kind, dtype, monkeypatch):
    """Output and every gradient of an adapted block, router included, by grouped products and by the loop over experts."""
    from rankfold.core.kinds import experts
    from rankfold.kernels.grouped import looped_outer, looped_product

    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    model = moe(kind).to(dtype)
    a = rf.adapt(model, "dora", rank=3, targets=["*layers.0.mlp.experts*"])  # a rank that torch's rows don't allow
    shaken(a)
    block, found = model.model.layers[0].mlp, []
    for looped in (False, True):
        if looped:
            monkeypatch.setattr(experts, "grouped_product", looped_product)
            monkeypatch.setattr(experts, "grouped_outer", looped_outer)
        x = torch.sin(torch.arange(2 * 12 * 16).view(2, 12, 16)).to(dtype).requires_grad_()
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        found.append([y, *torch.autograd.grad(y.float().square().mean(), [x, *a.parameters()])])
    for ours, by_loop in zip(*found):
        torch.testing.assert_close(ours, by_loop, **near)


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapted_block_is_one_graph_whatever_its_router_chooses(kind):
    """Router, experts and their adapters, forward and backward; tokens that go elsewhere compile nothing anew."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = moe(kind)
    a = rf.adapt(model, "lora", rank=4, targets=["*layers.0.mlp.experts*"])
    shaken(a)
    block, counter, chosen = model.model.layers[0].mlp, CompileCounterWithBackend("aot_eager"), []
    hook = block.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))

    def outcome(run, start):
        x = torch.sin(torch.arange(start, start + 2 * 12 * 16).view(2, 12, 16)).requires_grad_()
        y = run(x)
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad(y.square().mean(), [x, *(p for n, p in a.tensors().items() if "layers.0." in n)])]

    expected = [outcome(block, start) for start in (0, 1000)]
    hook.remove()
    assert not torch.equal(*chosen)
    run = torch.compile(block, backend=counter, fullgraph=True)
    for start, theirs in zip((0, 1000), expected):
        for found, one in zip(outcome(run, start), theirs):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", MODELS)
def test_routers_are_left_out(kind):
    """Neither "all-linear" nor "all" takes what chooses the experts, and it stays frozen: no gradient reaches it."""
    for targets in ("all-linear", "all"):
        model = moe(kind)
        routers = {
            n: p for n, p in model.named_parameters() if ".router." in n or n.endswith(("mlp.gate.weight", "mlp.gate.bias"))
        }
        assert routers
        a = rf.adapt(model, "lora", rank=2, targets=targets)
        assert any("experts" in s.key for s in a.sites)
        assert not any(n.startswith(s.module + ".") and n.count(".") == s.module.count(".") + 1 for n in routers for s in a.sites)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in routers.values())


def test_lora_never_forms_its_change():
    """Among the tensors that a step makes none is as large as the stacked weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = moe("mixtral")
    module = model.model.layers[0].mlp.experts
    a = rf.adapt(model, "lora", rank=2, targets=["layers.0.mlp.experts.down_proj"])
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() not in own)
            return out

    hidden = torch.randn(3, 16, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.rand(3, 2)
    for plan, largest in (("auto", False), ("effective", True)):
        a.store.plan = plan
        sizes.clear()
        with Watch():
            module(hidden, index, weights).sum().backward()
        assert (max(sizes) >= module.down_proj.numel()) is largest


@pytest.mark.parametrize("kind", MODELS)
def test_u3_experts_are_trained_and_reported(kind):
    """Other tools train the attention alone and say nothing: here every stack is a site, gets a gradient, and is listed."""
    model = moe(kind)
    experts = [f"model.layers.{k}.mlp.experts.{p}" for k in range(2) for p in ("gate_up_proj", "down_proj")]
    batches = [{"input_ids": IDS, "labels": IDS}]
    a = rf.adapt(model, "lora", rank=2, batches=batches, loss=lambda m, b: m(**b).loss)
    keys = [s.key for s in a.sites]
    assert [k for k in keys if "experts" in k] == experts
    assert not any("router" in k or k.endswith(".gate") for k in keys)  # routers are left to whoever names them
    assert {row["site"]: row["plan"] for row in rf.explain(model)} == dict.fromkeys(keys, "fused")
    optimizer = a.optimizer(lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(**batches[0]).loss
        loss.backward()
        for key in experts:
            B = next(t for n, t in a.tensors().items() if f"/{key}/B" in n)
            assert B.grad is not None, key
            assert B.grad.abs().max() > 0, key
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


def test_an_expert_that_no_token_reaches_keeps_its_site(tmp_path):
    """The probe looks for a gradient of the stack, not of each expert."""
    module, hidden, index, weights = experts_of("mixtral")
    model = nn.ModuleDict({"experts": module})
    model.forward = lambda *args: model["experts"](*args)
    loss = lambda m, b: m(*b).square().mean()
    a = rf.adapt(model, "lora", rank=2, batches=[(hidden, index, weights)], loss=loss, targets=["*experts*"])
    assert len(a.sites) == 2
    shaken(a)
    y = model(hidden, index, weights)
    a.save(tmp_path)
    fresh, *_ = experts_of("mixtral")
    again = nn.ModuleDict({"experts": fresh})
    again.forward = lambda *args: again["experts"](*args)
    rf.load(again, tmp_path)
    assert torch.equal(again(hidden, index, weights), y)


def test_data_driven_inits_see_each_expert_s_own_tokens():
    """EVA's directions are those of the rows that an expert gets, also behind the gate; without any it starts by LoRA's law."""
    module, hidden, index, weights = experts_of("mixtral")
    pristine = copy.deepcopy(module)
    model = nn.ModuleDict({"experts": module})
    model.forward = lambda *args: model["experts"](*args)
    loss = lambda m, b: m(*b).square().mean()
    batch = (hidden, index, weights)
    a = rf.adapt(model, "eva", rank=2, rho=1, center=False, batches=[batch], loss=loss, iterations=0, targets=["*experts*"])
    first, second = (t for n, t in a.tensors().items() if n.endswith("/A"))
    for k in range(3):
        rows = hidden[(index == k).any(1)]
        inner = pristine._apply_gate(rows @ pristine.gate_up_proj[k].T)
        for A, seen in ((first, rows), (second, inner)):
            Vh = torch.linalg.svd(seen.detach(), full_matrices=False)[2][:2]
            torch.testing.assert_close((A[k] @ Vh.mT).abs(), torch.eye(2, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert first[3].abs().max() <= 16**-0.5
    assert first[3].abs().min() > 0
    assert all((t == 0).all() for n, t in a.tensors().items() if n.endswith("/B"))


def test_lora_ga_takes_each_expert_s_own_gradient():
    module, hidden, index, weights = experts_of("gpt-oss")
    pristine = copy.deepcopy(module)
    for p in pristine.parameters():
        p.requires_grad_(True)
    loss = lambda m, b: m(*b).square().mean()
    loss(pristine, (hidden, index, weights)).backward()
    model = nn.ModuleDict({"experts": module})
    model.forward = lambda *args: model["experts"](*args)
    a = rf.adapt(model, "lora-ga", rank=2, batches=[(hidden, index, weights)], loss=loss, **{"init.scaling": "unit"})
    for param in ("gate_up_proj", "down_proj"):
        A = next(t for n, t in a.tensors().items() if f"{param}/A" in n and n.endswith("/A"))
        for k in range(3):
            Vh = torch.linalg.svd(pristine._parameters[param].grad[k].T)[2][:2]
            torch.testing.assert_close((A[k].double() @ Vh.mT).abs(), torch.eye(2, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_padding_is_left_out_of_what_experts_see():
    from rankfold.core.kinds import kind_named

    module, hidden, index, weights = experts_of("mixtral")
    site = rf.adapt(nn.ModuleDict({"experts": module}), "lora", rank=1).sites[0]
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 1]).bool()
    rows = kind_named(site.kind).inputs(module, site, (hidden, index, weights), {}, lambda lead: mask)
    assert [len(r) for r in rows] == [int((index[mask] == k).sum()) for k in range(4)]
    assert torch.equal(rows[2], hidden[mask & (index == 2).any(1)])


def test_what_can_not_be_adapted_is_refused_by_name():
    with pytest.raises(TargetError, match="each map of a stack has its own"):
        rf.adapt(moe("mixtral"), "mixture", rank=2, targets=["*experts*"])
    with pytest.raises(TargetError, match="rows of experts"):
        rf.adapt(moe("mixtral"), "lora", rank=2, targets=["layers.0.mlp.experts.gate_up_proj[0:4]"])
    model = moe("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match="spread over processes"):
        rf.adapt(model, "lora", rank=2, targets=["layers.0.mlp.experts.down_proj"])


def test_experts_that_are_never_called_are_said():
    module, hidden, *_ = experts_of("mixtral")
    model = nn.ModuleDict({"experts": module, "other": nn.Linear(16, 16).double()})
    model.forward = lambda x: model["other"](x)
    rf.adapt(model, "lora", rank=2)
    with pytest.raises(InactiveError, match="gate_up_proj"):
        model(hidden)
