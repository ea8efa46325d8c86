"""The hot products as operators of torch's library: torch's own check, the definition in float64, and graphs that hold them."""

import io

import pytest
import torch

import rankfold as rf
from rankfold.kernels import operators, paths

FORMS = ["reference", "triton"]
DROPS = [(0.0, None), (0.25, 2**61 + 3)]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms on this machine: Triton's by its interpreter."""
    if request.param == "triton":
        on_triton(monkeypatch)
    return request.param


def on_triton(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("not interpreted here")
    monkeypatch.setattr(paths, "COMPILED_FOR", frozenset({"cpu"}))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def near(found, expected, tolerance=1e-5):
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm().clamp_min(1e-30)


def trains(*tensors):
    return [t.requires_grad_() for t in tensors]


def sample(drop, dtype=torch.float32, lead=(2, 3)):
    x, bias, B, A = trains(normal(*lead, 5), normal(7), normal(7, 2), normal(2, 5))
    p, seed = drop
    return [x.to(dtype), normal(7, 5).to(dtype), bias, B, A, 0.5, p, None if seed is None else torch.tensor(seed)]


@pytest.mark.parametrize("drop", DROPS, ids=["whole", "dropout"])
def test_lowrank_obeys_the_rules_of_library_operators(form, drop):
    torch.library.opcheck(torch.ops.rankfold.lowrank_product.default, tuple(sample(drop)))


@pytest.mark.parametrize("drop", DROPS, ids=["whole", "dropout"])
def test_magnitude_obeys_the_rules_of_library_operators(form, drop):
    x, W, bias, B, A, scale, p, seed = sample(drop)
    (m,) = trains(normal(7).abs() + 1.0)
    norm = W.norm(dim=1)
    torch.library.opcheck(torch.ops.rankfold.magnitude_product.default, (x, W, bias, m, norm, B, A, scale, p, seed))


def test_norms_and_rows_obey_the_rules_of_library_operators(form):
    W, B, A = normal(7, 5), normal(7, 2), normal(2, 5)
    torch.library.opcheck(torch.ops.rankfold.row_norms.default, (W, W.square().sum(1), B, A, 0.5, 1e-12))
    (x,) = trains(normal(3, 2, 5))
    factors = normal(8, 8, 5), normal(8, 8, 7)
    torch.library.opcheck(torch.ops.rankfold.gathered.default, (x, *factors, torch.tensor([3, 0, 1]), 2))


@pytest.mark.parametrize("drop", DROPS, ids=["whole", "dropout"])
def test_lowrank_and_magnitude_are_their_definition(form, drop):
    """Output and every gradient by autograd in float64; W's too, where somebody asks for it."""
    x, W, bias, B, A, scale, p, seed = sample(drop)
    m, W = trains(normal(7).abs() + 1.0, W)
    g, leaves = normal(2, 3, 7, seed=9), (x, W, bias, B, A)
    z = 1.0 if seed is None else operators.lowrank_product(
        torch.ones_like(x), torch.zeros(5, 5), None, torch.eye(5), torch.eye(5), 1.0, p, seed
    )[0].double()  # fmt: skip
    x64, W64, bias64, B64, A64, m64 = (t.detach().double().requires_grad_() for t in (*leaves, m))
    u64 = x64 @ W64.mT + scale * (z * x64) @ (B64 @ A64).mT
    y = operators.lowrank_product(x, W, bias, B, A, scale, p, seed)[0]
    near(y.detach(), (u64 + bias64).detach())
    expected = torch.autograd.grad(u64 + bias64, (x64, W64, bias64, B64, A64), g.double(), retain_graph=True)
    for one, other in zip(torch.autograd.grad(y, leaves, g), expected):
        near(one, other)
    norm = operators.row_norms(W.detach(), W.detach().square().sum(1), B.detach(), A.detach(), scale, 1e-12)
    near(norm, (W64 + scale * B64 @ A64).detach().norm(dim=1))
    y = operators.magnitude_product(x, W.detach(), bias, m, norm, B, A, scale, p, seed)[0]
    y64 = m64 / norm.double() * u64 + bias64
    near(y.detach(), y64.detach())
    expected = torch.autograd.grad(y64, (x64, bias64, m64, B64, A64), g.double())
    for one, other in zip(torch.autograd.grad(y, (x, bias, m, B, A), g), expected):
        near(one, other)


def adapted(method, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 18))
    adaptation = rf.adapt(model, method, rank=4, **options)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, adaptation


class Seen:
    """A backend that writes down which operators of ours its graphs hold."""

    def __init__(self):
        self.names, self.graphs = [], 0

    def __call__(self, graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        self.graphs += 1
        return aot_autograd(fw_compiler=self.read(make_boxed_func), bw_compiler=self.read(make_boxed_func))(graph, inputs)

    def read(self, boxed):
        def compiler(graph, inputs):
            self.names += [str(n.target).split(".")[1] for n in graph.graph.nodes if str(n.target).startswith("rankfold.")]
            return boxed(graph.forward)

        return compiler


EXPECTED = {
    "lora": {"lowrank_product", "lowrank_pull"},
    "magnitude+lora+init:pissa": {"row_norms", "magnitude_product", "magnitude_pull"},
    "dora": {"row_norms", "magnitude_product", "magnitude_pull"},
    "dropout+lora": {"lowrank_product", "lowrank_pull"},
}


@pytest.mark.parametrize("method", EXPECTED)
def test_a_graph_holds_them_forward_and_backward(method, monkeypatch):
    """fullgraph, on a device with kernels: one node for each site, and the same function with the same gradients."""
    on_triton(monkeypatch)
    torch._dynamo.reset()
    model, adaptation = adapted(method, **({"p": 0.3} if "dropout" in method else {}))
    x, g, seen = normal(3, 7, 20).requires_grad_(), normal(3, 7, 18), Seen()

    def outcome(run):
        torch.manual_seed(5)
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *adaptation.parameters()], g)]

    found = outcome(torch.compile(model, backend=seen, fullgraph=True))
    assert seen.graphs == 1
    assert set(seen.names) == EXPECTED[method]
    assert len(seen.names) == 2 * len(EXPECTED[method])
    for one, other in zip(found, outcome(model)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_program_is_saved_and_read_again(method, form, monkeypatch):
    if form == "triton":
        on_triton(monkeypatch)
    model, _ = adapted(method)
    model.eval()
    x, other = normal(3, 20), normal(3, 20, seed=4)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        expected = model(other)
    held = {str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("rankfold.")}
    assert held == (EXPECTED[method] - {"lowrank_pull", "magnitude_pull"} if form == "triton" else set())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    torch.testing.assert_close(again.module()(other), expected, rtol=1e-5, atol=1e-6)
