"""Proof that nothing attached is bypassed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from adapterlab.engine.modes import gradients_aside
from adapterlab.errors import NotTrainingError
from adapterlab.foreign.model import base_modules
from adapterlab.foreign.quantized import stops_gradient

if TYPE_CHECKING:
    from adapterlab.engine.attachments import Attachments


def verify(host: Attachments, batch: Mapping[str, Tensor]) -> None:
    """Run one forward and backward pass: every trainable tensor must get a gradient and every wrapped module a call.

    Args:
        host: of the model.
        batch: arguments of the model, with labels.

    Raises:
        NotTrainingError: something is bypassed, nothing is trainable, or a packed layer stops the gradient.
    """
    check_gradient_passes(host)
    parameters = {key: p for name in host.active for key, p in host.named_parameters(name).items()}
    if not parameters:
        raise NotTrainingError(
            f"Nothing is trainable. Live adapters: {', '.join(host.active) or 'none'}. Activate one that trains; a "
            "method that chooses from data what to train needs method.prepare(host, name, batches) first."
        )
    called: set[str] = set()
    handles = [
        host.module(path).register_forward_hook(lambda *_, path=path: called.add(path))
        for key in host.state.active
        for path, adapter in host.adapters(key).items()
        if not adapter.resident
    ]
    try:
        with gradients_aside(parameters.values()):
            with host.state.collect() as losses:
                loss = host.model(**batch).loss
                (loss + sum(losses)).backward()
            silent = [key for key, p in parameters.items() if p.grad is None]
    finally:
        for handle in handles:
            handle.remove()
    parts = [item for key in host.state.active for item in host.adapters(key).items()]
    # One module of a tied weight may be the one that is used; there the gradient alone tells.
    missed = [path for path, adapter in parts if path not in called and not (adapter.resident or adapter.alike)]
    if missed or silent:
        raise NotTrainingError(_bypassed(missed, silent))


def check_gradient_passes(host: Attachments) -> None:
    """Require that every packed layer gives its input a gradient; without it what lies before learns wrongly.

    Raises:
        NotTrainingError: one does not.
    """
    stuck = [path for path, module in base_modules(host.model) if stops_gradient(module)]
    if stuck:
        raise NotTrainingError(
            f"{len(stuck)} packed layers give their input no gradient, for example {stuck[0]}: torchao rounds the "
            "input there too. Pack the base for training with weights only, for example Int8WeightOnlyConfig."
        )


def _bypassed(missed: list[str], silent: list[str]) -> str:
    lines = []
    if missed:
        lines.append(f"{len(missed)} adapted modules were never called: {', '.join(missed[:5])}.")
    if silent:
        lines.append(f"{len(silent)} trainable tensors got no gradient: {', '.join(silent[:5])}.")
    lines.append(
        "The model computes past them (a fused kernel, an unused tower, code that reads weights directly), or an outer "
        "no_grad hides them. Exclude these modules, or load the model with another implementation (eager attention)."
    )
    return " ".join(lines)
