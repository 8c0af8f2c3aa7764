"""Learning from adapters of other tasks: finding them, and steps on mixed tasks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches
from adapterlab.errors import ConfigError, DataError
from adapterlab.hosts import load
from adapterlab.methods.prompt._input_prompt import InputPrompt
from adapterlab.optim import adamw, factor, schedule

Batch = Mapping[str, Tensor]


@contextlib.contextmanager
def opened(host: Carrier, source: str, name: str) -> Iterator[str]:
    """Yield the name of an attached adapter, or that of one which is loaded from a folder inside the context.

    Args:
        host: of the model.
        source: name of an adapter on it, or a folder.
        name: of the adapter that asks.
    """
    if source in host.methods:
        yield source
        return
    key = f"{name}-source"
    found = load(host.model, source, key, active=False)
    try:
        yield key
    finally:
        found.detach(key)


def prompts_of(host: Carrier, names: Iterable[str], length: int) -> list[Tensor]:
    """Return the vectors `[P, d]` that adapters put before the input.

    Raises:
        ConfigError: one is no prompt at the input, or has another length.
    """
    found = []
    for name in names:
        layer = next((a for a in host.adapters(name).values() if isinstance(a, InputPrompt.Layer)), None)
        if layer is None:
            raise ConfigError(
                f"{name!r} ({host.methods[name].id}) puts no vectors before the input, so there is no prompt to learn "
                "from. Train prompts, for example with prompt tuning."
            )
        if layer.count != length:
            raise ConfigError(
                f"{name!r} has {layer.count} virtual tokens and this adapter {length}: all must have as many. Train it "
                f"anew, or attach this one with length={layer.count}."
            )
        with torch.no_grad():
            found.append(layer.vectors().detach().clone())
    return found


def mixed(tasks: Mapping[str, Batches], steps: int, seed: int = 0) -> Iterator[tuple[int, str, Batch]]:
    """Yield a task for each step, drawn in proportion to its number of batches, and its next batch.

    Raises:
        DataError: a task has no batches.
    """
    lists = {name: list(batches) for name, batches in tasks.items()}
    if empty := [name for name, batches in lists.items() if not batches]:
        raise DataError(f"There are no batches of the task of {empty[0]!r}. Give some of every task.")
    draw, turns = random.Random(seed), {name: itertools.cycle(batches) for name, batches in lists.items()}
    names = list(lists)
    for _ in range(steps):
        (name,) = draw.choices(names, [len(lists[one]) for one in names])
        yield names.index(name), name, next(turns[name])


def descend(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, object]],
    losses: Iterable[Callable[[], Tensor]],
    steps: int,
    *,
    lr: float,
    warmup: float = 0.06,
    clip: float | None = None,
) -> list[float]:
    """Follow the gradient of one loss after the other with AdamW and a linear schedule; return the losses."""
    optimizer = adamw(parameters, lr=lr)  # type: ignore[arg-type]
    rates = schedule(optimizer, functools.partial(factor, total=steps, kind="linear", warmup=int(warmup * steps)))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for compute in losses:
        loss = compute()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        rates.step()
        found.append(float(loss.detach()))
    return found


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, and each of its modules back into its own mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
