"""Evaluation and training mode of a model, put back module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients, and each of its modules back into its own mode afterwards."""
    with dropout_off(model), torch.no_grad():
        yield
