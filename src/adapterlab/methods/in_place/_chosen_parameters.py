"""The engine of methods that train chosen base parameters, or chosen entries of them."""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches
from adapterlab.engine.modes import dropout_off, gradients_aside
from adapterlab.errors import AttachError, DataError, NotTrainingError, TrainingError
from adapterlab.foreign.quantized import is_plain

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Iterator[tuple[Tensor, float]]]
Score = Callable[[str], Tensor]  # parameter's name -> flat float32 scores of its entries, not negative
Budget = tuple[list[str], int]  # parameters, and how many of their entries are chosen

_HIGH, _LOW = 1 << 15, 1 << 16  # number of patterns of the high and low half of a non-negative float32
_INFINITE = 0x7F80  # high half of the first pattern that is not a finite number


# ---------------------------------------------------------------------- what may be chosen


def eligible(host: Carrier, method: str, exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the base parameters that entries may be chosen from.

    Args:
        host: of the model.
        method: its id, for messages.
        exclude: modules whose parameters are left out.

    Raises:
        AttachError: some are stored packed.
    """
    parameters = host.base_parameters(exclude)
    for path, p in parameters.items():
        if not is_plain(p) or not p.dtype.is_floating_point:
            raise AttachError(
                f"{path} is stored packed ({type(p).__name__}, {p.dtype}), and {method} trains entries in place. "
                "Load the base without quantization, exclude the packed modules (exclude=['all-linear']), or "
                "choose a method that adds tensors beside the weights."
            )
    return parameters


def share_of_each(parameters: Mapping[str, nn.Parameter], share: float) -> list[Budget]:
    """Budgets of ⌊share · n⌋ entries for each parameter; one that gets none is left out."""
    counts = [([path], int(share * p.numel())) for path, p in parameters.items()]
    return [budget for budget in counts if budget[1]]


def share_of_all(
    host: Carrier, parameters: Mapping[str, nn.Parameter], share: float, *, exclude: Sequence[str], charge_head: bool
) -> int:
    """Budget of ⌊share · N⌋ entries for all parameters together; not above 0: it leaves none.

    Args:
        host: of the model.
        parameters: that entries are chosen from.
        share: of the entries.
        exclude: modules that do not count among the N.
        charge_head: the modules that train whole are among the N, and paid out of the budget.
    """
    free = sum(p.numel() for p in parameters.values())
    if not charge_head:
        return int(share * free)
    every = sum(p.numel() for p in host.base_parameters(exclude).values())
    return int(share * every) - (every - free)


def none_left(method: str, density: float, parameters: Mapping[str, nn.Parameter]) -> AttachError:
    """The refusal of a budget without entries, where heads may be charged to it."""
    return AttachError(
        f"{method}: density={density} of {sum(p.numel() for p in parameters.values()):,} entries leaves none to train. "
        "Raise density, or set charge_head=False so that modules_to_save are not counted."
    )


def choose(host: Carrier, name: str, budgets: Iterable[Budget], score: Score) -> None:
    """Train the entries with the highest scores, as many as each budget says."""
    for paths, k in budgets:
        own_entries(host, name, top(paths, score, k))


def is_chosen(host: Carrier, name: str) -> bool:
    """Say whether an adapter has its entries."""
    return any(patch.index is not None for patch in host.patches[name].values())


def check_chosen(host: Carrier, name: str, method: str) -> None:
    """Require that an adapter has its entries.

    Raises:
        NotTrainingError: it has none.
    """
    if not is_chosen(host, name):
        raise NotTrainingError(
            f"The {method} adapter {name!r} has not chosen its entries yet, so nothing would train. Call "
            f"host.methods[{name!r}].prepare(host, {name!r}, batches) with labelled batches before training; the "
            "training loop of adapterlab does it by itself."
        )


def own_entries(host: Carrier, name: str, chosen: Mapping[str, Tensor]) -> None:
    """Train the chosen entries, given by parameter as flat positions `[k]`.

    Raises:
        AttachError: a position lies outside its parameter.
    """
    for path, index in chosen.items():
        parameter = host.model.get_parameter(path)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < parameter.numel():
            raise AttachError(
                f"The entries of {path} reach position {int(index.max())}, and it has {parameter.numel()} here: they "
                "were chosen on another base model. Load that one, or choose again."
            )
        host.own(name, path, index=index.to(parameter.device))


def saved_entries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read which entries were trained from the tensors of an adapter: parameter's name -> flat positions `[k]`."""
    found = {}
    for key, value in tensors.items():
        module, is_index, parameter = key.removeprefix("adapter.").rpartition(".index.")
        if is_index and key.startswith("adapter."):
            found[f"{module}.{parameter}"] = value
    return found


# ---------------------------------------------------------------------- scores


def labelled(batches: Batches, count: int | None = None) -> Iterator[Mapping[str, Tensor]]:
    """Yield the batches that bear a label, `count` at most.

    Raises:
        DataError: a batch has no labels, or no row bears one.
    """
    given = 0
    for batch in batches:
        if "labels" not in batch:
            raise DataError(f"Scoring needs batches with labels; one has only {', '.join(batch)}.")
        if bool((batch["labels"] != -100).any()):
            yield batch
            given += 1
            if given == count:
                return
    if not given:
        raise DataError("There is no row with a label to compute scores from. Give batches with labels.")


def rows(batches: Batches, count: int | None = None) -> Iterator[Mapping[str, Tensor]]:
    """Yield single rows that bear a label, as batches of one, `count` at most.

    Raises:
        DataError: a batch has no labels, or no row bears one.
    """
    return labelled(_single(batches), count)


def _single(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    for batch in batches:
        for i in range(len(batch["labels"]) if "labels" in batch else 1):
            yield {key: value[i : i + 1] for key, value in batch.items()}


def own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, float]]:
    """The loss that the model computes, with weight 1."""
    yield model(**batch).loss, 1.0


def accumulate(
    host: Carrier,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Mapping[str, Tensor]],
    term: Callable[[Tensor], Tensor],
    *,
    losses: Losses = own_loss,
    device: torch.device | None = None,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Sum `weight · term(gradient)` over batches, in eval mode, without dropout.

    One dense gradient is alive at a time. What to clip by is therefore measured in a backward pass of its own.

    Args:
        host: of the model.
        parameters: to score, frozen ones too.
        batches: arguments of the model, with labels. For a sum over samples they hold one row each.
        term: for example `torch.square`; receives a float32 gradient.
        losses: the losses of a batch with their weights.
        device: where the sums are kept; default: beside their parameter.
        clip: norm over all parameters that the gradient of a loss is clipped to.

    Returns:
        For each parameter float32 sums in its shape.

    Raises:
        TrainingError: a loss is not finite.
    """
    sums = {
        path: torch.zeros(p.shape, dtype=torch.float32, device=device or p.device) for path, p in parameters.items()
    }
    squares: list[Tensor] = []
    weight = shrunk = 1.0
    measuring = False

    def receive(path: str, gradient: Tensor) -> None:
        if measuring:
            squares.append(gradient.double().square().sum().cpu())
        else:
            sums[path].add_(term(gradient.float() * shrunk).to(sums[path].device), alpha=weight)

    with dropout_off(host.model), _streamed(parameters, receive):
        for number, batch in enumerate(batches):
            for loss, factor in losses(host.model, batch):
                if not math.isfinite(value := float(loss.detach())):
                    raise TrainingError(
                        f"The loss of sample {number + 1} is {value}, so it cannot be scored. Check its "
                        "labels, and that the base weights are finite."
                    )
                weight = factor  # what `receive` sees
                if clip is not None:
                    squares, measuring = [], True
                    loss.backward(inputs=list(parameters.values()), retain_graph=True)
                    shrunk, measuring = clipped(clip, math.sqrt(float(sum(squares)))), False
                loss.backward(inputs=list(parameters.values()), retain_graph=True)
    return sums


def clipped(most: float, norm: float) -> float:
    """The factor that clips a gradient of some norm, as torch does."""
    return min(1.0, most / (norm + 1e-6))


@contextlib.contextmanager
def _streamed(parameters: Mapping[str, nn.Parameter], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand over each gradient as soon as it is complete, and drop it."""
    before = {path: p.requires_grad for path, p in parameters.items()}

    def hook(path: str, p: Any) -> None:
        receive(path, p.grad)
        p.grad = None

    handles = []
    try:
        for path, p in parameters.items():
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(functools.partial(hook, path)))
        with gradients_aside(parameters.values()):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for path, p in parameters.items():
            p.requires_grad_(before[path])


def magnitude(parameters: Mapping[str, nn.Parameter]) -> Score:
    """Score entries by their absolute value."""
    return lambda path: parameters[path].detach().float().abs().flatten()


def noise(parameters: Mapping[str, nn.Parameter], seed: int) -> Score:
    """Score entries at random, the same at every call."""

    def score(path: str) -> Tensor:
        # The generator uses 32 bits of its seed, so both numbers must go into those.
        draw = torch.Generator().manual_seed(zlib.crc32(path.encode(), seed))
        return torch.rand(parameters[path].numel(), generator=draw)

    return score


# ---------------------------------------------------------------------- exact top-k


def top(paths: Sequence[str], score: Score, k: int) -> dict[str, Tensor]:
    """Return the k entries with the highest scores over all parameters, in memory for one parameter at a time.

    Non-negative float32 numbers are ordered like their bits, so counting the bits' high halves, then the low halves
    within one bin, gives the k-th score exactly. Among equal scores the first in order enter.

    Args:
        paths: names of the parameters.
        score: called three times for each; must return the same every time.
        k: how many; at most all.

    Returns:
        Ascending flat positions by parameter; parameters without a chosen entry are left out.
    """
    high = _count(paths, lambda path: _bits(score(path)) >> 16, _HIGH)
    if bool(high[_INFINITE:].any()):
        raise TrainingError("Some scores are not finite: gradients overflow. Load the base model in bf16 or fp32.")
    bin_, rest = _kth(high, k)

    def low_half(path: str) -> Tensor:
        bits = _bits(score(path))
        return bits[bits >> 16 == bin_] & (_LOW - 1)

    low, ties = _kth(_count(paths, low_half, _LOW), rest)
    threshold = (bin_ << 16) | low
    chosen = {}
    for path in paths:
        bits = _bits(score(path))
        equal = (bits == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        taken = bits > threshold
        taken[equal] = True
        index = taken.nonzero().flatten()
        if len(index):
            chosen[path] = index
    return chosen


def _bits(scores: Tensor) -> Tensor:
    return scores.float().contiguous().flatten().view(torch.int32)


def _count(paths: Sequence[str], patterns: Callable[[str], Tensor], bins: int) -> Tensor:
    """Histogram of patterns over all parameters: int64 `[bins]`."""
    total = torch.zeros(bins, dtype=torch.int64)
    for path in paths:
        total += torch.bincount(patterns(path), minlength=bins).cpu()
    return total


def _kth(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and how many of that bin are among the k largest."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, k - above
