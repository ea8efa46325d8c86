"""The projections of nn.MultiheadAttention: in_proj_weight (q, k and v in one, [3·E, E]), or q_proj_weight, k_proj_weight and
v_proj_weight where their widths differ, and the output projection, which the module reads without calling it.

The library's own forward runs, with masks, averaged weights and its fused call, on W' in the place of W. W' is built for the call
and again in the backward pass; a change of q, of k or of v alone is a row slice: "self_attn.in_proj_weight[q]".
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.kernels.once import once
from rankfold.linalg import like

from ..site import Site
from .kind import Keep, Kind, by_weight, held, weight_of
from .linear import own_forward

if TYPE_CHECKING:
    from ..host import Host
    from ..planner import Program
    from ..store import Slot

__all__ = ["Multihead"]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Multihead(Kind):
    """Sites "self_attn.in_proj_weight" and "self_attn.out_proj" of the module "self_attn"."""

    name = "multihead"
    flat = False
    swapped = True

    def makes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        weights = {name: module._parameters.get(name) for name in PROJECTIONS}
        weights["out_proj"] = module.out_proj._parameters.get("weight")  # type: ignore[union-attr]
        return [
            Site(f"{path}.{name}" if path else name, self._shape(weight), self.name)
            for name, weight in weights.items()
            if weight is not None
        ]

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        return W.to(stored.dtype)

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        return own_forward(module, nn.MultiheadAttention)

    def forward(
        self, host: Host, module: nn.Module, native: Any, groups: list[list[Slot]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from ..host import swapped

        changed = [(held(module, own[0][0].site), self._changed(host, module, own)) for own in by_weight(groups).values()]
        with ExitStack() as stack:
            for (owner, leaf), W in changed:
                stack.enter_context(swapped(owner, {leaf: W}))
            return native(module, *args, **kwargs)

    def _changed(self, host: Host, module: nn.Module, groups: list[list[Slot]]) -> Tensor:
        """W' of one stored weight in its dtype; the rows that no adapter changes are the base's."""
        W = weight_of(module, groups[0][0].site)
        pieces, position = [], 0
        for group in sorted(groups, key=lambda g: g[0].site.rows or (0, 0)):
            start, stop = group[0].site.rows or (0, len(W))
            built = like(build(host.program(group, module.training), host.store.plan, host.store.memory), W)
            pieces += [W[position:start], built]
            position = stop
        pieces.append(W[position:])
        return built if len(built) == len(W) else torch.cat([p for p in pieces if len(p)])

    def explain(self, program: Program, tokens: int, memory: str, x: Tensor | None) -> dict[str, Any]:
        from ..planner import describe

        return {"plan": "effective", "memory": "recompute", "expression": describe(program.expression(x=x), program.base)}

    def inputs(
        self, module: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Keep
    ) -> Tensor | list[Tensor]:
        read = _before_output(module, args, kwargs) if site.param == "out_proj.weight" else _read(site, args, kwargs)
        rows = []
        for x in read:
            x, mask = x.detach(), keep(x.shape[:-1])
            rows.append(x.reshape(-1, x.shape[-1]) if mask is None else x[mask.to(x.device)])
        return torch.cat(rows)


def _read(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a projection multiplies, each once."""
    x = [args[k] if k < len(args) else kwargs[name] for k, name in enumerate(("query", "key", "value"))]
    parts = {"q_proj_weight": x[:1], "k_proj_weight": x[1:2], "v_proj_weight": x[2:]}
    if site.rows is not None and site.param == "in_proj_weight":
        width = x[0].shape[-1]
        x = x[site.rows[0] // width : -(-site.rows[1] // width)]
    return list({id(t): t for t in parts.get(site.param, x)}.values())


def _before_output(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the output projection multiplies: the module's output with the identity in that place."""
    from ..host import swapped

    host, W = module.__dict__.get("_rankfold"), module.out_proj.weight
    slots = {} if host is None else host.slots
    own = {"weight": torch.eye(W.shape[1], dtype=W.dtype, device=W.device)}
    if module.out_proj.bias is not None:
        own["bias"] = torch.zeros_like(module.out_proj.bias)
    try:
        if host is not None:  # adapters that are there already change the other projections
            host.slots = {key: group for key, group in slots.items() if group[0].site.param != "out_proj.weight"}
        with swapped(module.out_proj, own):
            return [module.forward(*args, **kwargs)[0]]
    finally:
        if host is not None:
            host.slots = slots


def build(program: Program, plan: str, memory: str) -> Tensor:
    """W' [out, in] in at least float32, by the plans that attention allows: effective (rebuilt in the backward pass) and plain.

    Raises:
        OptionError: no such plan or memory mode.
        LayoutError: another plan; or a base that trains, under "effective".
    """
    from ..planner import require_known

    require_known(plan, memory)
    if plan in ("fused", "structured"):
        raise LayoutError(f"plan {plan!r}: nn.MultiheadAttention takes its weights whole; allowed here: effective, plain")
    if plan == "effective" and program.base.trains():
        raise LayoutError("plan 'effective': the base weight trains too, and this plan has no gradient for it; use plan='plain'")
    with torch.autocast(program.base.device.type, enabled=False):
        pure = torch.compiler.is_compiling() or program.base.trains() or torch._C._functorch.peek_interpreter_stack() is not None
        if plan == "plain" or pure or not torch.is_grad_enabled():
            return program.expression().dense()
        return _Built.apply(program, *program.leaves)


class _Built(torch.autograd.Function):
    """W' of the site's tensors; keeps those alone, and builds W' again to pull its gradient back."""

    @staticmethod
    def forward(ctx: Any, program, *leaves):
        ctx.program = program
        ctx.save_for_backward(*leaves)
        return program.expression(leaves).dense()

    @staticmethod
    @once
    def backward(ctx: Any, G):
        with torch.enable_grad(), torch.autocast(G.device.type, enabled=False):
            leaves = [t.detach().requires_grad_(t.requires_grad and t.is_floating_point()) for t in ctx.saved_tensors]
            W = ctx.program.expression(leaves).dense()
        found = iter(torch.autograd.grad(W, [t for t in leaves if t.requires_grad], G, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in leaves)
