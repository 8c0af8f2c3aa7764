"""The events of a method for `transformers.Trainer` and the trainers of TRL.

    with al.hf_trainable(model):
        trainer = GRPOTrainer(model, ..., callbacks=[al.AdapterlabCallback(host, "default")])
    trainer.train()

A model of transformers saves its adapters by itself, whoever asks it to. Of any other module `Trainer` writes the whole
state; the callback puts the adapters beside it in each checkpoint.

What a callback cannot give: a method's own `optimizer` (pass `optimizers=` yourself), `gradient` and `penalty`, and
losses that adapters emit. A method that has any of the last three is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
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
            ConfigError: the method computes loss or gradient in its own way, which no callback can do.
            NotTrainingError: a packed layer of the base gives its input no gradient.
        """
        check_gradient_passes(host)
        self.host, self.name, self.method = host, name, host.methods[name]
        own = [hook for hook in ("gradient", "penalty") if type(self.method).overrides(hook)]
        if own:
            raise ConfigError(
                f"{self.method.id} has its own {' and '.join(own)}, which a callback cannot give to a foreign trainer. "
                "Train it with adapterlab.train."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Before the first step.

        Raises:
            ConfigError: the reference model is to follow the trained one, whose weights it shares.
        """
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                "sync_ref_model=True moves the weights of the reference model, and those are the base's own under an "
                "adapter. Set it to False."
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Before the forward passes of a step."""
        self.method.before_step(self.host, self.name, state.global_step, more["optimizer"])

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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """A checkpoint was written; the adapters of a model that cannot save itself join it."""
        if args.should_save and not is_saved(self.host.model):
            save_adapters(self.host, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Training is over."""
        self.method.finish(self.host, self.name)


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
