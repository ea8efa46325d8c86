"""What can go wrong, as one tree. Every message says what was asked, what is there, and what to type next.

RankfoldError
├── UnknownName(LookupError)        a method, option, column, site or file that nobody knows; lists the nearest
├── TargetError(ValueError)         targets that select nothing, or something that cannot be adapted
├── OptionError(ValueError)         an option outside its bounds
├── CompositionError(ValueError)    two members of a method that cannot work together, with the reason
├── InactiveError(RuntimeError)     a method, site, policy or update that touched nothing
├── FingerprintError(ValueError)    an adapter made for another base
├── FileError(ValueError)           a file that is damaged, foreign, too large or unsafe
├── DataError(ValueError)           rows, columns or labels that cannot be used
├── NumericError(ArithmeticError)   NaN or Inf, with the place where it appeared
├── LayoutError(RuntimeError)       the model's form forbids the request (folded, copied, sharded, ...)
├── BudgetError(MemoryError)        a plan that would need more memory than allowed
└── MissingExtra(ImportError)       an optional package that is not installed, with the install line
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CompositionError",
    "DataError",
    "FileError",
    "FingerprintError",
    "InactiveError",
    "LayoutError",
    "MissingExtra",
    "NumericError",
    "OptionError",
    "RankfoldError",
    "TargetError",
    "UnknownName",
    "nearest",
]


class RankfoldError(Exception):
    """Base of everything that rankfold raises on purpose; the command line prints it without a traceback."""

    exit_code = 2


class UnknownName(RankfoldError, LookupError):
    """A name that nobody knows.

    >>> raise UnknownName.of("method", "lorra", ["lora", "dora", "hira"])
    Traceback (most recent call last):
    ...
    rankfold.errors.UnknownName: unknown method 'lorra'; nearest: lora, hira, dora
    """

    @classmethod
    def of(cls, what: str, name: str, known: Iterable[str], hint: str = "") -> "UnknownName":
        close = nearest(name, known)
        text = f"unknown {what} {name!r}" + (f"; nearest: {', '.join(close)}" if close else "")
        return cls(text + (f"\n  {hint}" if hint else ""))


class TargetError(RankfoldError, ValueError):
    """Targets that select nothing, or something that cannot be adapted."""


class OptionError(RankfoldError, ValueError):
    """An option outside its bounds: names the option, the value and what is allowed."""


class CompositionError(RankfoldError, ValueError):
    """Members that cannot work together; the message gives the declared traits that clash."""


class InactiveError(RankfoldError, RuntimeError):
    """Something that was asked for and did nothing (law 6)."""

    exit_code = 3


class FingerprintError(RankfoldError, ValueError):
    """An adapter for another base."""


class FileError(RankfoldError, ValueError):
    """A file that is damaged, foreign, oversized or unsafe."""


class DataError(RankfoldError, ValueError):
    """Rows, columns or labels that cannot be used."""


class NumericError(RankfoldError, ArithmeticError):
    """NaN or Inf where numbers were due."""

    exit_code = 4


class LayoutError(RankfoldError, RuntimeError):
    """The present form of the model forbids the request."""


class BudgetError(RankfoldError, MemoryError):
    """A plan above the memory that was allowed."""


class MissingExtra(RankfoldError, ImportError):
    """An optional package is missing; the message holds the install line."""

    @classmethod
    def of(cls, what: str, packages: str, extra: str) -> "MissingExtra":
        return cls(f'{what} needs {packages}. Install: pip install "rankfold[{extra}]"')


def nearest(name: str, known: Iterable[str], n: int = 5) -> list[str]:
    """The names closest to `name`, best first; falls back to a few of those that there are.

    >>> nearest("kaimng", ["kaiming", "pissa", "eva"])
    ['kaiming']
    """
    names = sorted(set(known) - {""})  # a model's own path is empty
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    return close or [k for k in names if name and (name in k or k in name)][:n] or names[:n]
