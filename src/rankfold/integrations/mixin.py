"""What turns a Trainer of transformers, or of a library built on it, into one that trains an adapter.

Steps are the Trainer's; optimizer, rank policy, loss terms and files are rankfold's. The rank policy acts at the five points of a
step as in `rankfold.training.loop`: before_forward, after_step and between_steps around the optimizer's step, after_backward
before the Trainer clips, after_clip after it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import TrainerCallback

from rankfold.adapters.native import JSON, TENSORS
from rankfold.atomic import write_text
from rankfold.core.sharding import is_sharded
from rankfold.errors import FileError, LayoutError
from rankfold.training.adaptation import Adaptation, Attached
from rankfold.training.checkpoints import put_back, take_up
from rankfold.training.engine import Engine

from .admission import adaptation_within, admitted, require_one_process_layout, require_ours, require_own_optimizer
from .run_state import load_run_state, save_run_state

if TYPE_CHECKING:
    from typing import Any as _Trainer
else:
    _Trainer = object

__all__ = ["TrainsAdapter"]

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # as `TrainingArguments` has them


class TrainsAdapter(_Trainer):
    """Goes before a Trainer in the list of bases: `class Mine(TrainsAdapter, TheirTrainer): ...`.

    The model carries an adapter already (`rf.adapt`); the first that is on is trained. `learning_rate`, `weight_decay`, the
    schedule, clipping, accumulation, mixed precision, evaluation and DDP are the Trainer's. What is saved is the adapter.

    Raises:
        LayoutError: the model has no adapter or is folded; something beside it trains; DeepSpeed, FSDP or DataParallel.
        OptionError, CompositionError: an optimizer is asked for under which the method would not act.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        if args is not None:
            require_one_process_layout(args)
        self._own_optimizer = True
        self._saved: dict[str, Any] | None = None
        with ExitStack() as entrance:
            self._entrance: ExitStack | None = entrance
            if isinstance(model, nn.Module):
                self._admit(model)
            elif model is not None:
                raise LayoutError(
                    f"model={model!r}: load it and adapt it first, rf.adapt(model, METHOD), then give it to the Trainer"
                )
            super().__init__(model, args, *rest, **options)
        self._entrance = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            require_one_process_layout(_AsLaunched(self.is_deepspeed_enabled, self.is_fsdp_enabled))
        if self.args.n_gpu > 1:
            raise LayoutError(
                f"{self.args.n_gpu} devices in one process: DataParallel copies the model and loses the adapter's gradients. "
                f"Start with torchrun, or leave one device visible"
            )
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        require_own_optimizer(self.adaptation, self.args, given)
        self._own_optimizer = not given
        self.add_callback(_EndOfRun(self))

    # the adapter

    @property
    def adaptation(self) -> Adaptation:
        """The handle of the model that trains."""
        return adaptation_within(self.model)

    @property
    def _attached(self) -> Attached:
        return self.adaptation._get(None)

    def _admit(self, model: nn.Module) -> None:
        require_ours(model, adaptation_within(model))
        if is_sharded(model):
            raise LayoutError(
                "the base is cut over processes (FSDP2): the Trainer would wrap and save it whole; train it with the loop"
            )
        if self._entrance is not None:
            self._entrance.enter_context(admitted(model))

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        self._admit(model)
        return model

    # a step

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As the library's; every call is a run of its own. `resume_from_checkpoint=True` takes the newest whole checkpoint."""
        self._saved = None
        if self._own_optimizer:
            self.optimizer, self.lr_scheduler = None, None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_newest(Path(self.args.output_dir)))
        return super().train(resume_from_checkpoint, *args, **options)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """That of the method's update, with the rank policy around its steps."""
        if not self._own_optimizer:
            return super().create_optimizer(*args, **options)
        if self.optimizer is None:
            total = self.state.max_steps if self.state.max_steps > 0 else self.args.max_steps
            self.optimizer = self.adaptation.optimizer(
                self.args.learning_rate, self.args.weight_decay, total_steps=total if total > 0 else None, **self._adam()
            )
        return self.optimizer

    def _adam(self) -> dict[str, Any]:
        """Adam's numbers where the user chose them; else the update's own stand."""
        chosen = {name: getattr(self.args, name) for name in ADAM}
        if chosen == ADAM:
            return {}
        return {"betas": (chosen["adam_beta1"], chosen["adam_beta2"]), "eps": chosen["adam_epsilon"]}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        """The library's loss; while training, the method's own terms are added."""
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **options
        )
        terms = self.adaptation.objectives() if self.model.training else {}
        if not terms:
            return result
        loss, outputs = result if return_outputs else (result, None)
        share = 1 / self.current_gradient_accumulation_steps if self._joined_by_loss(num_items_in_batch) else 1.0
        for term in terms.values():
            loss = loss + share * term
        return (loss, outputs) if return_outputs else loss

    def _joined_by_loss(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is a share of the step's mean already; else the Trainer divides it by the batches of the step."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        return self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The library's, after the policy has seen the gradients. In float16 they are scaled back before; where they overflow the
        step will be left out, and the policy sees none of it."""
        engine, scaler = self._engine, self.accelerator.scaler
        if engine is None:
            return super()._clip_grad_norm(model)
        if scaler is not None:
            self.accelerator.unscale_gradients()
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if not norm.isfinite():
                return norm
        engine.run("after_backward", engine.step + 1, self.state.max_steps, self.optimizer)
        if scaler is not None:  # the library's would scale back once more
            return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    @property
    def _engine(self) -> Engine | None:
        return self._attached.engine if self._own_optimizer else None

    # files

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter, what prepares the inputs, and the arguments as JSON; never the base."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        self._attached.trained["steps"] = self.state.global_step
        self.adaptation.save(folder, self._attached.member.name)
        beside = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if beside is not None:
            beside.save_pretrained(str(folder))
        write_text(folder / "training_args.json", self.args.to_json_string())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self._engine
        if engine is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_run_state(output_dir, self.optimizer.state_dict(), self.lr_scheduler.state_dict(), engine.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._own_optimizer:
            self._saved = load_run_state(resume_from_checkpoint)
        put_back(resume_from_checkpoint, self.adaptation)
        if self._saved is not None:
            take_up(self.adaptation, self._saved["engine"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._saved is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(self._saved["optimizer"])
        self.lr_scheduler.load_state_dict(self._saved["scheduler"])

    def _load_best_model(self) -> None:
        try:
            put_back(self.state.best_model_checkpoint, self.adaptation)
        except FileError as error:
            warnings.warn(f"the last state stays, not the best one: {error}", stacklevel=2)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What the library uploads from a checkpoint are files that it knows by name; ours go along."""
        for name in (JSON, TENSORS):
            if self.args.should_save and (Path(checkpoint_folder) / name).is_file():
                shutil.copy(Path(checkpoint_folder) / name, Path(self.args.output_dir) / name)
        super()._push_from_checkpoint(checkpoint_folder)


class _EndOfRun(TrainerCallback):
    """After the last step, and the best state where that was asked for: whether everything took part (law 6), and the policy's
    last word."""

    def __init__(self, trainer: TrainsAdapter) -> None:
        self.trainer = trainer

    def on_train_end(self, *args: Any, **options: Any) -> None:
        engine = self.trainer._engine
        if engine is not None:
            engine.check()
            engine.finalise(self.trainer.optimizer)


class _AsLaunched:
    """What the launcher's environment switched on, in the form of arguments."""

    def __init__(self, deepspeed: bool, fsdp: bool) -> None:
        self.deepspeed, self.fsdp = deepspeed, fsdp


def _newest(folder: Path) -> Path:
    """The checkpoint of the most steps that was written to its end.

    Raises:
        FileError: there is none.
    """
    steps = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    whole = [step for step, path in steps.items() if (path / "trainer_state.json").is_file() and (path / JSON).is_file()]
    if not whole:
        raise FileError(f"{folder}: no whole checkpoint of an adapter here ({len(steps)} folders); start without resuming")
    return steps[max(whole)]
