"""nn.MultiheadAttention and torch's fused encoder: the library's own forward runs on W', fused call included."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core.kinds import kind_named
from rankfold.core.targets import find_sites
from rankfold.errors import InactiveError, LayoutError, TargetError


def shake(adaptation, std=0.3):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=std, generator=torch.Generator().manual_seed(k))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, *args, **kwargs):
        y, weights = self.attn(*args, **kwargs)
        return (self.head(y), weights) if weights is not None else self.head(y)


def attention(**options):
    torch.manual_seed(0)
    model = Attention(**options).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_definition(model, adaptation):
    """A copy of the model with W' written in its weights, made of the structure's expression."""
    weights = {name: W.clone() for name, W in adaptation.folded_weights().items()}
    extras = {e.name: adaptation.store.tensor(e.key) for e in adaptation.attached["default"].member.extras.values()}
    state = {k: v.clone() for k, v in model.state_dict().items()} | weights | extras
    plain = copy.deepcopy(model)
    rf.adaptation(plain).remove()
    plain.load_state_dict(state)
    return plain.requires_grad_(False)


CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
    {"attn_mask": torch.triu(torch.ones(3, 3, dtype=torch.bool), 1), "need_weights": False, "is_causal": True},
]

WAYS = [*(({"batch_first": True}, call) for call in CALLS), ({"bias": False}, CALLS[1]), ({"add_bias_kv": True}, {})]


@pytest.mark.parametrize(("options", "call"), WAYS)
@pytest.mark.parametrize("method", ["lora", "dora", "hra", "full"])
def test_every_way_of_calling_is_the_definition(method, options, call):
    model = attention(**options)
    x = tokens(2, 3, 8) if options.get("batch_first") else tokens(3, 2, 8)
    a = rf.adapt(model, method, **({} if method == "full" else {"rank": 2}))
    assert {s.key for s in a.sites} == {"attn.in_proj_weight", "attn.out_proj", "head"}
    shake(a)
    plain = by_definition(model, a)
    for training, grad in itertools.product([True, False], repeat=2):
        model.train(training)
        plain.train(training)
        with torch.set_grad_enabled(grad):
            found, expected = model(x, x, x, **call), plain(x, x, x, **call)
        pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
        for y, y0 in pairs:
            torch.testing.assert_close(y, y0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", ["auto", "effective", "plain"])
def test_gradients_are_those_of_the_written_weight(plan):
    model, x = attention(batch_first=True), tokens(2, 3, 8)
    a = rf.adapt(model, "magnitude+lora", rank=2, targets=["*_proj_weight", "out_proj"], plan=plan)
    shake(a)
    model(x, x, x, need_weights=False).square().sum().backward()
    found = {k: p.grad.clone() for k, p in a.tensors().items() if p.requires_grad}
    expressions = {}
    for slot in a.slots():
        t = type(slot.t(a.store))(*(v.detach().clone().requires_grad_() for v in slot.t(a.store)))
        expressions[slot.site.weight] = (slot, t, slot.weight(t).dense())
    with a.disabled():
        y = torch.func.functional_call(model, {n: W for n, (_, _, W) in expressions.items()}, (x, x, x), {"need_weights": False})
    y.square().sum().backward()
    for slot, t, _ in expressions.values():
        for field, (key, _) in slot.binding.items():
            torch.testing.assert_close(found[key], getattr(t, field).grad, rtol=1e-9, atol=1e-11)


def test_rows_of_the_fused_projection_leave_the_others_alone():
    model, x = attention(batch_first=True), tokens(2, 3, 8)
    a = rf.adapt(model, "lora", rank=2, targets=["in_proj_weight[q]", "in_proj_weight[v]"])
    assert [s.key for s in a.sites] == ["attn.in_proj_weight[0:8]", "attn.in_proj_weight[16:24]"]
    shake(a)
    W, W1 = model.attn.in_proj_weight, a.folded_weights()["attn.in_proj_weight"]
    assert torch.equal(W1[8:16], W[8:16])
    assert not torch.allclose(W1[:8], W[:8])
    torch.testing.assert_close(model(x, x, x)[0], by_definition(model, a)(x, x, x)[0], rtol=1e-10, atol=1e-12)


def test_projections_of_their_own_widths():
    model, q, k, v = (
        attention(batch_first=True, kdim=6, vdim=5),
        tokens(2, 3, 8),
        tokens(2, 4, 6, seed=1),
        tokens(2, 4, 5, seed=2),
    )
    a = rf.adapt(model, "lora", rank=2)
    assert {s.key: s.shape for s in a.sites} == {
        "attn.q_proj_weight": (8, 8),
        "attn.k_proj_weight": (8, 6),
        "attn.v_proj_weight": (8, 5),
        "attn.out_proj": (8, 8),
        "head": (4, 8),
    }
    shake(a)
    torch.testing.assert_close(model(q, k, v)[0], by_definition(model, a)(q, k, v)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_init_sees_what_each_projection_multiplies(adapted):
    """The input of the output projection, which no call shows, is the module's output with the identity in its place."""
    model, q, k = attention(batch_first=True).eval(), tokens(2, 3, 8), tokens(2, 4, 8, seed=1)
    sites = {s.key: s for s in find_sites(model, ["attn.in_proj_weight[k]", "attn.out_proj"])}
    if adapted:
        shake(rf.adapt(model, "lora", rank=2, targets=["attn.*"]))
    see = lambda key: kind_named("multihead").inputs(model.attn, sites[key], (q, k), {"value": k}, lambda lead: None)
    assert torch.equal(see("attn.in_proj_weight[8:16]"), k.reshape(-1, 8))
    with torch.no_grad():
        h, y = see("attn.out_proj"), model.attn(q, k, k)[0].reshape(-1, 8)
        W = rf.adaptation(model).folded_weights()["attn.out_proj.weight"] if adapted else model.attn.out_proj.weight
        torch.testing.assert_close(h @ W.mT + model.attn.out_proj.bias, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["mixture", "dropout+lora"])
def test_what_differs_from_call_to_call_is_refused_by_name(method):
    with pytest.raises(TargetError, match=r"attn\.in_proj_weight.*one weight"):
        rf.adapt(attention(), method, rank=2, targets=["attn.in_proj_weight"])


def test_plans_that_need_a_product_are_refused():
    model, x = attention(batch_first=True), tokens(2, 3, 8)
    a = rf.adapt(model, "lora", rank=2, targets=["out_proj"])
    a.store.plan = "fused"
    with pytest.raises(LayoutError, match="takes its weights whole"):
        model(x, x, x)


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(TargetError, match="forward of its own"):
        rf.adapt(nn.ModuleDict({"attn": Own(8, 2)}), "lora", rank=2, targets=["out_proj"])


def test_a_weight_that_others_read_is_noticed():
    class Outside(Attention):
        def forward(self, x):
            return nn.functional.multi_head_attention_forward(
                x, x, x, 8, 2, self.attn.in_proj_weight, self.attn.in_proj_bias, None, None, False, 0.0,
                self.attn.out_proj.weight, self.attn.out_proj.bias,
            )[0]  # fmt: skip

    model = Outside()
    rf.adapt(model, "lora", rank=2, targets=["attn.*"])
    with pytest.raises(InactiveError, match=r"attn\.in_proj_weight"):
        model(torch.randn(3, 2, 8))


# torch's own encoder


def encoder(nested=True, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=nested).eval()


# torch's own encoder makes nested tensors and warns of them; it is also a warning at every fresh interpreter's first time
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
PAD = torch.tensor([[False, False, False, False], [False, False, True, True]])


@pytest.mark.parametrize("targets", ["all-linear", ["*.out_proj"], ["*.linear2"], ["*.in_proj_weight"]])
@pytest.mark.parametrize("mask", [None, PAD], ids=["whole", "padded"])
def test_the_fused_encoder_uses_every_site(mask, targets):
    model, x = encoder(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
        a = rf.adapt(model, "lora", rank=2, targets=targets)
        shake(a)
        plain = by_definition(model, a)
        y = model(x, src_key_padding_mask=mask)
        keep = ~PAD if mask is not None else torch.ones(2, 4, dtype=torch.bool)
        torch.testing.assert_close(y[keep], plain(x, src_key_padding_mask=mask)[keep], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y[keep], base[keep], atol=1e-2)
        with a.disabled():
            assert torch.equal(model(x, src_key_padding_mask=mask), base)  # by the fused call, as before
        a.fold()
        assert torch.equal(model(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask))
        a.unfold()
    torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep].detach(), y[keep], rtol=1e-4, atol=1e-5)
    a.remove()
    assert type(model) is nn.TransformerEncoder
    assert all("_rankfold" not in m.__dict__ for m in model.modules())


def test_the_bias_of_the_output_projection_trains():
    model, x = encoder(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    a = rf.adapt(model, "lora", rank=2, targets=["*.linear1"], extras=["*.out_proj.bias", "*.in_proj_bias"])
    model.train()(x).square().sum().backward()
    extras = a.attached["default"].member.extras.values()
    assert len(extras) == 4
    assert all(a.store.tensor(e.key).grad.abs().sum() > 0 for e in extras)
    shake(a)
    torch.testing.assert_close(model.eval()(x), by_definition(model, a)(x), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_files(tmp_path):
    model, x = encoder(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    a = rf.adapt(model, "lora", rank=2)
    shake(a)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    folder = a.save(tmp_path / "a")
    assert torch.equal(rf.load(encoder(), folder).model(x), y)


def test_a_second_adapter_adds_its_change():
    model, x = attention(batch_first=True), tokens(2, 3, 8)
    a = rf.adapt(model, "lora", rank=2, targets=["attn.*"], name="one")
    shake(a)
    b = rf.adapt(model, "dora", rank=2, targets=["attn.*"], name="two")
    for p in b.parameters("two"):
        p.data += 0.1
    b.use("one", "two", weight=[1.0, 0.5])
    live = model(x, x, x)[0]
    b.fold()
    torch.testing.assert_close(model(x, x, x)[0], live, rtol=1e-10, atol=1e-12)


def test_half_precision_and_autocast():
    model, x = attention(batch_first=True).float(), tokens(2, 3, 8).float()
    a = rf.adapt(model, "dora", rank=2)
    shake(a, 0.1)
    exact = model(x, x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x, x, x)[0]
    rough.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in a.parameters())
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    half = model.bfloat16()
    assert half(x.bfloat16(), x.bfloat16(), x.bfloat16())[0].dtype == torch.bfloat16
