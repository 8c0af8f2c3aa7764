"""The events of a method for `transformers.Trainer` and the trainers of TRL.

    with al.hf_trainable(model):
        trainer = GRPOTrainer(model, ..., callbacks=[al.AdapterlabCallback(host, "default")])
    trainer.train()

A model of transformers saves its adapters by itself, whoever asks it to. Of any other module `Trainer` writes the whole
state; the callback puts the adapters beside it in each checkpoint.

What a callback cannot give: a method's own `optimizer` (pass `optimizers=` yourself) and `gradient`. A method with its
own gradient is refused. Losses that adapters emit join the model's, see `train.joined`. The gradient of a penalty is
there before the backward passes of a step, which add theirs, so that it is accumulated, averaged over processes and
clipped as in our own loop; the loss that the trainer reports does not hold the penalty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adapterlab.engine.float_products import fast_products
from adapterlab.engine.recompute import keep_record
from adapterlab.engine.verify import check_gradient_passes
from adapterlab.engine.wrapping import STATE, adapters_of
from adapterlab.errors import ConfigError
from adapterlab.foreign.model import unwrapped
from adapterlab.foreign.private_transformers import TRAINABLE_FLAG, trl_head, trl_reference
from adapterlab.foreign.saving import is_saved
from adapterlab.hosts import Host
from adapterlab.io.pretrained import save_adapters
from adapterlab.train.joined import Joined
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
        self._waiting: list[nn.Parameter] | None = None
        self._joined: Joined | None = None
        self._fast = contextlib.ExitStack()
        if type(self.method).overrides("gradient"):
            raise ConfigError(
                f"{self.method.id} has its own gradient, which a callback cannot give to a foreign trainer. Train it "
                "with adapterlab.train."
            )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Let data parallelism, which looks once before the first step, see what only later steps train."""
        self._waiting = [] if args.world_size == 1 else _waiting(more.get("optimizer"))
        for p in self._waiting:
            p.requires_grad_(True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Before the first step.

        Raises:
            ConfigError: the reference model is to follow the trained one, whose weights it shares; the method's
                schedule does not suit the trainer's; or this callback came too late for several processes.
        """
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                "sync_ref_model=True moves the weights of the reference model, and those are the base's own under an "
                "adapter. Set it to False."
            )
        if self._waiting is None and args.world_size > 1 and (late := _waiting(more["optimizer"])):
            raise ConfigError(
                f"{self.method.id} lets {len(late)} tensors train in later steps, and processes would not share their "
                "gradients: give the callback to the trainer when it is made (callbacks=[...]), not afterwards."
            )
        for p in self._waiting or ():
            p.requires_grad_(False)
        self._waiting = []
        trl_head(self.host.model, _head_seen)
        if not getattr(args, "torch_compile", False):
            keep_record(self.host)
        if self._joined is not None:
            self._joined.end()
        plain = getattr(args, "loss_type", None) == "nll"
        self._joined = Joined(unwrapped(more.get("model") or self.host.model), self.host.state, plain, self.method.id)
        self.method.begin(self.host, self.name, state.max_steps)
        self._fast.close()  # that of a training which ended in an error
        self._fast.enter_context(fast_products(self.host.model))
        if type(self.method).overrides("rate"):
            self._plain = _factors(more["lr_scheduler"], self.method.id)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Before the forward passes of a step."""
        optimizer = more["optimizer"]
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group, plain in zip(optimizer.param_groups, self._plain, strict=False):
            group["lr"] = group["initial_lr"] * self.method.rate(state.global_step, state.max_steps, plain)
        # As in our own loop the method sees the rates of the step, and may give a group another one.
        self.method.before_step(self.host, self.name, state.global_step, optimizer)
        self._begin_gradients(optimizer)
        if self._joined is not None:
            self._joined.begin()

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
        """Gradients are complete (and clipped already).

        Raises:
            TrainingError: the trainer does without what adapters emit.
        """
        if self._joined is not None:
            self._joined.end()
            self._joined.check()
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
        if self._joined is not None:
            self._joined.end()
        self._fast.close()
        self.method.finish(self.host, self.name)


def _waiting(optimizer: Any) -> list[nn.Parameter]:
    """What an optimizer holds for later steps."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [p for group in groups for p in group["params"] if not p.requires_grad]


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
    """Let trainers be made of a model with adapters, on its head too.

    `Trainer` refuses a quantized base unless a flag says that adapters are attached. The flag is removed afterwards,
    because it also changes what `save_pretrained` writes. Trainers of TRL that need a reference model take the base
    under the adapters (`reference_model`) instead of loading it a second time.
    """
    before = getattr(model, TRAINABLE_FLAG, False)
    setattr(model, TRAINABLE_FLAG, True)
    try:
        with trl_reference(model, lambda: reference_model(model)):
            yield model
        trl_head(model, _head_seen)
    finally:
        setattr(model, TRAINABLE_FLAG, before)


def _head_seen(model: nn.Module, head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias `[out, in]` that a head with adapters acts by; None where its own do.

    Raises:
        ConfigError: no weight says what the adapters do.
    """
    around, standing = (
        [a for name, a in adapters_of(m).items() if name in m.__dict__[STATE].active and not a.is_merged]
        for m in (model, head)
    )
    curved = next((a.not_linear for a in standing if a.not_linear), "")
    if around or curved:
        raise ConfigError(
            "This trainer multiplies with the head's weight and does not call "
            + (
                "the model, around which an adapter stands"
                if around
                else f"the head, with an adapter of which {curved}"
            )
            + ". Train with transformers.Trainer or adapterlab.fit."
        )
    if not standing:
        return None
    weight: Any = head.weight
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    zero = head(identity.new_zeros(1, len(identity)))
    return (head(identity) - zero).T, zero[0]
