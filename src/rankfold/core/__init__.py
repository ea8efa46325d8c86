"""Sites, bases, structures, the planner, hosts: how a change of a weight stands in a model. Names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AXES": "registry", "Entry": "registry", "entries": "registry", "find": "registry", "load_file": "registry",
    "register": "registry", "resolve": "registry",
    "SITE_KINDS": "site", "Site": "site", "Targets": "targets", "every_site": "targets", "find_sites": "targets",
    "kind_named": "kinds", "kind_of": "kinds",
    "find_blocks": "blocks",
    "Options": "options", "option_names": "options",
    "Base": "base", "DenseBase": "base", "base_of": "base",
    "Context": "structure", "Decorator": "structure", "Offset": "structure", "SideModule": "structure", "Spec": "structure",
    "Stack": "structure", "StartContext": "structure", "Structure": "structure", "Tensors": "structure", "kaiming": "structure",
    "TooLarge": "structure", "Unfit": "structure",
    "ScaledStructure": "scaled", "pair": "scaled",
    "layers": "structure", "never_dense": "structure", "trait": "structure",
    "PLANS": "planner", "Program": "planner", "explain": "planner", "run": "planner",
    "Member": "store", "Slot": "store", "Store": "store", "Extra": "store", "store_of": "store",
    "Host": "host", "site_program": "host",
    "attach": "attaching", "check_sites": "attaching", "detach": "attaching", "specs_of": "attaching",
    "add_extra": "extras", "find_extras": "extras",
    "fold": "folding", "unfold": "folding", "folded_weights": "folding",
    "probe": "probing", "call_model": "probing", "CallWatch": "probing",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


if TYPE_CHECKING:
    from .attaching import attach, check_sites, detach, specs_of
    from .base import Base, DenseBase, base_of
    from .blocks import find_blocks
    from .extras import add_extra, find_extras
    from .folding import fold, folded_weights, unfold
    from .host import Host, site_program
    from .kinds import kind_named, kind_of
    from .options import Options, option_names
    from .planner import PLANS, Program, explain, run
    from .probing import CallWatch, call_model, probe
    from .registry import AXES, Entry, entries, find, load_file, register, resolve
    from .scaled import ScaledStructure, pair
    from .site import SITE_KINDS, Site
    from .store import Extra, Member, Slot, Store, store_of
    from .structure import (
        Context,
        Decorator,
        Offset,
        SideModule,
        Spec,
        Stack,
        StartContext,
        Structure,
        Tensors,
        TooLarge,
        Unfit,
        kaiming,
        layers,
        never_dense,
        trait,
    )
    from .targets import Targets, every_site, find_sites
