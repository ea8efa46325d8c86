"""Stacked experts as transformers 5 stores them: W [E, out, in], or [E, in, out], for each of two projections of one module.

Tokens come with the experts that a router chose for them. The hosted module runs the library's contract for such modules (its
"experts implementations": sort by expert, project, gate, project, weigh) with our product in the place of each projection that
is adapted; a module without adapters keeps the implementation that the library chose. Ours is in the library's registry as well,
under the name "rankfold".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.kernels.grouped import grouped_outer, grouped_product
from rankfold.linalg import at_least_float32, like

from ..site import Site
from .arithmetic import Arithmetic
from .kind import Keep, Kind

if TYPE_CHECKING:
    from ..host import Host
    from ..planner import Program
    from ..store import Slot

__all__ = ["IMPLEMENTATION", "Experts", "Routed", "TransposedExperts", "register"]

IMPLEMENTATION = "rankfold"
REGISTRY = "transformers.integrations.moe"
ARGUMENTS = ({"hidden_states"}, {"top_k_index", "router_indices"}, {"top_k_weights", "routing_weights"})


class Experts(Kind):
    """W [E, out, in]: a stack of E maps [out, in], named by the parameter ("mlp.experts.down_proj")."""

    name = "experts"
    transposed = False
    flat = False

    def makes(self, module: nn.Module) -> bool:
        # recognised by what the library's decorator leaves on a module, without importing the library
        down = module._parameters.get("down_proj")
        return down is not None and down.ndim == 3 and getattr(module, "is_transposed", None) is self.transposed

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        found = []
        for param in (_first(module), "down_proj"):
            stored: Any = module._parameters[param]
            count, out, in_ = _as_maps(module, stored).shape
            found.append(Site(f"{path}.{param}" if path else param, (int(out), int(in_)), self.name, batch=int(count)))
        return found

    def view(self, stored: Tensor, site: Site) -> Tensor:
        return stored.mT if self.transposed else stored

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        return self.view(W, site).to(stored.dtype).contiguous()

    def hosted(self, module: nn.Module) -> None:
        register()

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        if site.rows is not None:
            return "rows of experts can't be adapted alone; choose the whole of the parameter"
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are spread over processes"
        return None

    def forward(
        self, host: Host, module: nn.Module, native: Any, groups: list[list[Slot]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from .products import run

        on = {group[0].site.param: group for group in groups}

        def project(routed: Routed, param: str, x: Tensor) -> Tensor:
            if param not in on:
                return projected(module, routed, param, x)
            program = host.program(on[param], module.training)
            return run(program, routed, x, _bias(module, param), host.store.plan, host.store.memory)

        return contract(module, *called(args, kwargs), project)

    def explain(self, program: Program, tokens: int, memory: str, x: Tensor | None) -> dict[str, Any]:
        from .products import explain

        return explain(program, x)

    def inputs(
        self, module: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Keep
    ) -> Tensor | list[Tensor]:
        hidden, index, _ = called(args, kwargs)
        x = hidden.detach().reshape(-1, hidden.shape[-1])
        if (mask := keep(hidden.shape[:-1])) is not None:
            mask = mask.reshape(-1).to(x.device)
            x, index = x[mask], index[mask]
        routed = Routed(index, _count(module))
        rows = routed.spread(x)
        if site.param == "down_proj":  # what the first projection and the gate make of it
            rows = gated(module, projected(module, routed, _first(module), rows))
        return list(rows.split(routed.sizes))


class TransposedExperts(Experts):
    """W stored [E, in, out], as GPT-OSS has it."""

    name = "experts-transposed"
    transposed = True


def register() -> None:
    """Put our implementation into transformers' registry of them as "rankfold", once the library has loaded it.

    Then `model.set_experts_implementation("rankfold")`, or the same name in a configuration, runs the plain grouped product where
    no adapter is on; where one is, the host runs before whatever the model's configuration names.
    """
    if (moe := sys.modules.get(REGISTRY)) is not None:
        moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, implementation)


def implementation(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The unchanged experts by grouped products: what transformers calls for experts_implementation="rankfold".

    Raises:
        LayoutError: the experts are spread over processes, which the library's own implementations know how to run.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise LayoutError(f"experts_implementation={IMPLEMENTATION!r}: these experts are spread over processes; use 'grouped_mm'")
    return contract(self, hidden_states, top_k_index, top_k_weights, lambda routed, param, x: projected(self, routed, param, x))


def contract(
    module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, project: Callable[[Routed, str, Tensor], Tensor]
) -> Tensor:
    """What the library asks of an implementation, with `project(routed, parameter, rows)` for its two products."""
    routed = Routed(index, _count(module))
    rows = routed.spread(hidden.reshape(-1, hidden.shape[-1]))
    y = project(routed, "down_proj", gated(module, project(routed, _first(module), rows)))
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)  # type: ignore[operator]
    return routed.gather(y, weights).to(hidden.dtype).view(hidden.shape)


def projected(module: nn.Module, routed: Routed, param: str, x: Tensor) -> Tensor:
    """The base's own product, in the dtype of its weight: no copy of a stack is made."""
    W = _as_maps(module, getattr(module, param))
    return routed.product(like(x, W), W, _bias(module, param))


def _as_maps(module: nn.Module, stored: Tensor) -> Tensor:
    return stored.mT if module.is_transposed else stored


def _bias(module: nn.Module, param: str) -> Tensor | None:
    return getattr(module, f"{param}_bias", None)


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _count(module: nn.Module) -> int:
    down: Any = module.down_proj
    return int(down.shape[0])


def gated(module: Any, y: Tensor) -> Tensor:
    """What lies between the two projections."""
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)


def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [tokens, width], chosen experts [tokens, k], their weights [tokens, k]) of a call."""
    values = list(args)
    for names in ARGUMENTS[len(args) :]:
        values += [kwargs[n] for n in names & kwargs.keys()]
    if len(values) != 3 or len(args) + len(kwargs) != 3:
        raise LayoutError(
            f"experts were called with {len(args)} arguments and {', '.join(kwargs) or 'no names'}; "
            "rankfold knows (hidden_states, top_k_index, top_k_weights)"
        )
    return values[0], values[1], values[2]


class Routed(Arithmetic):
    """x: [tokens·k, in], sorted by expert, by W: [E, out, in]: grouped products, whose sizes stay on the device.

    Args:
        index: [tokens, k], the experts of each token.
        count: E.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        self.count, self.k = count, index.shape[-1]
        self.ids, self.order = index.reshape(-1).sort(stable=True)
        experts = torch.arange(count, device=index.device, dtype=self.ids.dtype)
        self.ends = torch.searchsorted(self.ids, experts, right=True, out_int32=True)

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each expert has. Waits for the device."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def spread(self, x: Tensor) -> Tensor:
        """[tokens, width] -> [tokens·k, width], sorted by expert."""
        return x.index_select(0, self.order // self.k)

    def gather(self, y: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts, [tokens, width]."""
        weighted = y * weights.reshape(-1).index_select(0, self.order).unsqueeze(-1)
        back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self.order), device=y.device))
        return weighted.index_select(0, back).unflatten(0, (-1, self.k)).sum(1)

    def product(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, W) if W.ndim == 2 else grouped_product(x, W, self.ends)
        return y if bias is None else y + self.rows(like(bias, x), y)

    def input_gradient(self, g: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return g @ W if W.ndim == 2 else grouped_product(g, W.mT, self.ends)

    def weight_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        return grouped_outer(g, x, self.ends)

    def rows(self, v: Tensor, y: Tensor) -> Tensor:
        return v if v.ndim == 1 else v.index_select(0, self.ids)

    def row_sums(self, y: Tensor) -> Tensor:
        y = at_least_float32(y)
        return y.new_zeros(self.count, y.shape[-1]).index_add_(0, self.ids, y)

    @cached_property
    def _place(self) -> Tensor:
        """Position of each row among those of its expert."""
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        return torch.arange(len(self.ids), device=self.ids.device) - starts[self.ids]

    def tokens(self, x: Tensor) -> Tensor:
        """[E, most tokens of an expert, in], padded with zeros. Waits for the device."""
        padded = x.new_zeros(self.count, max(self.sizes), x.shape[-1])
        return padded.index_put((self.ids, self._place), x)

    def joined(self, y: Tensor) -> Tensor:
        return y[self.ids, self._place]
