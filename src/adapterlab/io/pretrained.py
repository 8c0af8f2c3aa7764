"""What `save_pretrained` of a model with adapters leaves, whoever calls it: adapter folders, and not the whole base.

One adapter is written into the folder itself, each of several into a folder of its name. A trainer's checkpoint also
has `model.safetensors`: the adapters' tensors under the model's own names, which is what `Trainer` looks for, and loads
into the model, when it resumes or takes the best checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapterlab.engine.attachments import Attachments
from adapterlab.engine.loading import own_state
from adapterlab.engine.merge import Merged
from adapterlab.engine.standpoint import bare, carriers, seen_from, showing
from adapterlab.errors import FormatError, OutputError
from adapterlab.foreign.model import plain_path
from adapterlab.foreign.quantized import is_quantized
from adapterlab.foreign.sharding import is_sharded, whole
from adapterlab.io.atomic import new_files
from adapterlab.io.beside import trained_beside
from adapterlab.io.files import read_json
from adapterlab.io.folder import CONFIG, METHOD, STATE, TENSORS, Contents, gather, write_tensors

_MARK = {"adapterlab": "tensors of adapters"}
_WHOLE = (STATE, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def save_pretrained(model: nn.Module, as_before: Callable[[], Any], folder: Path, given: dict[str, Any]) -> Any:
    """Save a model that others ask to save itself.

    Args:
        model: any model of transformers, with adapters on it, around it or inside, or without.
        as_before: saves it as its class does.
        folder: where to.
        given: the other arguments of `save_pretrained`, by name.

    Raises:
        AttachError: the model was changed after attaching, or adapters reach outside of it.
        OutputError: some adapters are merged and some are not, adapters were attached to several parts of the model, or
            the folder holds the weights of a whole model.
    """
    found = carriers(model)
    if not found:
        return as_before()
    if len(found) > 1:
        parts = ", ".join(type(host.model).__name__ for host in found)
        raise OutputError(
            f"Adapters were attached to {len(found)} parts of this {type(model).__name__} ({parts}), and one folder "
            "cannot say which is whose. Save each: al.host(part).save(folder)."
        )
    if found[0].merged:
        return _save_merged(found[0], as_before)
    state: Mapping[str, Tensor] | None = given.get("state_dict")
    if state is not None and not state:  # a caller that keeps the weights in its own way
        return None
    if not given.get("is_main_process", True) and (state is not None or not is_sharded(model)):
        return None
    with showing(model, state or {}):
        seen = seen_from(found[0], model)
        contents = {name: gather(seen, name) for name in seen.methods}
        own: dict[str, Tensor] | None = None
        if "state_dict" in given:  # a trainer, which will look for a state of the model
            own = {
                key: whole(value)
                for key, value in _own(seen, state or model.state_dict(), trained_beside(seen)).items()
            }
    if all(made.leads for made in contents.values()):
        _write(Path(folder), contents, own, seen.active)
    if given.get("push_to_hub"):
        _push(model, folder, given)
    return None


def save_adapters(host: Attachments, folder: Path) -> None:
    """Write every adapter into a folder that holds other things: alone, or in a folder of its name.

    Raises:
        AttachError: the model was changed after attaching.
    """
    contents = {name: gather(host, name) for name in host.methods}
    if all(made.leads for made in contents.values()):
        _put(folder, contents, None, host.active)


def _own(seen: Attachments, state: Mapping[str, Tensor], beside: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return what of a model's state an adapter folder has."""
    places = {key: plain_path(key).rpartition(".")[0] for key in state}
    return own_state(seen, state) | {key: value for key, value in state.items() if places[key] in beside}


def _write(folder: Path, contents: dict[str, Contents], own: dict[str, Tensor] | None, active: tuple[str, ...]) -> None:
    there = [name for name in _WHOLE if (folder / name).exists() and not _is_ours(folder / name)]
    if there and own is not None:
        raise OutputError(
            f"{folder} holds the weights of a whole model ({there[0]}), which a checkpoint of adapters would replace. "
            "Save to another folder."
        )
    written = _put(folder, contents, own, active)
    for name in {TENSORS, CONFIG, METHOD, STATE} - written - {*there}:
        (folder / name).unlink(missing_ok=True)  # of what was saved here before


def _put(
    folder: Path, contents: dict[str, Contents], own: dict[str, Tensor] | None, active: tuple[str, ...]
) -> set[str]:
    """Put the files in their places; return their names."""
    with new_files(folder) as work:
        if len(contents) == 1:
            next(iter(contents.values())).write(work, folder)
        else:
            for name, made in contents.items():
                (work / name).mkdir()
                made.info["active"] = name in active
                made.write(work / name, folder / name)
        if own is not None:
            write_tensors(work / STATE, own, _MARK)
        return {file.name for file in work.iterdir()}


def _is_ours(file: Path) -> bool:
    """Say whether a file of tensors is one that was written here."""
    try:
        with safe_open(file, "pt") as opened:
            return _MARK.items() <= (opened.metadata() or {}).items()
    except (SafetensorError, OSError):
        return False


def _save_merged(host: Attachments, as_before: Callable[[], Any]) -> Any:
    """Save the whole model, as its class does, with what is merged into it."""
    apart = [name for name in host.methods if name not in host.merged]
    if apart:
        raise OutputError(
            f"{', '.join(host.merged)} is merged into the weights, and {', '.join(apart)} is not, so neither the model "
            f"nor an adapter says all. host.restore() the merged one to save adapters, or host.save({apart[0]!r}) and "
            f"host.detach({apart[0]!r}) to save the merged model."
        )
    records = [record for done in host.merged.values() for record in done if isinstance(record, Merged)]
    if any(r.cls is not None for r in records) or any(is_quantized(m) for m in host.model.modules()):
        raise OutputError(
            "The base is packed, so its configuration would not be that of the merged weights. Write the merged model "
            "with adapterlab.convert.merge_into_base, or `adapterlab merge`, which write both."
        )
    biased = [r for r in records if "bias" in r.originals and r.originals["bias"] is None]
    if biased:
        raise OutputError(
            f"Merging gave {len(biased)} modules a bias, which they have none of, and loading the saved model would "
            "drop it. host.restore() and keep the adapter (host.save)."
        )
    with bare(host):
        return as_before()


def _push(model: Any, folder: Path, given: dict[str, Any]) -> None:
    """Upload what `save_pretrained` writes, as `push_to_hub=True` asks."""
    accepted = inspect.signature(model.push_to_hub).parameters
    options = {key: value for key, value in given.items() if key in accepted and value is not None}
    model.push_to_hub(**{"repo_id": folder.name, **options})


def several(folder: str | Path) -> dict[str, bool]:
    """Return the adapters that were saved together below a folder: their names, and whether each was live."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / METHOD).is_file() or (folder / CONFIG).is_file():
        return {}
    found = {}
    for file in sorted(folder.glob(f"*/{METHOD}")):
        try:
            info = read_json(file)
        except FormatError:
            continue
        if isinstance(info.get("active"), bool):
            found[file.parent.name] = info["active"]
    return found
