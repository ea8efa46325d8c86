"""The generator: fixed values, exact laws, and statistics that a wrong transform fails."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankfold.errors import OptionError
from rankfold.linalg.random import Random, box_muller, checksum, log


def test_golden_values_never_change():
    """Bits of every kind of draw; adapters in the field are regenerated from these, so a change breaks files."""
    draw = lambda: Random("golden", 7)
    hexes = [float(x).hex() for x in draw().normal((3,))]
    assert hexes == ["0x1.182e260000000p+0", "0x1.17aa060000000p+0", "0x1.e5b65e0000000p+0"]
    hexes = [float(x).hex() for x in draw().uniform((2,), -1, 1)]
    assert hexes == ["-0x1.94732e0000000p-2", "-0x1.0026760000000p-1"]
    assert draw().signs((8,)).tolist() == [1, 1, -1, 1, 1, 1, -1, -1]
    assert draw().integers((4,), 1000).tolist() == [139, 926, 506, 454]
    assert draw().permutation(10).tolist() == [3, 6, 2, 1, 0, 5, 4, 7, 8, 9]
    assert draw().choice(100, 5).tolist() == [6, 26, 33, 39, 54]
    assert draw().choice(10, 6).tolist() == [0, 1, 2, 3, 5, 6]
    assert draw().randint(-5, 5) == 4
    assert checksum(draw().normal((8, 8))) == "94fae0c5c3a0d041"


def test_the_bits_are_numpys_philox_keyed_by_sha256():
    import hashlib

    key = int.from_bytes(hashlib.sha256(b'["a",1]').digest()[:16], "little")
    first = int(np.random.Philox(key=key).random_raw(1)[0])
    assert float(Random("a", 1).uniform((1,))[0]) == pytest.approx(first / 2**64, abs=1e-7)


def test_own_logarithm_and_box_muller_agree_with_the_library():
    words = np.random.default_rng(0).integers(0, 2**64, size=(2, 20000), dtype=np.uint64)
    unit = ((words[0] >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    np.testing.assert_allclose(log(unit), np.log(unit), rtol=1e-15)
    assert log(np.array([1.0]))[0] == 0.0
    first, second = box_muller(*words)
    turns = (words[1] >> np.uint64(11)) * 2.0**-53 - 0.125  # the angle starts at minus an eighth of a turn
    np.testing.assert_allclose(first, np.sqrt(-2 * np.log(unit)) * np.cos(2 * math.pi * turns), atol=4e-14)
    np.testing.assert_allclose(second, np.sqrt(-2 * np.log(unit)) * np.sin(2 * math.pi * turns), atol=4e-14)


def test_laws_of_normal_uniform_signs_integers():
    x = Random("law").normal((200000,)).double().numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x[0::2], x[1::2])[0, 1]) < 0.01
    assert stats.kstest(Random("law").uniform((100000,), -3, 5).numpy(), stats.uniform(-3, 8).cdf).pvalue > 1e-3
    assert abs(float(Random("law").signs((100000,)).mean())) < 0.015
    thirds = Random("law").integers((30000,), 3 * 2**60) // 2**60  # plain remainders favour the first third by 6 : 5 : 5
    assert stats.chisquare(np.bincount(thirds.numpy(), minlength=3)).pvalue > 1e-3
    counts = np.bincount(Random("law").integers((70000,), 7).numpy(), minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_keys_are_separate_and_typed():
    assert not torch.equal(Random("a", 1).normal((4,)), Random("a", "1").normal((4,)))
    assert not torch.equal(Random("ab").normal((4,)), Random("a", "b").normal((4,)))
    assert torch.equal(Random("a").child(3).normal((4,)), Random("a", 3).normal((4,)))
    stream = Random("a")
    assert not torch.equal(stream.normal((4,)), stream.normal((4,)))
    for bad in (1.0, True, None):
        with pytest.raises(OptionError, match="use strings and integers"):
            Random("a", bad)


def test_normal_is_the_same_whatever_the_chunks_and_shape():
    big = Random("chunks").normal((300001,))
    assert torch.equal(big[:7], Random("chunks").normal((7,)))
    assert torch.equal(big[:300000].reshape(300, 1000), Random("chunks").normal((300, 1000)))
    assert Random("std").normal((4,), std=3.0).allclose(3.0 * Random("std").normal((4,)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_drawn_in_float32_then_cast(dtype):
    assert torch.equal(Random("cast").normal((50,), dtype=dtype), Random("cast").normal((50,)).to(dtype))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 300), share=st.floats(0, 1), step=st.integers(0, 2**40))
def test_choice_and_permutation_hold_each_index_once(n, share, step):
    k = int(share * n)
    chosen = Random("choice", step).choice(n, k)
    assert len(chosen) == k
    assert (chosen.diff() > 0).all()
    assert k == 0 or (chosen[0] >= 0 and chosen[-1] < n)
    assert Random("choice", step).permutation(n).sort().values.tolist() == list(range(n))


@pytest.mark.parametrize(("n", "k"), [(20, 3), (8, 5)])  # by rejection, by permutation
def test_choice_takes_every_index_equally_often(n, k):
    counts = np.bincount(np.concatenate([Random("even", i).choice(n, k).numpy() for i in range(2000)]), minlength=n)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("rows", "cols"), [(9, 4), (4, 9), (5, 5), (1, 3), (0, 3)])
def test_haar_is_orthonormal_on_its_short_side(rows, cols):
    Q = Random("haar").haar(rows, cols)
    assert Q.shape == (rows, cols)
    gram = Q.mT @ Q if rows >= cols else Q @ Q.mT
    torch.testing.assert_close(gram, torch.eye(min(rows, cols)), atol=2e-6, rtol=0)


def test_haar_is_uniform():
    """Without the sign rule of Mezzadri the mean of the trace is far from zero."""
    traces = torch.stack([Random("haar", i).haar(3, 3).trace() for i in range(600)])
    assert abs(float(traces.mean())) < 0.15
    assert float(traces.square().mean()) == pytest.approx(1.0, abs=0.25)


def test_checksum_sees_shape_and_values():
    x = Random("sum").normal((10, 10))
    assert checksum(x) == checksum(x.clone()) != checksum(x.reshape(100))
    assert checksum(x) != checksum(x + 1e-6)
    assert checksum(x.to(torch.bfloat16)) == checksum(x.to(torch.bfloat16).float())


def test_bounds_are_named():
    stream = Random("bounds")
    for call in (
        lambda: stream.randint(3, 3),
        lambda: stream.uniform((2,), 1.0, 1.0),
        lambda: stream.integers((2,), 0),
        lambda: stream.choice(3, 4),
    ):
        with pytest.raises(OptionError):
            call()
    assert float(Random("top").uniform((100,), 1e7, 1e7 + 1).max()) == 1e7  # no float32 lies between: half would round up
    assert stream.normal((0, 3)).shape == (0, 3)
