"""What one kind of site knows: which modules make it, how the stored tensor is read as a map, and how a changed module runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..site import Site

if TYPE_CHECKING:
    from ..base import Base
    from ..host import Host
    from ..planner import Program
    from ..store import Slot

__all__ = ["Keep", "Kind", "by_weight", "held", "weight_of"]

Keep = Callable[[torch.Size], Tensor | None]


class Kind:
    """One file per kind in core/kinds/. Core asks these questions and knows no kind by name.

    Attributes:
        name: `Site.kind` of its sites.
        automatic: whether "all-linear" takes it.
        flat: whether W multiplies the last dimension of the module's first argument, row by row.
        tokens: whether the module's input are indices (a vocabulary): transforms, gates and dropout of the input make no sense.
        swapped: whether the module's own forward runs on W': then there must be one weight, without gates and dropout.
    """

    name: str = "linear"
    automatic = True
    tokens = False
    flat = True
    swapped = False

    def makes(self, module: nn.Module) -> bool:
        """Whether this module's weight is of this kind."""
        raise NotImplementedError

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        """The sites of one module; [] where its weight isn't there."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return []
        return [Site(path, self._shape(weight), self.name)]

    def _shape(self, weight: Tensor) -> tuple[int, int]:
        return int(weight.shape[0]), int(weight.shape[1])

    def view(self, stored: Tensor, site: Site) -> Tensor:
        """The stored tensor (or its gradient) as [out, in], or [batch, out, in]; all rows of the storage."""
        return stored

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        """The inverse of `view`: W [.., out, in] of the whole storage in the layout, shape and dtype of `stored`."""
        raise NotImplementedError

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        """Why this module can't host the site, or None."""
        return None

    def hosted(self, module: nn.Module) -> None:
        """Called when a module of this kind has been given its host."""

    def inputs(
        self, module: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Keep
    ) -> Tensor | list[Tensor]:
        """The rows [tokens, in] that W multiplies in this call, by map where the site is a stack.

        `keep(lead)` gives the mask of the rows that count in an input [*lead, width], or None for all.
        """
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        mask = keep(x.shape[:-1])
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask.to(x.device)]

    def forward(
        self, host: Host, module: nn.Module, native: Any, groups: list[list[Slot]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's forward with the slots that are on, grouped by site. Row slices that no adapter changes keep the base's.

        Default: a product over the last dimension of the first argument.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if len(groups) == 1 and groups[0][0].site.rows is None:
            return self.site(host, module, groups[0], x, getattr(module, "bias", None))
        assert groups[0][0].base is not None
        out = groups[0][0].base.total_rows
        pieces, position = [], 0
        for (start, stop), group in sorted(((g[0].site.rows or (0, out), g) for g in groups), key=lambda pair: pair[0]):
            if position < start:
                pieces.append(self.plain_rows(host, module, group[0].site, (position, start), x))
            pieces.append(self.site(host, module, group, x, rows_of(getattr(module, "bias", None), (start, stop))))
            position = stop
        if position < out:
            pieces.append(self.plain_rows(host, module, groups[0][0].site, (position, out), x))
        return torch.cat(pieces, -1)

    def explain(self, program: Program, tokens: int, memory: str, x: Tensor | None) -> dict[str, Any]:
        """What plan "auto" would do for that many tokens, and why."""
        from ..planner import explain

        return explain(program, tokens, memory, x)

    def site(self, host: Host, module: nn.Module, slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor:
        """The changed product of one site."""
        return host.run(module, slots, x, bias)

    def plain_rows(self, host: Host, module: nn.Module, like_site: Site, rows: tuple[int, int], x: Tensor) -> Tensor:
        """The base's own product for rows that no adapter changes."""
        from ..planner import Program, run

        base = base_rows(module, like_site, rows)
        return run(Program(base, lambda leaves, x: base, ()), x, rows_of(getattr(module, "bias", None), rows), "plain")


def base_rows(module: nn.Module, like_site: Site, rows: tuple[int, int]) -> Base:
    """Those rows of the weight that `like_site` is a slice of."""
    from ..base import base_of  # a base asks its kind how to read the storage, so neither can come first

    return base_of(module, Site(like_site.name, (rows[1] - rows[0], like_site.shape[1]), like_site.kind, rows=rows))


def held(module: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """(the module whose parameter the site's weight is, its name there): the site's module, or a child that it reads."""
    param = site.param
    if "." not in param:
        return module, param
    child, _, leaf = param.rpartition(".")
    return (module.get_submodule(child) if child else module), leaf


def by_weight(groups: Sequence[list[Slot]]) -> dict[str, list[list[Slot]]]:
    """Slots by site, sorted by the full name of the stored weight that the sites stand for: one, or several row slices."""
    found: dict[str, list[list[Slot]]] = {}
    for group in groups:
        found.setdefault(group[0].site.weight, []).append(group)
    return found


def weight_of(module: nn.Module, site: Site) -> Tensor:
    """The stored weight of a site, as it is now."""
    owner, leaf = held(module, site)
    weight = owner._parameters.get(leaf)
    if weight is None:  # a parametrisation, or a tensor that is no parameter
        weight = getattr(owner, leaf)
    assert isinstance(weight, Tensor)
    return weight


def rows_of(bias: Tensor | None, rows: tuple[int, int]) -> Tensor | None:
    return None if bias is None else bias[rows[0] : rows[1]]
