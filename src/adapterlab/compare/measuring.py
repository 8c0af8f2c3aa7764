"""What a trained adapter costs: time at inference, size on disk, work of a training step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapterlab.compare.results import Inference
from adapterlab.data import placed
from adapterlab.engine.float_products import fast_products
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import evaluating
from adapterlab.errors import AdapterlabError, MergeError
from adapterlab.evaluate.rows import collator_for
from adapterlab.foreign.model import input_device, is_encoder_decoder
from adapterlab.hosts import Host
from adapterlab.plan.tracker import Tracker

_REPEATS = 3


def inference(host: Host, name: str, batch: dict[str, torch.Tensor]) -> Inference:
    """Time a forward pass with the adapter beside the weights and in them, relative to the base model's.

    The fastest of several passes counts: other work on the machine only ever adds time.

    Args:
        host: with the adapter.
        name: of the adapter.
        batch: what the model takes, without labels.
    """
    model: Any = host.model
    plain: list[float] = []
    beside: list[float] = []
    inside: list[float] = []
    why = ""

    def passes(times: list[float], *active: str) -> None:
        with host.using(*active):
            times += [_timed(model, batch) for _ in range(_REPEATS + 1)][1:]  # the first one is for warming up

    with evaluating(model):
        passes(plain)
        passes(beside, name)
        try:
            host.merge(name, tied="untie")
        except MergeError as error:
            why = str(error)
        else:
            passes(inside, name)
            host.restore(name)
        passes(plain)
    base = min(plain)
    merged = min(inside) / base if inside else None
    return Inference(unmerged=min(beside) / base, merged=merged, why_not_merged=why, base_seconds=base)


def base_inference(model: Any, batch: dict[str, torch.Tensor]) -> Inference:
    """Time a forward pass of a model without adapters."""
    with evaluating(model):
        passes = [_timed(model, batch) for _ in range(_REPEATS + 1)]
    return Inference(unmerged=1.0, merged=1.0, base_seconds=min(passes[1:]))


def sample_batch(model: Any, tokenizer: Any, rows: Sequence[Any], size: int = 8) -> dict[str, torch.Tensor]:
    """Make a fixed batch of evaluation rows to time: inputs only, for a model with an encoder with labels."""
    seq2seq = is_encoder_decoder(model)
    device = input_device(model)
    batch = collator_for(model, tokenizer)(rows[:size])
    return placed({key: value for key, value in batch.items() if seq2seq or key != "labels"}, device)


def _timed(model: Any, batch: dict[str, torch.Tensor]) -> float:
    cuda = next(model.parameters()).device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(**batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def step_flops(host: Host, name: str, batch: dict[str, torch.Tensor]) -> float | None:
    """Count the floating point operations of one forward and backward pass; None where they cannot be counted.

    Args:
        host: with the adapter.
        name: of the adapter.
        batch: with labels.
    """
    method = host.methods[name]
    try:
        loss = Loss(host.model)
        with fast_products(host.model), host.state.collect() as extra, Tracker() as tracker:
            method.gradient(host, name, lambda: loss(batch) + sum(extra), lambda value: value.backward())
        return float(tracker.flops)
    except (AdapterlabError, RuntimeError):
        return None
    finally:
        host.model.zero_grad(set_to_none=True)


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
