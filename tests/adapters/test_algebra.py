"""Each function of the algebra against dense changes in float64: linear in Δ, whatever the factors, ranks and scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.adapters import Adapter, Entry, algebra
from rankfold.errors import CompositionError, OptionError
from rankfold.linalg import Dense

SHAPES = {"layers.0.q": (5, 7), "layers.0.k": (3, 7), "embed": (4, 9)}


def make(
    seed: int, ranks: tuple[int, int, int] = (2, 3, 1), scale: float = 1.5, dtype=torch.float32, sites=tuple(SHAPES)
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for (name, (out, in_)), rank in zip(SHAPES.items(), ranks):
        B, A = torch.randn(out, rank, generator=generator).to(dtype), torch.randn(rank, in_, generator=generator).to(dtype)
        if name in sites:
            entries.append(Entry(name, B, A, scale, "embedding" if name == "embed" else "linear"))
    return Adapter.of(entries, {"head.weight": torch.full((2, 2), float(seed))}, {"seed": seed})


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """s · B A in float64; zero where the adapter has no entry."""
    out = {k: torch.zeros(shape, dtype=torch.float64) for k, shape in SHAPES.items()}
    for k, e in adapter.entries.items():
        out[k] = e.scale * (e.B.double() @ e.A.double())
    return out


def same(adapter: Adapter, want: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for k, got in dense(adapter).items():
        torch.testing.assert_close(got, want[k], rtol=tolerance, atol=tolerance)


def combine(adapters, weights):
    ds = [dense(a) for a in adapters]
    return {k: sum(w * d[k] for w, d in zip(weights, ds)) for k in SHAPES}


def test_scale_keeps_the_bytes():
    a = make(1)
    got = algebra.scale(a, -2.0)
    same(got, combine([a], [-2.0]), 1e-12)
    assert got.entries["layers.0.q"].B is a.entries["layers.0.q"].B


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3], [0.0, 2.0]])
def test_a_linear_merge_is_the_weighted_sum_of_the_changes(weights):
    """Not the product of merged factors, which has cross terms."""
    a, b = make(1), make(2)
    got = algebra.add(a, b, weights=weights, extras="first")
    same(got, combine([a, b], weights))
    B = sum(w * e.B for w, e in zip(weights, (a.entries["layers.0.q"], b.entries["layers.0.q"])))
    A = sum(w * e.A for w, e in zip(weights, (a.entries["layers.0.q"], b.entries["layers.0.q"])))
    crossed = 1.5 * B.double() @ A.double()
    assert not torch.allclose(crossed, combine([a, b], weights)["layers.0.q"], rtol=0.1), "averaging the factors is another thing"


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_mean_of_an_adapter_with_itself_is_itself(rank):
    """Scales of the form alpha / √r must not come out √r too large."""
    B, A = torch.randn(32, rank), torch.randn(rank, 20)
    a = Adapter.of([Entry("q", B, A, scale=16 / math.sqrt(rank))])
    for got in (algebra.average(a, a), algebra.average(a, a, a, weights=[1, 2, 5]), algebra.add(a, a, weights=[0.25, 0.75])):
        e = got.entries["q"]
        want = 16 / math.sqrt(rank) * B.double() @ A.double()
        torch.testing.assert_close(e.scale * e.B.double() @ e.A.double(), want, rtol=1e-5, atol=1e-5)


def test_ranks_and_scales_differ_by_site_and_adapter():
    a, b, c = make(1, (2, 3, 1), 1.5), make(2, (1, 1, 4), 0.25), make(3, (5, 0, 2), -2.0)
    got = algebra.add(a, b, c, weights=[1, 2, 3], extras="first")
    same(got, combine([a, b, c], [1, 2, 3]))
    assert got.ranks == {"layers.0.q": 8, "layers.0.k": 4, "embed": 7}


def test_sites_that_only_one_has():
    a, b = make(1, sites=("layers.0.q",)), make(2, sites=("layers.0.k", "embed"))
    same(algebra.add(a, b, extras="first"), combine([a, b], [1, 1]))
    same(algebra.average(a, b, extras="first"), combine([a, b], [0.5, 0.5]))


def test_equal_scales_keep_bytes_and_dtype():
    a, b = make(1, dtype=torch.bfloat16), make(2, dtype=torch.bfloat16)
    e = algebra.add(a, b, extras="first").entries["layers.0.q"]
    assert e.B.dtype == torch.bfloat16
    assert e.scale == 1.5
    assert torch.equal(e.B[:, :2], a.entries["layers.0.q"].B)
    mixed = algebra.add(a, b, weights=[1.0, 0.3], extras="first")
    assert mixed.entries["layers.0.q"].B.dtype == torch.float32, "numbers go into the factors in float32, never in bf16"
    same(mixed, combine([a, b], [1.0, 0.3]))


def test_subtract():
    a, b = make(1), make(2)
    same(algebra.subtract(a, b), combine([a, b], [1, -1]))
    assert algebra.norm(algebra.subtract(a, a)) < 1e-5


def test_extras_are_values_not_changes():
    a, b = make(1), make(3)
    with pytest.raises(CompositionError, match=r"head\.weight"):
        algebra.add(a, b)
    assert algebra.add(a, make(1)).extras["head.weight"][0, 0] == 1
    assert algebra.add(a, b, extras="first").extras["head.weight"][0, 0] == 1
    assert algebra.average(a, b).extras["head.weight"][0, 0] == 2
    assert algebra.average(a, b, weights=[1, 3]).extras["head.weight"][0, 0] == 2.5
    odd = Adapter.of([], {"head.weight": torch.ones(3)})
    with pytest.raises(CompositionError, match="shapes differ"):
        algebra.average(a, odd)


def test_truncate_is_the_best_and_reports_its_error():
    a = make(1, (4, 3, 2))
    before = dense(a)
    got, errors = algebra.truncate(a, rank=2)
    for k, after in dense(got).items():
        values = torch.linalg.svdvals(before[k])
        assert abs(errors[k] - float(values[2:].norm() / values.norm())) < 1e-6
        assert abs(errors[k] - float((after - before[k]).norm() / before[k].norm())) < 1e-6
        e = got.entries[k]
        torch.testing.assert_close(e.B.norm(dim=0), e.A.norm(dim=1))
    full, none = algebra.truncate(a, rank=9)
    same(full, before, 1e-5)
    assert max(none.values()) < 1e-7


def test_truncate_by_energy():
    values = torch.tensor([4.0, 3.0, 0.0, 0.0])
    a = Adapter.of([Entry("q", torch.eye(4), torch.diag(values)), Entry("k", torch.zeros(4, 2), torch.randn(2, 4))])
    for energy, rank in [(0.6, 1), (0.64, 1), (0.65, 2), (1.0, 2)]:
        got, errors = algebra.truncate(a, energy=energy)
        assert got.ranks == {"q": rank, "k": 0}
        assert errors["q"] ** 2 <= 1 - energy + 1e-12
    assert algebra.truncate(a, rank=1, energy=1.0)[0].ranks["q"] == 1
    for wrong in ({}, {"rank": -1}, {"energy": 0.0}, {"energy": 2.0}):
        with pytest.raises(OptionError):
            algebra.truncate(a, **wrong)


def test_inner_norm_cosine():
    a, b = make(1), make(2, (3, 1, 2), 0.4)
    da, db = dense(a), dense(b)
    want = sum(float((da[k] * db[k]).sum()) for k in SHAPES)
    assert abs(algebra.inner(a, b) - want) < 1e-9 * abs(want) + 1e-9
    size = math.sqrt(sum(float(d.square().sum()) for d in da.values()))
    assert abs(algebra.norm(a) - size) < 1e-9
    assert abs(algebra.cosine(a, b) - want / (size * algebra.norm(b))) < 1e-9
    assert algebra.cosine(a, algebra.scale(a, 0.0)) == 0.0
    assert algebra.inner(make(1, sites=("embed",)), make(2, sites=("layers.0.q",))) == 0.0


def test_project():
    a, b, c = make(1), make(2), make(3)
    target = algebra.add(a, b, weights=[2, -1], extras="first")
    got, coefficients = algebra.project(target, [a, b])
    assert coefficients == pytest.approx([2, -1], abs=1e-5)
    same(got, combine([a, b], [2, -1]), 1e-4)
    got, _ = algebra.project(c, [a, b])
    rest = algebra.subtract(c, got)
    for x in (a, b):
        assert abs(algebra.inner(rest, x)) < 1e-4 * algebra.norm(c) * algebra.norm(x)
    _, twice = algebra.project(c, [a, a])
    assert twice[0] == pytest.approx(twice[1], abs=1e-6), "a repeated direction is shared, not singular"


def test_rotate():
    a = make(1)
    Q, _ = torch.linalg.qr(torch.randn(5, 5))
    R = torch.randn(6, 7)
    got = algebra.rotate(a, left={"layers.0.q": Q}, right={"layers.0.q": R})
    want = dense(a)
    e = got.entries["layers.0.q"]
    torch.testing.assert_close(
        e.scale * e.B.double() @ e.A.double(), Q.double() @ want["layers.0.q"] @ R.double().T, rtol=1e-5, atol=1e-5
    )
    turned = algebra.rotate(a, left={"layers.0.q": Q})
    assert abs(algebra.norm(turned) - algebra.norm(a)) < 1e-5
    with pytest.raises(OptionError, match="no site"):
        algebra.rotate(a, left={"nowhere": Q})
    with pytest.raises(OptionError, match="second size"):
        algebra.rotate(a, left={"layers.0.k": Q})


def test_row_slices_become_one_entry():
    parts = [
        Entry("attn", torch.randn(4, 2), torch.randn(2, 6), 2.0, "conv1d", (0, 4), 12),
        Entry("attn", torch.randn(4, 1), torch.randn(1, 6), 0.5, "conv1d", (8, 12), 12),
    ]
    got = algebra.join_rows(Adapter.of([*parts, Entry("other", torch.ones(2, 1), torch.ones(1, 2))]))
    assert list(got.entries) == ["attn", "other"]
    want = torch.zeros(12, 6)
    want[0:4], want[8:12] = 2.0 * parts[0].B @ parts[0].A, 0.5 * parts[1].B @ parts[1].A
    torch.testing.assert_close(got.entries["attn"].delta().dense(), want)
    assert got.entries["attn"].kind == "conv1d"
    m = torch.rand(4)
    whole = [
        Entry("x", torch.ones(2, 1), torch.ones(1, 3), rows=(2 * k, 2 * k + 2), total_rows=4, magnitude=m[2 * k : 2 * k + 2])
        for k in (1, 0)
    ]
    assert torch.equal(algebra.join_rows(Adapter.of(whole)).entries["x"].magnitude, m)
    with pytest.raises(CompositionError, match="can't be joined"):
        algebra.join_rows(Adapter.of(whole[:1]))
    with pytest.raises(CompositionError, match="total_rows"):
        algebra.join_rows(Adapter.of([Entry("x", torch.ones(2, 1), torch.ones(1, 3), rows=(0, 2))]))


def test_rescaled_rows_are_no_vector():
    dora = Adapter.of([Entry("layers.0.q", torch.ones(5, 1), torch.ones(1, 7), magnitude=torch.ones(5))])
    for f in (
        lambda: algebra.scale(dora, 2.0),
        lambda: algebra.add(dora, dora),
        lambda: algebra.average(dora),
        lambda: algebra.truncate(dora, 1),
        lambda: algebra.inner(dora, dora),
        lambda: algebra.rotate(dora),
        lambda: algebra.concat(list(dora.entries.values())),
    ):
        with pytest.raises(CompositionError, match=r"layers\.0\.q"):
            f()


def test_wrong_shapes_and_counts():
    a, b = make(1), Adapter.of([Entry("layers.0.q", torch.ones(4, 1), torch.ones(1, 7))])
    with pytest.raises(CompositionError, match="not one site"):
        algebra.add(a, b, extras="first")
    with pytest.raises(CompositionError, match="different bases"):
        algebra.inner(a, b)
    with pytest.raises(OptionError):
        algebra.add(a, a, weights=[1.0])
    with pytest.raises(OptionError):
        algebra.average(a, a, weights=[1.0, -1.0])
    with pytest.raises(OptionError):
        algebra.project(a, [])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.tuples(*[st.integers(0, 3)] * 3), st.floats(-3, 3), st.floats(-2, 2)),
        min_size=1,
        max_size=4,
    )
)
def test_any_sum_is_the_sum_of_the_changes(parts):
    adapters = [make(seed, ranks, scale) for seed, ranks, scale, _ in parts]
    weights = [w for *_, w in parts]
    got = algebra.add(*adapters, weights=weights, extras="first")
    same(got, combine(adapters, weights), 1e-4)
    want = combine(adapters, weights)
    assert algebra.norm(got) == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in want.values())), abs=2e-3)


def test_an_entry_as_an_expression():
    W, e = torch.randn(5, 7, dtype=torch.float64), make(1, dtype=torch.float64).entries["layers.0.q"]
    V = W + 1.5 * e.B @ e.A
    m = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(e.weight(Dense(W)).dense(), V)
    lengths = Entry(e.name, e.B, e.A, 1.5, magnitude=m).weight(Dense(W)).dense()
    torch.testing.assert_close(lengths, m[:, None] * V / V.norm(dim=1, keepdim=True))
    torch.testing.assert_close(Entry(e.name, e.B, e.A, 1.5, gain=m).weight(Dense(W)).dense(), m[:, None] * V)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "dense"},
        {"A": torch.ones(3, 7)},
        {"B": torch.ones(5)},
        {"magnitude": torch.ones(4)},
        {"gain": torch.ones(5, 1)},
        {"gain": torch.ones(5), "magnitude": torch.ones(5)},
        {"rows": (0, 4)},
    ],
)
def test_entries_that_do_not_fit(wrong):
    good = {"name": "q", "B": torch.ones(5, 2), "A": torch.ones(2, 7)}
    assert Entry(**good).shape == (5, 7)
    with pytest.raises(OptionError, match="q"):
        Entry(**{**good, **wrong})


def test_adapters_count_and_move():
    a = make(1)
    assert a.parameters == (5 + 7) * 2 + (3 + 7) * 3 + (4 + 9) * 1 + 4
    assert a.to(torch.float64).entries["embed"].A.dtype == torch.float64
    with pytest.raises(OptionError, match="calls itself"):
        Adapter({"k": a.entries["embed"]})
    with pytest.raises(OptionError, match="two entries"):
        Adapter.of([a.entries["embed"], Entry("embed", torch.ones(4, 1), torch.ones(1, 9))])
