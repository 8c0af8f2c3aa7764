"""Heads that no checkpoint had: an adapter trains and keeps them whole, or someone says that they are random.

The base that an adapter is loaded onto later has other random numbers there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.engine.intact import Place
from adapterlab.errors import AttachError


def without_home(fresh: Sequence[str], places: Mapping[str, Place]) -> list[str]:
    """Return which of the new modules an adapter neither copies nor owns."""
    return [head for head in fresh if not any(_keeps(p.adapter) for p in _at(head, places).values())]


def check_whole(fresh: Sequence[str], places: Mapping[str, Place]) -> None:
    """Require that an adapter does not add to a new module.

    Raises:
        AttachError: it does.
    """
    added = [path for head in fresh for path, p in _at(head, places).items() if not _keeps(p.adapter)]
    if added:
        raise AttachError(
            f"{added[0]} is new: the checkpoint of the base has no numbers for it, so an update of it would be saved "
            "without what it updates. Leave it out of the targets; it is trained and saved whole by default, and when "
            "it is named in modules_to_save."
        )


def _at(head: str, places: Mapping[str, Place]) -> dict[str, Place]:
    return {path: place for path, place in places.items() if f"{path}.".startswith(f"{head}.")}


def _keeps(adapter: Adapter | None) -> bool:
    return adapter is None or isinstance(adapter, Copy) or adapter.resident


def say_random(model: str, name: str, heads: Sequence[str]) -> None:
    """Warn that an adapter is loaded onto a base whose head nobody trained."""
    if heads:
        warnings.warn(
            f"{', '.join(heads)} of {model} was not in the checkpoint of the base, and adapter {name!r} brings none: "
            "its numbers are random and stay so. Load the base that the adapter was trained on, or train it with "
            "modules_to_save.",
            stacklevel=5,
        )
