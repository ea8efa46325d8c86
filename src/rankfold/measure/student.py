"""Student's t distribution: its tail and its quantile, from the incomplete beta function.

The continued fraction is that of Abramowitz and Stegun 26.5.8, evaluated by Lentz's method.
"""

import math

from rankfold.errors import OptionError

__all__ = ["t_quantile", "t_tail"]


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) for `freedom` degrees of freedom; small tails keep their relative accuracy.

    Raises OptionError for freedom <= 0.

    >>> round(t_tail(2.228138851986275, 10), 12)      # the table's 97.5 % point
    0.025
    """
    if freedom <= 0:
        raise OptionError(f"freedom={freedom}: must be positive")
    square = min(abs(t), 1e150) ** 2  # beyond, the square overflows and the tail is below every float but those of few degrees
    half = 0.5 * _beta(freedom / 2, 0.5, freedom / (freedom + square), square / (freedom + square))
    return half if t >= 0 else 1 - half


def t_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p.

    Raises OptionError for p outside (0, 1) or freedom <= 0.

    >>> round(t_quantile(0.975, 10), 9), round(t_quantile(0.5, 3), 9)
    (2.228138852, 0.0)
    """
    if not 0 < p < 1:
        raise OptionError(f"p={p}: must lie between 0 and 1, both excluded")
    if p == 0.5:
        return 0.0
    tail = min(p, 1 - p)
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(200):  # bisection, down to the last bit
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return high if p > 0.5 else -high


def _beta(a: float, b: float, x: float, y: float) -> float:
    """The regularised incomplete beta function I_x(a, b), with y = 1 − x given apart for accuracy."""
    if x <= 0:
        return 0.0
    if y <= 0:
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    if x <= (a + 1) / (a + b + 2):
        return math.exp(log_front) * _fraction(a, b, x) / a
    return 1 - math.exp(log_front) * _fraction(b, a, y) / b


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            change = c * d
            value *= change
        if abs(change - 1) < 1e-16:
            break
    return value
