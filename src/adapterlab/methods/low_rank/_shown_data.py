"""Running the model on data to see what enters its modules, and which gradients their weights get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.data.encoding import IGNORED
from adapterlab.engine.modes import dropout_off, evaluating
from adapterlab.errors import DataError
from adapterlab.foreign.calls import BOUNDS
from adapterlab.methods.low_rank._starts import Place
from adapterlab.terminal import Terminal

Batch = Mapping[str, Tensor]


def shown(batches: Iterable[Batch], count: int, what: str) -> Iterator[Batch]:
    """Yield `count` batches at most, with a progress bar.

    Raises:
        DataError: there is none.
    """
    given = 0
    for batch in track(_first(batches, count), what, count, transient=True, console=Terminal(stderr=True)):
        given += 1
        yield batch
    if not given:
        raise DataError(f"{what} needs data, and there are no batches. Pass some to prepare(host, name, batches).")


def _first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    yield from (batch for _, batch in zip(range(count), batches, strict=False))


def inputs(host: Carrier, places: Mapping[str, Place], batch: Batch, see: Callable[[str, Tensor], None]) -> None:
    """Run the model once and show what enters each module, as it is: `[..., in]`."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(path, args[0].detach())

    handles = [host.model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in places]
    try:
        with evaluating(host.model):
            host.model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def labelled(x: Tensor, batch: Batch) -> Tensor:
    """Return what entered a module as float32 rows `[tokens, in]`, without tokens that bear no loss.

    Those are left out where rows can be told apart: by the labels, else by the attention mask.
    """
    labels = batch.get("labels")
    mask = _fitting(x, None if labels is None else labels != IGNORED, batch.get("attention_mask"))
    return (x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).float()


def samples(x: Tensor, batch: Batch) -> list[Tensor]:
    """Return the tokens of each row of data that entered a module, padding left out: float32 `[tokens, in]` each.

    Where rows cannot be told apart, such as among the tokens that an expert gets, all of them are one.
    """
    bounds = batch.get(BOUNDS)
    if bounds is not None and x.shape[:-1] == (1, int(bounds[-1])):
        return list(x[0].float().tensor_split(bounds[1:-1].tolist()))
    rows = x.float() if x.dim() > 2 else x.float()[None]
    mask = _fitting(rows, batch.get("attention_mask"), _answered(batch))
    return [row.reshape(-1, x.shape[-1]) if mask is None else row[mask[i]] for i, row in enumerate(rows)]


def _answered(batch: Batch) -> Tensor | None:
    """What is not padding in a decoder of two stacks: its labels have a length of their own."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return None if labels is None or (ids is not None and labels.shape == ids.shape) else labels != IGNORED


def _fitting(x: Tensor, *masks: Tensor | None) -> Tensor | None:
    """The first mask `[batch, time]` that says something of the vectors of x `[batch, time, in]`."""
    fitting = (mask.bool() for mask in masks if mask is not None and mask.dim() > 1 and mask.shape == x.shape[:-1])
    return next(fitting, None)


def mean_gradients(host: Carrier, places: Mapping[str, Place], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Average the gradient of the loss over batches: float32 `[out, in]` by path, for weights that are frozen.

    Each gradient is added up and freed as soon as it is complete, so only one lives beside the sums.

    Raises:
        DataError: a batch bears no labels.
    """
    sums = {path: torch.zeros(place.site.shape, device=place.site.device) for path, place in places.items()}
    count, handles = 0, []

    def hook(path: str) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[path] += places[path].site.matrix(weight.grad).float()
            weight.grad = None

        return collect

    weights = {path: place.site.module._parameters["weight"] for path, place in places.items()}
    others = [p for p in host.model.parameters() if p.requires_grad]
    try:
        for p in others:
            p.requires_grad_(False)
        for path, weight in weights.items():
            assert weight is not None
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(path)))
        with dropout_off(host.model):
            for batch in batches:
                if "labels" not in batch:
                    raise DataError(f"A gradient needs batches with labels; one has only {', '.join(batch)}.")
                count += 1
                with torch.enable_grad():
                    host.model(**batch).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            assert weight is not None
            weight.requires_grad_(False)
        for p in others:
            p.requires_grad_(True)
    return {path: total / max(1, count) for path, total in sums.items()}
