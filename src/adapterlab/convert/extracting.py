"""A LoRA adapter of a fully tuned model, or of an adapter of another linear method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from adapterlab.convert.building import Conversion, Draft
from adapterlab.convert.changes import AdapterChanges, Change, Changes, ModelChanges
from adapterlab.convert.low_rank import Fit, check_size, fit
from adapterlab.errors import ConfigError
from adapterlab.hosts import Host
from adapterlab.hosts import host as host_of
from adapterlab.io import adapter_hub
from adapterlab.io.atomic import Kind, new_folder, write_json
from adapterlab.io.folder import ADAPTER, CONFIG, METHOD, check_finite, gather, write_tensors
from adapterlab.paths import user_path

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
    host, draft = host_of(base) or Host(base), Draft()
    with host.using():
        for change in _reported(ModelChanges(base, tuned), progress):
            matrix = change.site.kind == "linear" and not change.site.tied
            draft.add(change, lambda c: fit(_weight(c), rank, energy, c.floor), keep=keep, low_rank=matrix)
        return draft.attach(host, into)


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
        MergeError: the adapter is not linear, or changed no weight matrix.
        AttachError: the name `into` is taken, or an adapter is merged now.
    """
    check_size(rank, energy)

    def fitted(change: Change) -> Fit:
        source: Any = change.factors if change.factors is not None else _weight(change)
        if rank is not None or energy is not None:
            return fit(source, rank, energy, change.floor)
        found = fit(source, floor=change.floor)
        return found if found.factors.rank <= max(1, min(change.site.shape) // 2) else fit(source, energy=_ENERGY)

    with host.using():
        draft = Draft()
        for change in _reported(AdapterChanges(host, name), progress):
            draft.add(change, fitted)
        return draft.attach(host, into)


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


def export_adapterhub(host: Host, name: str, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as a folder of AdapterHub's library `adapters`.

    Args:
        host: of the model.
        name: of the adapter.
        folder: where to.
        overwrite: replace an adapter that is there.

    Raises:
        FormatError: the library has no such adapter, or this model was not compared with it.
        OutputError: the folder is not empty, holds something else than an adapter, or cannot be written.
        TrainingError: the adapter holds values that are not finite.
    """
    name = host.only(name)
    host.check_intact(name)
    files = adapter_hub.written(host, name)
    check_finite(name, host.tensors(name))
    folder = user_path(folder)
    top = tuple(dict.fromkeys(path.partition("/")[0] for path in files))
    kind = Kind(ADAPTER.name, (CONFIG, METHOD, adapter_hub.SETUP), (*ADAPTER.holds, *top))
    with new_folder(folder, overwrite=overwrite, kind=kind) as work:
        for path, content in files.items():
            (work / path).parent.mkdir(exist_ok=True)
            write = write_tensors if path.endswith(".safetensors") else write_json
            write(work / path, content)
    return folder


def export_peft(host: Host, name: str, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as a folder with HF PEFT's two files and nothing else.

    Args:
        host: of the model.
        name: of the adapter.
        folder: where to.
        overwrite: replace an adapter that is there.

    Raises:
        ConfigError: PEFT has no such method.
        OutputError: the folder is not empty, holds something else than an adapter, or cannot be written.
        TrainingError: the adapter holds values that are not finite.
    """
    method, found = host.methods[host.only(name)], gather(host, name)
    if found.config is None:
        raise ConfigError(
            f"HF PEFT cannot store this {method.id} adapter. Write it as a LoRA adapter instead, which PEFT reads: "
            "export_lora, or --as lora on the command line."
        )
    folder = user_path(folder)
    with new_folder(folder, overwrite=overwrite, kind=ADAPTER) as work:
        found.write(work, folder, by_peft=True)
    return folder
