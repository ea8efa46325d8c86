"""The default: every site keeps the rank that it was given."""

from dataclasses import dataclass
from typing import ClassVar

from rankfold.core import register
from rankfold.training.contracts import RankPolicy


@register("rank", "fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(RankPolicy):
    """Every site has the structure's rank from the first step to the last.

    >>> Fixed().allocate({}, {"query": 8, "value": 8}, {"query": 64, "value": 64})
    {'query': 8, 'value': 8}
    """

    default: ClassVar[bool] = True
