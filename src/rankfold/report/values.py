"""Numbers as a reader wants them: intervals, large counts, bytes, durations, and what is missing or not finite.

A value with an interval is anything that has `estimate`, `low` and `high`, such as `rankfold.measure.Interval`.
"""

import math
from numbers import Integral
from typing import Any

__all__ = ["bounds", "brief", "clean", "count", "duration", "memory", "number", "show"]


def number(value: Any) -> float | None:
    """The value as a float; None for what is missing or no number. Booleans count as text.

    >>> from rankfold.measure import Interval
    >>> number(Interval(0.3, 0.2, 0.4, level=0.95)), number("lora"), number(None), number(True)
    (0.3, None, None, None)
    """
    if value is None or isinstance(value, bool | str | bytes):
        return None
    try:
        return float(getattr(value, "estimate", value))
    except (TypeError, ValueError, OverflowError):
        return None


def bounds(value: Any) -> tuple[float, float] | None:
    """(low, high) of anything that has both and where both are finite, else None.

    >>> from rankfold.measure import Interval
    >>> bounds(Interval(0.3, 0.2, 0.4, level=0.95)), bounds(0.3), bounds(Interval(0.3, float("nan"), 0.4, level=0.95))
    ((0.2, 0.4), None, None)
    """
    low, high = number(getattr(value, "low", None)), number(getattr(value, "high", None))
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return None
    return low, high


def brief(value: float) -> str:
    """Three significant digits, for labels in figures.

    >>> brief(0.4), brief(12.345), brief(1234.5), brief(0.0000123), brief(0)
    ('0.400', '12.3', '1234', '1.23e-05', '0')
    """
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    if 100 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".").replace("-", "−", value < 0)


def count(value: float) -> str:
    """A count with a decimal prefix.

    >>> [count(n) for n in (0, 950, 147_456, 22_713_216, 999_960)]
    ['0', '950', '147 k', '22.7 M', '1.00 M']
    """
    return _scaled(value, 1000, ["", "k", "M", "G", "T"])


def memory(value: float) -> str:
    """Bytes with a binary prefix.

    >>> memory(512), memory(1_610_612_736)
    ('512 B', '1.50 GiB')
    """
    return _scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def duration(seconds: float) -> str:
    """A duration in at most two units.

    >>> [duration(s) for s in (0.0042, 9.31, 59.97, 83.2, 7322)]
    ['4.20 ms', '9.3 s', '1 min 00 s', '1 min 23 s', '2 h 02 min']
    """
    if not math.isfinite(seconds):
        return _not_finite(seconds)
    if 0 < abs(seconds) < 0.1:
        return f"{seconds * 1000:#.3g} ms"
    if round(abs(seconds), 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show(value: Any, form: str = "") -> str:
    """A value as text by a format: a format specification of Python, or `count`, `bytes`, `seconds`, `percent`, `code`.

    >>> show(0.2861, ".3f"), show(147_456, "count"), show(0.0065, "percent"), show(None), show(float("nan"), ".3f")
    ('0.286', '147 k', '0.65 %', '–', 'NaN')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    as_number = number(value)
    if as_number is None:
        return clean(value)
    if not math.isfinite(as_number):
        return _not_finite(as_number)
    named = {"count": count, "bytes": memory, "seconds": duration, "percent": lambda x: f"{100 * x:.3g} %"}
    if form in named:
        return named[form](as_number)
    plain = getattr(value, "estimate", value)
    if form and form != "code":
        return format(plain, form).replace("-", "−", as_number < 0)
    return str(plain) if isinstance(plain, Integral) else f"{as_number:.4g}"


def clean(text: Any) -> str:
    """One line of printable text: control characters dropped, white space collapsed, lone surrogates replaced.

    >>> clean("two\\n  lines\\x1b[31m")
    'two lines[31m'
    """
    printable = "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " if c.isspace() else "" for c in str(text))
    return " ".join(printable.encode("utf-8", "replace").decode("utf-8").split())


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _scaled(value: float, base: int, units: list[str]) -> str:
    if not math.isfinite(value):
        return _not_finite(value)
    power = 0
    # 999.5 would be printed as 1000, so it belongs to the next unit.
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or abs(value) >= 100 else f"{value:#.3g}"
    return f"{digits} {units[power]}".rstrip()
