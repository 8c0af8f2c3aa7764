"""Losses that adapters emit, in a trainer of others: they join the loss that the model returns, and count as it does.

Such a trainer calls the model and does with the result what it likes. The loss in the result is the mean over the
batch's labels, or their sum divided by the number of labels of the whole step; what adapters emit is a mean over the
batch, and gets the same share. Where a trainer makes its loss of the probabilities of tokens, each token that has a
label carries it. Whatever else it does is refused, and a loss whose gradient never comes is an error too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.state import State
from adapterlab.data.encoding import IGNORED
from adapterlab.errors import TrainingError
from adapterlab.foreign.model import divides_by_count, shifts_labels
from adapterlab.foreign.private_transformers import trl_tokens


class Joined:
    """What adapters emit joins the loss of a model, from `begin` to `end`.

    Args:
        model: that the trainer calls.
        state: of the adapters.
        plain: the trainer's loss is the mean of −log p of the labelled tokens, where it is made of those.
        method: for messages.
    """

    def __init__(self, model: nn.Module, state: State, plain: bool, method: str):
        self.model, self.state, self.plain, self.method = model, state, plain, method
        self._hooks: list[Any] = []
        self._open: contextlib.ExitStack | None = None
        self._emitted: list[Tensor] = []
        self._waiting = 0

    def begin(self) -> None:
        """A step begins."""
        self.end()
        self._waiting = 0
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter),
            self.model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def end(self) -> None:
        """Its gradients are complete."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check(self) -> None:
        """Require that everything emitted has had its gradient.

        Raises:
            TrainingError: it has not.
        """
        if self._waiting:
            raise TrainingError(self._refusal("makes its loss of something else than the loss that the model returns"))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and self.state.losses is None:
            self._open = contextlib.ExitStack()
            self._emitted = self._open.enter_context(self.state.collect())

    def _leave(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> Any:
        if self._open is None:
            return None
        self._open.close()
        self._open, emitted = None, self._emitted
        if out is None or not emitted:  # the forward pass failed, or there is nothing to join
            return None
        return self._join(out, kwargs, sum(emitted[1:], emitted[0]))

    def _join(self, out: Any, given: Mapping[str, Any], extra: Tensor) -> Any:
        """Put the losses where the trainer takes its own from."""
        if extra.requires_grad:
            self._waiting += 1
            extra.register_hook(self._arrived)
        named = isinstance(out, Mapping)
        tokens = trl_tokens(out) if named else None
        if tokens is not None:
            if not self.plain:
                raise TrainingError(self._refusal("makes a loss of its own of the probabilities of tokens"))
            log_probs, bears = tokens
            out[log_probs] = out[log_probs] - extra * bears
            return out
        loss = out.get("loss") if named else out[0]
        if not isinstance(loss, Tensor) or loss.dim():
            raise TrainingError(self._refusal("asks the model for no loss"))
        loss = loss + extra.to(loss.device) * self._share(given)
        if not named:
            return (loss, *out[1:])
        out["loss"] = loss
        return out

    def _share(self, given: Mapping[str, Any]) -> float | Tensor:
        """What the mean over the batch counts in the loss of the batch."""
        total = given.get("num_items_in_batch")
        if total is None or not divides_by_count(self.model):
            return 1.0
        labels = given.get("shift_labels")
        if labels is None:
            labels = given["labels"][..., 1:] if shifts_labels(self.model) else given["labels"]
        share: Tensor = (labels != IGNORED).sum() / total
        return share

    def _arrived(self, gradient: Tensor) -> None:
        self._waiting -= 1

    def _refusal(self, why: str) -> str:
        return (
            f"{self.method} has a loss of its own beside the task's, and this trainer {why}, so that it would be lost. "
            "Train with transformers.Trainer (without label smoothing or a loss function of yours), with trl's "
            "SFTTrainer (loss_type='nll'), or with adapterlab.fit; or choose settings without that loss."
        )
