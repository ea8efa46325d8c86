"""Numbers from files of strangers: whatever stands there becomes a number that could be meant, or a FileError that names it.

JSON alone promises little: 10**400 is no float, 1e999 is read as infinity, true counts as 1, and a name may stand anywhere.
"""

from __future__ import annotations

from typing import Any

from rankfold.errors import FileError

__all__ = ["LARGEST_NUMBER", "LARGEST_RANK", "number", "rank_number"]

LARGEST_NUMBER = 1e30
"""No alpha, scale or option that could be meant is larger; its products stay within float32."""
LARGEST_RANK = 1 << 15


def number(value: Any, what: str) -> float:
    """The value itself, a whole number or a float.

    Args:
        what: for the message: the file, and the name of the number in it.

    Raises:
        FileError: no number (text, a list, true), NaN, or one beyond ±`LARGEST_NUMBER`.

    >>> number(8, "a.json: lora_alpha")
    8
    >>> number(10**400, "a.json: lora_alpha")
    Traceback (most recent call last):
    rankfold.errors.FileError: a.json: lora_alpha 1000000000000000000000000000000000000000 is not a number...
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not abs(value) <= LARGEST_NUMBER:  # so that NaN is none either
        raise FileError(
            f"{what} {_shown(value)} is not a number that could be meant; between -{LARGEST_NUMBER:g} and {LARGEST_NUMBER:g} are"
        )
    return value


def rank_number(value: Any, what: str) -> int:
    """The value as a rank.

    Raises:
        FileError: not a whole number from 1 to `LARGEST_RANK`.

    >>> rank_number(-4, "a.json: r")
    Traceback (most recent call last):
    rankfold.errors.FileError: a.json: r -4 is not a rank; 1 to 32768 are
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_RANK:
        raise FileError(f"{what} {_shown(value)} is not a rank; 1 to {LARGEST_RANK} are")
    return value


def _shown(value: Any) -> str:
    """The beginning of it; Python writes out no integer of more than some thousand digits."""
    try:
        return repr(value)[:40]
    except ValueError:
        return "of thousands of digits"
