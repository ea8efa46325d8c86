"""A model whose base FSDP2 has cut over processes: cutting it with the adapters left whole, closing it, changing its pieces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rankfold.errors import LayoutError, TargetError

from .bases import is_packed
from .blocks import find_blocks
from .targets import Targets

__all__ = ["close", "is_sharded", "renew", "shard"]


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Cut the base over the processes of torch.distributed by FSDP2: each repeated block, then the rest. Adapters stay whole on
    every process; adapters that come later do so by themselves. Gives the model back.

    Args:
        mesh: a device mesh; None is all processes.
        **options: of `torch.distributed.fsdp.fully_shard` (mp_policy, reshard_after_forward, ...).

    Raises:
        LayoutError: torch.distributed isn't running, the model is cut already, it is folded, or its weights are packed.

    >>> import torch, rankfold as rf
    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)  # alone, to show the form
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> adaptation = rf.adapt(model, "lora", rank=1)
    >>> _ = rf.shard(model)
    >>> type(model[0].weight).__name__, {type(p).__name__ for p in adaptation.parameters()}
    ('DTensor', {'Parameter'})
    >>> torch.distributed.destroy_process_group()
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise LayoutError(
            "shard: torch.distributed isn't running. Start the script by torchrun --nproc_per_node N, and call "
            "torch.distributed.init_process_group() first"
        )
    if is_sharded(model):
        raise LayoutError(f"shard: {type(model).__name__} is cut already")
    store = model._modules.get("rankfold")
    if getattr(store, "is_folded", False):
        raise LayoutError("shard: the model is folded; unfold first")
    if packed := [name for name, module in model.named_modules() if is_packed(module)]:
        raise LayoutError(
            f"shard: {packed[0]} and {len(packed) - 1} more are stored in few bits, which FSDP2 can't cut. Shard the dense base, "
            "or leave the packed one whole on every process: rankfold's own loop under torchrun does"
        )
    from torch.distributed.fsdp import fully_shard

    ignored = set() if store is None else set(store.parameters())
    try:
        blocks = [model.get_submodule(site.name) for site in find_blocks(model, Targets.of("all-linear"))]
    except TargetError:  # nothing is repeated: one piece of work
        blocks = []
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, **options)
    return model


def _cut_modules(model: nn.Module) -> Iterator[Any]:
    library: Any = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody has cut anything
    if library is not None:
        yield from (module for module in model.modules() if isinstance(module, library.FSDPModule))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has cut some of the model.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return next(_cut_modules(model), None) is not None


def close(model: nn.Module) -> None:
    """Every parameter in pieces again: after a forward pass FSDP leaves those of the outermost module whole."""
    for module in _cut_modules(model):
        module.reshard()


def renew(model: nn.Module) -> None:
    """Let FSDP take over the pieces that now stand in the modules, in the place of those that it knew."""
    for module in _cut_modules(model):
        state = module._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            parameter.reset_sharded_param()
