"""The repeated blocks of a model: where side modules stand, and what layer-by-layer passes walk over."""

from __future__ import annotations

from torch import nn

from rankfold.errors import TargetError

from .kinds import kind_of
from .site import Site
from .targets import Targets

__all__ = ["find_blocks"]


def _width(model: nn.Module, block: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in ("hidden_size", "d_model", "n_embd"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return int(linear[-1].weight.shape[0])


def find_blocks(model: nn.Module, targets: Targets) -> list[Site]:
    """The blocks of the model's longest list of equal modules, as sites of kind "block".

    Raises:
        TargetError: no repeated block, or a pattern that names none.
    """
    lists: list[tuple[int, str, nn.ModuleList | nn.Sequential]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module):
            same = len({getattr(type(m), "_native", type(m)) for m in module}) == 1
            if same and all(any(kind_of(m) for m in block.modules()) for block in module):
                lists.append((len(module), name, module))
    if not lists:
        raise TargetError(f"{type(model).__name__} has no list of equal blocks beside which a side module could stand")
    _, name, blocks = max(lists, key=lambda item: item[0])
    sites = [Site(f"{name}.{k}" if name else str(k), (w := _width(model, b), w), "block") for k, b in enumerate(blocks)]
    wanted = sites if targets.automatic else [s for s in sites if any(targets.matches(p, s.name) for p in targets.patterns)]
    chosen = [s for s in wanted if not any(targets.matches(p, s.name) for p in targets.exclude)]
    if not chosen:
        raise TargetError(
            f"targets: {', '.join(targets.patterns)} names none of the {len(sites)} blocks {sites[0].name} ... {sites[-1].name}"
        )
    return chosen
