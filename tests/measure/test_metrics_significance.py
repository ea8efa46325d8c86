"""Tests of claims against scipy, and Holm against its own step-down rule."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure import holm, paired_test, spearman
from rankfold.measure.student import t_quantile, t_tail

ALTERNATIVES = ["two-sided", "greater", "less"]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n", [2, 5, 10, 12])
def test_exact_p_is_scipys(n, alternative):
    d = np.random.default_rng(n).normal(0.4, 1, n)
    theirs = stats.permutation_test((d,), np.sum, permutation_type="samples", alternative=alternative, n_resamples=np.inf)
    ours = paired_test(d, alternative)
    assert ours.method == "exact sign-flip"
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.sampled_from(ALTERNATIVES))
def test_exact_p_counts_ties_and_zeros(differences, alternative):
    sums = [sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    seen = sum(differences)
    extreme = {"two-sided": lambda s: abs(s) >= abs(seen), "greater": lambda s: s >= seen, "less": lambda s: s <= seen}[
        alternative
    ]
    tenths = [0.1 * d for d in differences]  # not exact in binary: equal sums differ in the last bit
    assert paired_test(tenths, alternative).p == pytest.approx(sum(map(extreme, sums)) / len(sums), abs=1e-15)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_many_pairs_use_t(alternative):
    d = np.random.default_rng(0).normal(0.2, 1, 40)
    theirs = stats.ttest_1samp(d, 0, alternative=alternative)
    ours = paired_test(d, alternative, level=0.9)
    assert ours.method == "t"
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_the_interval_of_few_pairs_is_ts_too():
    d = [0.02, 0.01, 0.03, -0.02, 0.04]
    interval = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    ours = paired_test(d)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert ours.mean == pytest.approx(np.mean(d))


def test_five_pairs_never_reach_five_percent():
    assert paired_test([1, 2, 3, 4, 5]).p == 2 / 2**5
    assert paired_test([1, 2, 3, 4, 5], "greater").p == 1 / 2**5


def test_constant_differences():
    assert paired_test([0.5] * 30).p == 0
    assert paired_test([0.0] * 30).p == 1
    assert paired_test([0.0] * 3).p == 1


@pytest.mark.parametrize("freedom", [1, 2, 3, 9.5, 29, 1000])
def test_students_t(freedom):
    for t in (-3.0, -0.1, 0.0, 0.5, 1.0, 2.5, 10.0, 60.0):
        assert t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
    for p in (0.001, 0.3, 0.5, 0.9, 0.975, 0.9995):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)
    assert t_tail(math.inf, 5) == 0


def test_students_t_bounds():
    with pytest.raises(OptionError, match="freedom=0"):
        t_tail(1.0, 0)
    with pytest.raises(OptionError, match="p=1"):
        t_quantile(1, 5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_is_the_step_down_rule(pvalues, alpha):
    rejected = set()
    for step, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        if pvalues[index] * (len(pvalues) - step) > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(pvalues)) if p <= alpha} == rejected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs):
    x, y = zip(*pairs)
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(DataError, match="constant"):
            spearman(x, y)
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_mistakes():
    with pytest.raises(DataError, match="at least two"):
        paired_test([1.0])
    with pytest.raises(NumericError, match="nan at"):
        paired_test([1.0, math.nan])
    with pytest.raises(OptionError, match="alternative='bigger'"):
        paired_test([1.0, 2.0], "bigger")
    with pytest.raises(OptionError, match="level=1"):
        paired_test([1.0, 2.0], level=1)
    with pytest.raises(DataError, match=r"1\.5 lies outside"):
        holm([0.5, 1.5])
    with pytest.raises(DataError, match="2 and 3"):
        spearman([1, 2], [1, 2, 3])
