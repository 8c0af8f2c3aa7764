"""Why a saved adapter does not go onto a model, told from what its file holds and what the model has.

Another base model is one reason of several, and it is given only where modules, or the sizes of their weights, say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from adapterlab.core.adapter import Adapter
from adapterlab.engine.attachments import Attachments
from adapterlab.errors import nearest
from adapterlab.foreign.model import base_modules, base_name
from adapterlab.io.info import AdapterInfo
from adapterlab.models.catalogue import public_name

_MOST = 8


def refused(info: AdapterInfo, host: Attachments, paths: Iterable[str], error: str) -> str:
    """Say why attaching failed.

    Args:
        info: of the adapter.
        host: of the model.
        paths: of the modules that the file has tensors for.
        error: what attaching said.
    """
    return _of_modules(info, host, paths) or f"The adapter in {info.folder} cannot be put on {_here(host)}: {error}"


def of_places(info: AdapterInfo, host: Attachments, here: Iterable[str]) -> str | None:
    """Say why its settings adapt other modules than they did, or None where they are the same."""
    differing = sorted({*info.modules} ^ {*here})
    if not differing:
        return None
    detail = f"adapted modules differ, for example {', '.join(differing[:4])}"
    return _of_modules(info, host, info.modules, detail) or _another_base(info, host, detail)


def of_tensors(info: AdapterInfo, host: Attachments, name: str, saved: Mapping[str, torch.Tensor]) -> str | None:
    """Say why tensors do not fill an adapter, or None where they do.

    Args:
        info: of the adapter.
        host: of the model.
        name: of the attached adapter.
        saved: the tensors of the file, by the keys of those that the adapter has.
    """
    own, parts = host.tensors(name), host.adapters(name)
    shapes = {key: (value.shape, own[key].shape) for key, value in saved.items() if key in own}
    shapes = {key: (theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours}
    faults = [f"{key}: missing" for key in own if key not in saved]
    faults += [f"{key}: not in this adapter" for key in saved if key not in own]
    faults += [f"{key}: saved {tuple(theirs)}, here {tuple(ours)}" for key, (theirs, ours) in shapes.items()]
    if not faults:
        return None
    more = f"\n  ... and {len(faults) - _MOST} more" if len(faults) > _MOST else ""
    listed = "\n  " + "\n  ".join(faults[:_MOST]) + more
    if any(_is_of_base(parts, key, theirs, ours) for key, (theirs, ours) in shapes.items()):
        return _another_base(info, host, f"sizes differ:{listed}")
    if len(shapes) == len(faults):
        return f"The settings and the tensors in {info.folder} contradict each other:{listed}\nCopy the folder again."
    return (
        f"The tensors in {info.folder} are not those of the {info.method} adapter that its settings speak of:{listed}\n"
        "Copy the whole folder again, or save the adapter again."
    )


def _of_modules(info: AdapterInfo, host: Attachments, paths: Iterable[str], detail: str = "") -> str | None:
    here = {path for path, _ in base_modules(host.model) if path}
    wanted = sorted(set(paths))
    absent = [path for path in wanted if path not in here]
    if not absent:
        return None
    inner, outer = _part(wanted, here), _around(wanted, here)
    if inner:
        return (
            f"The adapter in {info.folder} was made for a part of {_here(host)}: it calls {inner}.{wanted[0]} "
            f"{wanted[0]}. Load it onto that part, the module {inner!r}."
        )
    if outer:
        return (
            f"The adapter in {info.folder} was made for a model around this {type(host.model).__name__}: it calls "
            f"{wanted[0].removeprefix(outer)} {wanted[0]}. Load it onto the whole model, with its head."
        )
    missing = f"{len(absent)} of its {len(wanted)} modules are not there, such as {absent[0]}"
    return _another_base(info, host, f"{detail or missing}. {nearest(absent[0], here)}")


def _part(wanted: Sequence[str], here: set[str]) -> str:
    """The path of the part of a model that has all of these modules, or ""."""
    leads = [path.removesuffix(f".{wanted[0]}") for path in here if path.endswith(f".{wanted[0]}")]
    return next((lead for lead in leads if all(f"{lead}.{path}" in here for path in wanted)), "")


def _around(wanted: Sequence[str], here: set[str]) -> str:
    """What stands before the names that a model has for all of these modules, or ""."""
    parts = wanted[0].split(".")
    leads = (".".join(parts[:at]) + "." for at in range(1, len(parts)))
    found = (lead for lead in leads if all(p.startswith(lead) and p.removeprefix(lead) in here for p in wanted))
    return next(found, "")


def _is_of_base(parts: Mapping[str, Adapter], key: str, theirs: torch.Size, ours: torch.Size) -> bool:
    """Say whether a size that differs is one of the base's: of a module that is adapted, or of a base tensor."""
    group, _, rest = key.partition(".")
    part = next((part for path, part in parts.items() if rest.startswith(f"{path}.")), None)
    if group == "base" or part is None:
        return group == "base"
    sizes = {size for value in part.site.module._parameters.values() if value is not None for size in value.shape}
    return len(theirs) != len(ours) or any(
        mine in sizes for other, mine in zip(theirs, ours, strict=True) if other != mine
    )


def _another_base(info: AdapterInfo, host: Attachments, detail: str) -> str:
    here = base_name(host.model)
    same = info.base_model is not None and here is not None and public_name(info.base_model) == public_name(here)
    made = repr(info.base_model) if info.base_model and not same else "another base model"
    return f"The adapter in {info.folder} was made for {made} and does not fit {_here(host)}: {detail}"


def _here(host: Attachments) -> str:
    name = base_name(host.model)
    return f"{name!r} ({type(host.model).__name__})" if name else f"this {type(host.model).__name__}"
