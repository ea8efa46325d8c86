"""What a trainer of another library can't do with an adapted model: found when it is made, and said with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rankfold.core.store import Store
from rankfold.errors import CompositionError, LayoutError, OptionError
from rankfold.training.adaptation import Adaptation, adaptation

__all__ = ["adaptation_within", "admitted", "require_one_process_layout", "require_ours", "require_own_optimizer"]

PLAIN = ("adamw_torch", "adamw_torch_fused")  # the default of `TrainingArguments.optim`, by version of torch


def adaptation_within(model: nn.Module) -> Adaptation:
    """The one handle of a model, or of a model inside it (the encoder of a SentenceTransformer).

    Raises:
        LayoutError: there is none, or more than one.

    >>> import rankfold as rf
    >>> inner = nn.Sequential(nn.Linear(4, 4))
    >>> adaptation_within(nn.ModuleDict({"encoder": inner}))
    Traceback (most recent call last):
    ...
    rankfold.errors.LayoutError: ModuleDict has no adapter; give it one before the Trainer: rf.adapt(model, METHOD)
    >>> handle = rf.adapt(inner, "lora", rank=1)
    >>> adaptation_within(nn.ModuleDict({"encoder": inner})) is handle
    True
    """
    stores = [module for module in model.modules() if isinstance(module, Store)]
    if not stores:
        raise LayoutError(f"{type(model).__name__} has no adapter; give it one before the Trainer: rf.adapt(model, METHOD)")
    if len(stores) > 1:
        raise LayoutError(
            f"{type(model).__name__} holds {len(stores)} adapted models; a Trainer trains one: adapt the model around them"
        )
    handle = adaptation(stores[0].model)
    if stores[0].is_folded:
        raise LayoutError("the model is folded, so its adapter has no part in the forward pass; adaptation.unfold() first")
    return handle


def require_ours(model: nn.Module, handle: Adaptation) -> None:
    """Nothing beside the adapter may train: it would be in no checkpoint, and in no group of the optimizer.

    Raises:
        LayoutError: naming what trains.
    """
    owned = {id(p) for p in handle.store.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    if others:
        raise LayoutError(
            f"beside the adapter {len(others)} parameters train ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): "
            f"they would be in no checkpoint. Train them as the adapter's own, rf.adapt(..., extras={others[:1]}), or freeze them"
        )


def require_one_process_layout(args: Any) -> None:
    """One process, or several that each hold the whole model (DDP).

    Raises:
        LayoutError: DeepSpeed, FSDP or DataParallel.
    """
    if getattr(args, "deepspeed", None):
        raise LayoutError(
            "deepspeed: its engine cuts and steps the parameters itself, so neither the method's update nor its rank policy "
            "would act, and a checkpoint would hold pieces. Use DDP (torchrun), or FSDP2 with rankfold's own loop"
        )
    if getattr(args, "fsdp", None):
        raise LayoutError(
            "fsdp: accelerate would cut the adapter together with the base (and FSDP1 wants one dtype for both). Use DDP "
            "(torchrun), or rankfold.training.loop on a model whose base FSDP2 has cut: rankfold.core.sharding.shard(model)"
        )


def require_own_optimizer(handle: Adaptation, args: Any, given: bool) -> None:
    """The optimizer is the method's. Another one may stand in for plain AdamW, where nothing acts around its steps.

    Args:
        given: whether the user brought an optimizer.

    Raises:
        OptionError: `optim` asks for another one. CompositionError: one was brought, and the method needs its own.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in PLAIN or args.optim_args:
        asked = f"optim={optim!r}" + (f", optim_args={args.optim_args!r}" if args.optim_args else "")
        raise OptionError(
            f"{asked}: the method makes the optimizer. Choose "
            f"its update in rf.adapt(model, '...+update:NAME') (rankfold methods lists them), or bring an optimizer: "
            f"Trainer(optimizers=(optimizer, None))"
        )
    m = handle.method
    needs = [f"update {m.update.name!r}"] if m.update.own else []
    needs += [f"rank policy {m.rank.name!r}"] if m.rank.steps else []
    needs += [f"loss {loss.name!r}" for loss in m.losses]
    if given and needs:
        raise CompositionError(
            f"an optimizer was brought, and {m}: {', '.join(needs)} would not act under it; leave `optimizers` out, or choose "
            f"update:adamw and rank:fixed"
        )


@contextmanager
def admitted(model: nn.Module) -> Iterator[None]:
    """Within the block transformers knows that a quantised model carries adapters; for its check there are peft's alone.

    What can train on which storage is decided where a site is adapted: a format without a backward product is refused there.
    A compiled quantised model stays refused by transformers.
    """
    library: Any = model
    if (
        not getattr(model, "is_quantized", False)
        or getattr(model, "_hf_peft_config_loaded", False)
        or hasattr(model, "_orig_mod")
    ):
        yield
        return
    library._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del library._hf_peft_config_loaded
