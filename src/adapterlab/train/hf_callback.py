"""The events of a method for `transformers.Trainer` and the trainers of TRL.

    with al.hf_trainable(model):
        trainer = GRPOTrainer(model, ..., callbacks=[al.AdapterlabCallback(host, "default")])
    trainer.train()

A model of transformers saves its adapters by itself, whoever asks it to. Of any other module `Trainer` writes the whole
state; the callback puts the adapters beside it in each checkpoint.

What a callback cannot give: a method's own `optimizer` (pass `optimizers=` yourself) and `gradient`, and losses that
adapters emit. A method with its own gradient is refused. The gradient of a penalty is there before the backward passes
of a step, which add theirs, so that it is accumulated, averaged over processes and clipped as in our own loop; the loss
that the trainer reports does not hold the penalty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adapterlab.engine.verify import check_gradient_passes
from adapterlab.errors import ConfigError
from adapterlab.foreign.private_transformers import TRAINABLE_FLAG, trl_reference
from adapterlab.foreign.saving import is_saved
from adapterlab.hosts import Host
from adapterlab.io.pretrained import save_adapters
from adapterlab.train.reference import reference_model


class AdapterlabCallback(TrainerCallback):
    """Calls the events of an adapter's method at the right moments of a foreign training loop."""

    def __init__(self, host: Host, name: str):
        """Set which adapter.

        Raises:
            ConfigError: the method computes gradients in its own way, which no callback can do.
            NotTrainingError: a packed layer of the base gives its input no gradient.
        """
        check_gradient_passes(host)
        self.host, self.name, self.method = host, name, host.methods[name]
        self._plain: list[Callable[[float], float]] = []
        self._rates: list[float] = []
        if type(self.method).overrides("gradient"):
            raise ConfigError(
                f"{self.method.id} has its own gradient, which a callback cannot give to a foreign trainer. Train it "
                "with adapterlab.train."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Before the first step.

        Raises:
            ConfigError: the reference model is to follow the trained one, whose weights it shares; or the method's
                schedule does not suit the trainer's.
        """
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                "sync_ref_model=True moves the weights of the reference model, and those are the base's own under an "
                "adapter. Set it to False."
            )
        self.method.begin(self.host, self.name, state.max_steps)
        if type(self.method).overrides("rate"):
            self._plain = _factors(more["lr_scheduler"], self.method.id)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Before the forward passes of a step."""
        optimizer = more["optimizer"]
        self.method.before_step(self.host, self.name, state.global_step, optimizer)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group, plain in zip(optimizer.param_groups, self._plain, strict=False):
            group["lr"] = group["initial_lr"] * self.method.rate(state.global_step, state.max_steps, plain)
        self._begin_gradients(optimizer)

    def _begin_gradients(self, optimizer: Any) -> None:
        """Let gradients start from those of the penalty, multiplied as loss scaling multiplies the loss."""
        penalty = self.method.penalty(self.host, self.name)
        if penalty is None or not penalty.requires_grad:
            return
        parameters = self.host.parameters(self.name)
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for p, gradient in zip(
            parameters, torch.autograd.grad(scale * penalty, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Gradients are complete (and clipped already)."""
        self.method.after_backward(self.host, self.name, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """The optimizer has stepped; gradients are still there."""
        self.method.after_step(self.host, self.name, state.global_step, more["optimizer"])
        for group, rate in zip(more["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate  # what the trainer's schedule goes on from

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """A checkpoint was written; the adapters of a model that cannot save itself join it."""
        if args.should_save and not is_saved(self.host.model):
            save_adapters(self.host, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Training is over."""
        self.method.finish(self.host, self.name)


def _factors(scheduler: Any, method: str) -> list[Callable[[float], float]]:
    """The factor of the learning rate as a function of the step, for each group of the optimizer."""
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate puts its own around it
    if not isinstance(inner, LambdaLR):
        raise ConfigError(
            f"{method} restarts the learning rate, and {type(inner).__name__} is no function of the step. Set "
            "lr_scheduler_type to linear, cosine, constant or another of the kind."
        )
    return [lambda step, factor=factor: factor(step) for factor in inner.lr_lambdas]  # type: ignore[misc]


@contextlib.contextmanager
def hf_trainable(model: nn.Module) -> Iterator[nn.Module]:
    """Let trainers be made of a model with adapters.

    `Trainer` refuses a quantized base unless a flag says that adapters are attached. The flag is removed afterwards,
    because it also changes what `save_pretrained` writes. Trainers of TRL that need a reference model take the base
    under the adapters (`reference_model`) instead of loading it a second time.
    """
    before = getattr(model, TRAINABLE_FLAG, False)
    setattr(model, TRAINABLE_FLAG, True)
    try:
        with trl_reference(model, lambda: reference_model(model)):
            yield model
    finally:
        setattr(model, TRAINABLE_FLAG, before)
