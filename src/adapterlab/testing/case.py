"""What a check works on: one method on one tiny model; and how numbers are compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.method import Method
from adapterlab.foreign.model import is_encoder_decoder
from adapterlab.hosts import Host, host
from adapterlab.optim import adamw
from adapterlab.testing import models

Batch = Mapping[str, Tensor]


class NotApplicable(Exception):
    """A check has nothing to say about this method; the message says why."""


@dataclass(frozen=True)
class Case:
    """One method on one kind of tiny model.

    Attributes:
        method: class of the method.
        family: of the model, see `models.FAMILIES`.
        precision: of its weights, see `models.PRECISIONS`.
    """

    method: type[Method]
    family: str = "llama"
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.method.id} on {self.family} in {self.precision}"

    @property
    def tolerance(self) -> float:
        """Largest difference of logits, relative to the largest, that is rounding; int8 rounds activations too."""
        return {"bf16": 0.05, "fp16": 0.01, "int8": 0.05}.get(self.precision, 1e-5)

    def model(self) -> Any:
        """Return a fresh base model."""
        return models.tiny(self.family, self.precision)

    def make(self, model: nn.Module, **settings: Any) -> Method:
        """Make the method with its example settings, and others in their place."""
        return self.method(**{**self.method.example(model), **settings})

    def batch(self, model: Any, **options: Any) -> dict[str, Tensor]:
        """Return arguments of an adapted model with labels, and whatever else makes all of the method train.

        Args:
            model: made by `models.tiny`.
            options: as for `models.batch`.
        """
        return self.method.example_batch(model, models.batch(model, **options))

    def attach(self, *names: str, model: Any = None, fresh: bool = False, **settings: Any) -> Host:
        """Attach the method and give its trainable tensors random values, as training would.

        Args:
            names: of the adapters, "one" by default; of several only the last is active.
            model: where to; default: a new model.
            fresh: leave the values as they start.
            settings: of the method, in place of the example's.
        """
        model = self.model() if model is None else model
        found = host(model) or Host(model)
        for i, name in enumerate(names or ("one",)):
            found.activate()
            torch.manual_seed(i)
            found.attach(self.make(model, **settings), name)
            found.methods[name].prepare(found, name, [self.batch(model)])
            if not fresh:
                perturb(found, name, seed=i)
        return found


@torch.no_grad()
def perturb(host: Host, name: str, seed: int = 0, size: float = 0.1) -> None:
    """Add normal noise to the trainable tensors of an adapter."""
    draw = torch.Generator().manual_seed(seed)
    for value in host.parameters(name):
        value.add_((torch.randn(value.shape, generator=draw) * size).to(value.device, value.dtype))


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    """What a model answers in eval mode; labels are kept for encoder-decoders only, whose decoder reads them."""
    model.eval()
    given = {k: v for k, v in batch.items() if k != "labels" or is_encoder_decoder(model)}
    found: Tensor = model(**given).logits
    return found.clone()


def gradients(host: Host, name: str, batches: Sequence[Batch], seed: int = 0) -> dict[str, Tensor | None]:
    """Run several forward passes and one backward pass in training mode; gradients by the keys of `Host.tensors`."""
    host.model.train()
    host.model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with host.state.collect() as extra:
        loss = sum(host.model(**batch).loss for batch in batches) + sum(extra)
        penalty = host.methods[name].penalty(host, name)
        (loss if penalty is None else loss + penalty).backward()
    found = {key: None if p.grad is None else p.grad.clone() for key, p in host.named_parameters(name).items()}
    host.model.zero_grad(set_to_none=True)
    host.model.eval()
    return found


def base_tensors(host: Host) -> dict[str, Tensor]:
    """Copies of the base's own tensors by name, adapters left out."""
    state = host.model.state_dict()
    return {key: value.detach().clone() for key, value in state.items() if not host.is_adapter_path(key)}


def optimizer(host: Host, name: str, lr: float = 1e-2, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """The method's own optimizer around an AdamW."""
    make: Any = functools.partial(adamw, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    return host.methods[name].optimizer(host, name, make)


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Require two tensors to be equal up to a share of the largest value.

    Raises:
        AssertionError: they are not, or not all numbers are finite.
    """
    if found.shape != wanted.shape:
        raise AssertionError(f"{what}: the shapes are {tuple(found.shape)} and {tuple(wanted.shape)}")
    found, wanted = found.double(), wanted.double()
    if not bool(found.isfinite().all() and wanted.isfinite().all()):
        raise AssertionError(f"{what}: not all numbers are finite")
    apart = float((found - wanted).abs().max()) if found.numel() else 0.0
    allowed = tolerance * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    if apart > allowed:
        raise AssertionError(f"{what}: they differ by {apart:.3g}, allowed is {allowed:.3g}")


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Require two sets of tensors to be equal to the bit.

    Raises:
        AssertionError: names or bits differ.
    """
    if found.keys() != wanted.keys():
        raise AssertionError(f"{what}: the names differ, for example {sorted(found.keys() ^ wanted.keys())[:4]}")
    other = [key for key, value in wanted.items() if not torch.equal(found[key], value)]
    if other:
        raise AssertionError(f"{what}: {len(other)} tensors differ, for example {', '.join(other[:4])}")


def changed(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Say whether training changed an adapter's tensors; a method may put others in their place at its end."""
    return found.keys() != before.keys() or any(not torch.equal(found[key], before[key]) for key in before)


def require(condition: bool, what: str) -> None:
    """Require a condition.

    Raises:
        AssertionError: it does not hold.
    """
    if not condition:
        raise AssertionError(what)
