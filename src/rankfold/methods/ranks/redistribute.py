"""Redistribution: a budget of ranks goes to the components with the highest scores, wherever they are.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170,
section 3.2; the scores come from the init, so that any init that scores its components can use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankfold.core import register
from rankfold.errors import NumericError, OptionError
from rankfold.training.contracts import RankPolicy


@register("rank", "eva", paper="paischer2024eva")
@dataclass(frozen=True, kw_only=True)
class Redistribute(RankPolicy):
    """The R = Σ rank components of highest score over all sites are kept; a site's new rank is how many of them are its own.

    A site can get as many as its init scored (for EVA ρ·rank), or none: then it has no adapter. Ties go by the order of sites.
    The scale of a site stays, as alpha follows its rank.

    Args:
        unit: "ranks" keeps Σ rank exactly. "params" orders by score per parameter and keeps Σ rank·(out + in) from growing; what
            is left over is less than the costliest component.

    >>> scores = {"query": torch.tensor([0.9, 0.8, 0.7]), "value": torch.tensor([0.6, 0.1, 0.1])}
    >>> Redistribute().allocate(scores, {"query": 2, "value": 2}, {"query": 64, "value": 64})
    {'query': 3, 'value': 1}
    """

    allocates: ClassVar[bool] = True

    unit: Literal["ranks", "params"] = "ranks"

    def allocate(
        self,
        scores: Mapping[str, Tensor],
        ranks: Mapping[str, int],
        limits: Mapping[str, int],
        costs: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        if self.unit == "params" and costs is None:
            raise OptionError("rank eva: unit 'params' needs what a rank costs at each site")
        price = dict.fromkeys(ranks, 1) if self.unit == "ranks" or costs is None else costs
        bids = []
        for order, key in enumerate(key for key in ranks if key in scores):
            values = scores[key].double()
            if not torch.isfinite(values).all():
                raise NumericError(f"rank eva: {key} has a score that is NaN or Inf")
            most = min(max(len(values), ranks[key]), limits[key])
            worth = (values.tolist() + [0.0] * most)[:most]  # what was not scored is worth nothing, but may fill the budget
            bids += [(-score / price[key], order, i, key) for i, score in enumerate(worth)]
        left = sum(ranks[key] * price[key] for key in ranks if key in scores)
        given = {key: 0 if key in scores else rank for key, rank in ranks.items()}
        for *_, key in sorted(bids):
            if price[key] <= left:
                given[key] += 1
                left -= price[key]
        return given
