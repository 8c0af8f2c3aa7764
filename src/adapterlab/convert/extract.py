"""A LoRA adapter of a fully tuned model, or of an adapter of another linear method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from adapterlab.convert.building import Conversion, draft_of
from adapterlab.convert.changes import AdapterChanges, Change, Changes, ModelChanges
from adapterlab.convert.low_rank import Fit, check_size, fit
from adapterlab.core.host import Host
from adapterlab.core.host import host as host_of

Progress = Callable[[str, int, int], None]
_ENERGY = 0.9


def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keep: bool = False,
    into: str = "default",
    progress: Progress | None = None,
) -> Conversion:
    """Write the difference of a tuned model and its base as a LoRA adapter on the base, by truncated SVD.

    Linear layers become factors. Embeddings, norms and biases cannot; see `keep`.

    Args:
        base: the model before training; the adapter is attached to it, switched off.
        tuned: the model after training.
        rank: of each module; smaller where the difference has a smaller rank.
        energy: instead of a rank, the share of each module's squared norm to keep. Default: 0.9. Singular values below
            the rounding of the tuned weights (large for bfloat16) are not counted as part of the difference.
        keep: keep all other parameters that changed exactly too, as `modules_to_save` and biases of the factors;
            without it they are left out, and listed in `Conversion.dropped`.
        into: name of the adapter.
        progress: called with the phase, the modules done, and their number.

    Raises:
        ConfigError: rank or energy is not valid.
        FormatError: the models do not belong together.
        MergeError: no weight matrix differs.
    """
    check_size(rank, energy)
    if rank is None and energy is None:
        energy = _ENERGY
    changes = ModelChanges(base, tuned)
    draft = draft_of(
        (c for c in _reported(changes, progress) if c.site.kind != "embedding" and not c.site.tied),
        lambda change: fit(_weight(change), rank, energy, change.floor),
        keep=keep,
    )
    for change in changes:
        if change.site.kind == "embedding" or change.site.tied:
            draft.add(change, lambda change: fit(_weight(change)), keep=keep, low_rank=False)
    return draft.attach(host_of(base) or Host(base), into)


def export_lora(
    host: Host,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    into: str = "lora",
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter of any linear method as a LoRA adapter on the same model.

    Without `rank` and `energy` each module is exact where its change has at most half of the full rank; where it has
    more, 0.9 of the energy are kept.

    Args:
        host: of the model.
        name: of the adapter.
        rank: of each module; smaller where the change has a smaller rank.
        energy: instead of a rank, the share of each module's squared norm to keep.
        into: name of the new adapter. It is attached, and not active.
        progress: called with the phase, the modules done, and their number.

    Raises:
        ConfigError: rank or energy is not valid.
        MergeError: the adapter is not linear, or is merged now.
    """
    check_size(rank, energy)

    def fitted(change: Change) -> Fit:
        source: Any = change.factors if change.factors is not None else _weight(change)
        if rank is not None or energy is not None:
            return fit(source, rank, energy, change.floor)
        found = fit(source, floor=change.floor)
        return found if found.factors.rank <= max(1, min(change.site.shape) // 2) else fit(source, energy=_ENERGY)

    with host.using():
        return draft_of(_reported(AdapterChanges(host, name), progress), fitted).attach(host, into)


def _reported(changes: Changes, progress: Progress | None) -> Iterator[Change]:
    for done, path in enumerate(changes.sites):
        change = changes.at(path)
        if change is not None:
            yield change
        if progress:
            progress("decomposing", done + 1, len(changes.sites))


def _weight(change: Change) -> Any:
    assert change.weight is not None
    return change.weight
