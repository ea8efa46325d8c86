"""Runs a rank policy during training: gives it views of the sites, applies its edits, keeps what must survive a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold.core.sharding import is_sharded
from rankfold.core.store import Member, Store
from rankfold.core.structure import added
from rankfold.errors import FileError, InactiveError, LayoutError, OptionError

from .bucket import Bucket
from .contracts import POINTS, Edit, Loss, RankPolicy, SiteView
from .edits import apply, keys_by_role
from .processes import process_count

__all__ = ["Engine", "engine_of_next_run"]


class Engine:
    """A policy at work on one adapter.

    `install` hooks it to an optimizer, so that a plain loop (forward, backward, step) is enough; a loop that reaches the points
    of a step itself calls `run(point, t, total, optimizer)` there, and the hooks leave out what has been run.

    Attributes:
        step: steps of the optimizer so far.
        begun: whether an optimizer has been installed; what a checkpoint restored waits for its own.
        moved: set by every step; whoever looks for foreign optimizers clears it.
        touched: tensors changed by edits so far, by kind of edit.
        history: (step, {site: rank}) at the start and after every change of a rank.
        paces: {tensor: factor per entry by which it moves}; 0 is frozen.
        averages: before each step, average the gradients over processes where the base is cut over them (else whoever
            replicated the model does); False for a loop that has done it itself.
    """

    def __init__(self, policy: RankPolicy, losses: Sequence[Loss], store: Store, member: Member) -> None:
        self.policy, self.losses, self.store, self.member = policy, tuple(losses), store, member
        self.step = 0
        self.begun = False
        self.moved = False
        self.touched: dict[str, int] = {}
        self.paces: dict[str, Tensor] = {}
        self.averages = True
        self.state: dict[str, dict[str, Tensor]] = {key: {} for key in member.slots}
        self.reached: set[str] = set()
        self.calls = 0
        self.history: list[tuple[int, dict[str, int]]] = [(0, self.ranks())]
        self._ran = dict.fromkeys(POINTS, 0)
        self._total: int | None = None
        self._hooks: list[Any] = []
        self._before: dict[str, Tensor] = {}

    # what the policy sees

    def ranks(self) -> dict[str, int]:
        """Rank by site; 0 where the structure has none."""
        return {key: int(getattr(slot.structure.core, "rank", 0) or 0) for key, slot in self.member.slots.items()}

    def views(self) -> list[SiteView]:
        """Every site with its tensors by role: those that train, one of a role."""
        ranks = self.ranks()
        found = []
        for key, slot in self.member.slots.items():
            tensors = {role: self.store.tensor(name) for role, name in keys_by_role(slot).items()}
            tensors = {role: t for role, t in tensors.items() if t.requires_grad}
            found.append(SiteView(key, slot.site, tensors, ranks[key], slot.structure.scale, self.state[key], slot.base))
        return found

    def objectives(self) -> dict[str, Tensor]:
        """Named loss terms of the policy and of the losses."""
        views = self.views()
        return added(self.policy.objectives(views), *(loss.objectives(views) for loss in self.losses))

    # what it does

    def run(self, point: str, t: int, total: int, optimizer: torch.optim.Optimizer | None = None) -> list[Edit]:
        """Let the policy act, if this is its point and it has not acted there at step t (counted from 1) yet.

        Raises:
            OptionError: no such point. LayoutError: an edit of shapes under DDP, which keeps to the tensors that it was given.
        """
        if point not in self._ran:
            raise OptionError(f"point: got {point!r}; a step has {', '.join(POINTS)}")
        if t <= self._ran[point]:
            return []
        self._ran[point] = t
        if not self.policy.steps or point != self.policy.point:
            return []
        self.calls += 1
        with torch.no_grad():
            edits = self.policy.on_step(t, total, self.views())
        self._apply(edits, t, optimizer, training=True)
        return edits

    def finalise(self, optimizer: torch.optim.Optimizer | None = None) -> list[Edit]:
        """The policy's last word, after the last step."""
        with torch.no_grad():
            edits = self.policy.finalise(self.views())
        self._apply(edits, self.step, optimizer)
        return edits

    def _replicated(self) -> bool:
        """Whether somebody else averages the gradients, of tensors that it knows from before."""
        return self.averages and process_count() > 1 and not is_sharded(self.store.model)

    def _apply(self, edits: Sequence[Edit], t: int, optimizer: torch.optim.Optimizer | None, training: bool = False) -> None:
        for edit in edits:
            kind = type(edit).__name__.lower()
            if not edit.shape_stable and training and self._replicated():
                raise LayoutError(
                    f"rank policy {self.policy.name!r} asks for a {kind} at step {t}: that puts new tensors in the place of "
                    f"those whose gradients DDP averages. Train by rankfold.training.loop, or in one process; or choose a policy "
                    f"that masks"
                )
            self.touched[kind] = self.touched.get(kind, 0) + sum(
                apply([edit], self.store, self.member, optimizer, self.paces).values()
            )
            if not edit.shape_stable:
                self.state[edit.site].clear()  # what the policy held of the old shape
        self.moved |= bool(edits)
        ranks = self.ranks()
        if ranks != self.history[-1][1]:
            self.history.append((t, ranks))

    # around an optimizer's step

    def install(self, optimizer: torch.optim.Optimizer, total_steps: int | None = None) -> None:
        """Act around every step of this optimizer; an earlier one is let go.

        Raises:
            InactiveError: (from the first step) nothing of the adapter had a gradient.
        """
        self.uninstall()
        self.begun = True
        self._total = total_steps
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]
        self.run("before_forward", self.step + 1, self._length(), optimizer)

    def uninstall(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _length(self) -> int:
        return self._total if self._total is not None else self.step + 1

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.averages and process_count() > 1 and is_sharded(self.store.model):
            Bucket([t for key in self.member.owned() if (t := self.store.tensor(key)).requires_grad]).all_reduce()
        self._look_for_gradients()
        for point in ("after_backward", "after_clip"):
            self.run(point, self.step + 1, self._length(), optimizer)
        self._before = {key: self.store.tensor(key).detach().clone() for key in self.paces}
        for key, pace in self.paces.items():
            grad = self.store.tensor(key).grad
            if grad is not None:
                grad.masked_fill_(pace == 0, 0.0)  # momentum does not wait behind a frozen entry

    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.moved = True
        with torch.no_grad():
            for key, before in self._before.items():
                tensor, pace = self.store.tensor(key), self.paces[key]
                held = torch.where(pace == 0, before, torch.where(pace == 1, tensor, torch.lerp(before, tensor.detach(), pace)))
                tensor.copy_(held)
        self._before = {}
        for point in ("after_step", "between_steps"):
            self.run(point, self.step, self._length(), optimizer)
        if self._total is None or self.step < self._total:
            self.run("before_forward", self.step + 1, self._length(), optimizer)

    def _look_for_gradients(self) -> None:
        """Law 6: which sites a gradient has reached so far; none at all at a first step is an error."""
        for key, slot in self.member.slots.items():
            if key not in self.reached:
                grads = (self.store.tensor(name).grad for name, _ in slot.binding.values())
                if any(g is not None for g in grads):
                    self.reached.add(key)
        extras = any(self.store.tensor(e.key).grad is not None for e in self.member.extras.values())
        if not self.reached and not extras and self.member.owned():
            raise InactiveError(
                f"adapter {self.member.name!r}: no gradient reached any of its {len(self.member.slots)} sites by the first step. "
                f"Is it switched on (adaptation.use), was loss.backward() called, and does the loss depend on the model's output?"
            )

    def check(self) -> None:
        """At the end of a run: every site had a gradient once, and a policy that steps has been asked.

        Raises:
            InactiveError: naming what did nothing.
        """
        idle = [key for key, slot in self.member.slots.items() if key not in self.reached and self._trains(key)]
        if self.step and idle:
            raise InactiveError(
                f"adapter {self.member.name!r}: in {self.step} steps no gradient reached {', '.join(idle[:5])}"
                f"{' ...' if len(idle) > 5 else ''}; leave them out: exclude={idle[:3]}"
            )
        if self.step and self.policy.steps and not self.calls:
            raise InactiveError(
                f"rank policy {self.policy.name!r} was never asked in {self.step} steps; train with adaptation.optimizer"
            )

    def _device(self, key: str) -> torch.device:
        return self.store.tensor(next(iter(self.member.slots[key].binding.values()))[0]).device

    def _trains(self, key: str) -> bool:
        return any(self.store.tensor(name).requires_grad for name, _ in self.member.slots[key].binding.values())

    # files

    def state_dict(self) -> dict[str, Any]:
        """{"values": what JSON holds, "tensors": {name: tensor}}: what a resume needs beside the adapter and the optimizer."""
        values = {
            "step": self.step,
            "calls": self.calls,
            "ran": dict(self._ran),
            "touched": dict(self.touched),
            "reached": sorted(self.reached),
            "history": [[t, dict(ranks)] for t, ranks in self.history],
        }
        tensors = {f"state/{key}/{name}": t for key, state in self.state.items() for name, t in state.items()}
        tensors |= {f"pace/{key}": pace for key, pace in self.paces.items()}
        return {"values": values, "tensors": tensors}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the member must have the ranks that it had then.

        Raises:
            FileError: saved for other sites or ranks.
        """
        values, tensors = saved["values"], saved["tensors"]
        history = [(int(t), {k: int(r) for k, r in ranks.items()}) for t, ranks in values["history"]]
        if history[-1][1] != self.ranks():
            raise FileError(
                "the saved run's sites or ranks are not this adapter's: load the adapter that was saved beside it first"
            )
        state: dict[str, dict[str, Tensor]] = {key: {} for key in self.member.slots}
        paces = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            site, _, leaf = rest.rpartition("/")
            if kind == "pace" and rest in self.member.owned():
                paces[rest] = tensor.to(self.store.tensor(rest).device, copy=True)
            elif site in state:
                state[site][leaf] = tensor.to(self._device(site), copy=True)
            else:
                raise FileError(f"the saved run holds {name!r}, but this adapter has no such site or tensor")
        self.state, self.paces, self.history = state, paces, history
        self.step, self.calls, self.reached = int(values["step"]), int(values["calls"]), set(values["reached"])
        self.touched = {k: int(v) for k, v in values["touched"].items()}
        self._ran = {point: int(values["ran"][point]) for point in POINTS}


def engine_of_next_run(
    earlier: Engine | None, policy: RankPolicy, losses: Sequence[Loss], store: Store, member: Member
) -> Engine:
    """`earlier` where it was restored from a checkpoint and waits for its optimizer; else a new one, and `earlier` is let go."""
    if earlier is not None and not earlier.begun:
        return earlier
    engine = Engine(policy, losses, store, member)
    if earlier is not None:
        earlier.uninstall()
        engine.moved = earlier.moved  # its last step was ours
    return engine
