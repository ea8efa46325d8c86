"""Bootstrap intervals: they repeat, agree with scipy's, and cover the truth as often as they say."""

import numpy as np
import pytest
from scipy import stats

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure import bootstrap_difference, bootstrap_interval


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_scipy_agrees(statistic):
    values = np.random.default_rng(0).exponential(size=200)
    ours = bootstrap_interval(values, statistic, draws=5000)
    theirs = stats.bootstrap(
        (values,), statistic, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == statistic(values)
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_coverage():
    generator = np.random.default_rng(2)
    covered = [
        interval.low <= 0.3 <= interval.high
        for interval in (bootstrap_interval(generator.random(100) < 0.3, level=0.9, seed=i, draws=300) for i in range(300))
    ]
    assert 0.85 <= np.mean(covered) <= 0.95


def test_the_seed_decides():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    assert bootstrap_interval(values, level=0.5).high < bootstrap_interval(values, level=0.95).high


def test_pairing_narrows():
    generator = np.random.default_rng(4)
    hard = generator.normal(size=300)
    first, second = hard + 0.1 + 0.05 * generator.normal(size=300), hard
    paired = bootstrap_difference(first, second)
    assert paired.low < 0.1 < paired.high
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    assert paired.high - paired.low < 0.1 * (bootstrap_interval(first).high - bootstrap_interval(first).low)
    same = bootstrap_interval(first - second)
    assert (paired.low, paired.high) == pytest.approx((same.low, same.high))


def test_it_prints_for_tables():
    assert str(bootstrap_interval([1, 1, 1])) == "1.000 [1.000, 1.000]"


def test_mistakes():
    with pytest.raises(DataError, match="non-empty"):
        bootstrap_interval([])
    with pytest.raises(NumericError, match="inf"):
        bootstrap_interval([1, np.inf])
    with pytest.raises(OptionError, match="level=95"):
        bootstrap_interval([1, 2], level=95)
    with pytest.raises(OptionError, match="draws=0"):
        bootstrap_interval([1, 2], draws=0)
    with pytest.raises(DataError, match="2 and 1"):
        bootstrap_difference([1, 2], [1])
