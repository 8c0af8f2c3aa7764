"""Modes that a model is in for a while, and what a trial must not leave behind: random numbers, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from adapterlab.engine.attention import fast_attention
from adapterlab.engine.float_products import fast_products
from adapterlab.engine.norms import lean_norms


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def draws(compute: Callable[[], object]) -> bool:
    """Say whether a computation takes random numbers of torch; the generators are put back."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(cards):
        before = _generators()
        compute()
        return not all(map(torch.equal, before, _generators()))


def _generators() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


@contextlib.contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters begin without gradients, and give them back those they had before."""
    before = [(p, p.grad) for p in parameters]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in before:
            p.grad = gradient


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients, and each of its modules back into its own mode afterwards."""
    with dropout_off(model), torch.no_grad(), fast_products(model):
        yield


@contextlib.contextmanager
def fast_passes(model: nn.Module) -> Iterator[None]:
    """Let passes forward and back take all fast paths; inside itself it costs next to nothing."""
    with fast_attention(model), lean_norms(model), fast_products(model):
        yield
