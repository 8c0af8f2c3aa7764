"""What was attached, remembered, so that saving and merging never keep less: models are changed from outside too.

A vocabulary is resized, layers are cut off, a module is replaced or packed after attaching. What stood there is gone
from the model then, without an error from anyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.core.site import UNMERGED
from adapterlab.engine.substitute import Substitute
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import AttachError
from adapterlab.foreign.model import base_modules
from adapterlab.foreign.quantized import is_plain
from adapterlab.foreign.sharding import is_elsewhere

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Place:
    """A module that an adapter came to, as it was then.

    Attributes:
        module: which.
        adapter: what stands there, or None where a base parameter is owned, by whose path the place is known.
        shapes: of the module's own parameters, packed ones left out.
    """

    module: nn.Module
    adapter: Adapter | None = None
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = _shapes(self.module)

    def fault(self, now: nn.Module | None, adapter: Adapter | None) -> str:
        """Say how the place differs from what it was, or ""."""
        if now is None:
            return "is no longer in the model"
        if now is not self.module or (self.adapter is not None and adapter is not self.adapter):
            return f"was replaced ({type(now).__name__})"
        if UNMERGED not in now.__dict__:
            for name, shape in _shapes(now).items():
                if self.shapes.get(name, shape) != shape:
                    return f"was resized: {name} had the shape {self.shapes[name]}, and has {shape}"
        own = adapter.named_parameters() if adapter is not None else ()
        packed = [key for key, p in own if not is_plain(p) and not is_elsewhere(p)]
        return f"had {packed[0]} of its adapter packed" if packed else ""


Places = Mapping[str, Mapping[str, Place]]  # by the adapter's key and the path


def _shapes(module: nn.Module) -> Shapes:
    return {
        name: tuple(p.shape)
        for name, p in module._parameters.items()
        if p is not None and is_plain(p) and not is_elsewhere(p)
    }


def check_intact(model: nn.Module, name: str, places: Places) -> None:
    """Require that everything attached under a name is still there; see `Attachments.check_intact`."""
    now = dict(base_modules(model))
    faults: dict[str, str] = {}
    for key, held in places.items():
        for path, place in held.items():
            found = now.get(path if place.adapter is not None else path.rpartition(".")[0])
            fault = place.fault(found, adapters_of(found).get(key) if found is not None else None)
            if fault:
                faults[path or "the model"] = fault
    if faults:
        shown = [f"{path} {fault}" for path, fault in faults.items()]
        more = f"\n  ... and {len(shown) - 5} more" if len(shown) > 5 else ""
        raise AttachError(
            f"The model was changed after {name!r} was attached, and part of the adapter went with it:\n  "
            + "\n  ".join(shown[:5])
            + f"{more}\nWhat is left is not what was attached, so it is not kept in its place. Change the model first "
            "(resize, cut, pack, replace), then attach and train."
        )


def hidden(places: Places) -> tuple[str, str, str] | None:
    """Find a copy of a whole module (`modules_to_save`), or a part, that hides what others of these keys have there.

    Returns:
        Whose, of what, and whose adapter it hides: for a copy another one, or something inside of the module.
    """
    every = [
        (key, path, p.adapter) for key, held in places.items() for path, p in held.items() if p.adapter is not None
    ]
    for key, path, adapter in every if len(places) > 1 else ():
        for other, held in places.items():
            beside = held[path].adapter if path in held else None
            if other != key and (
                _hides(path, key, other, held)
                if isinstance(adapter, Copy)
                else beside is not None and adapter.covers(beside)
            ):
                return key, path, other
    return None


def check_heard(places: Places) -> None:
    """Require that no copy of a whole module hides what others of these keys have there.

    Raises:
        AttachError: one does.
    """
    found = hidden(places)
    if found is not None:
        key, path, other = found
        one, two = (places[name][path].adapter if path in places[name] else None for name in (key, other))
        if one is not None and two is not None and (what := one.covers(two)):
            raise AttachError(
                f"{key!r} and {other!r} both have {what} of {path}, and only one of them would be heard. Make one of "
                f"them active at a time: host.activate({key!r}), or host.activate({other!r})."
            )
        raise AttachError(
            f"{key!r} has its own copy of {path} (modules_to_save), which is computed in its place, so what {other!r} "
            f"has there would have no effect. Make one of them active at a time: host.activate({key!r}), or "
            f"host.activate({other!r})."
        )


def _hides(path: str, key: str, other: str, held: Mapping[str, Place]) -> bool:
    """Say whether the copy that one adapter has at a path keeps another from being computed."""
    if any(place.startswith(f"{path}.") for place in held):
        return True
    here = held[path].adapter if path in held else None
    if here is None:
        return False
    order = list(adapters_of(held[path].module))
    inside = order.index(other) < order.index(key) or here.place == "attention"
    return inside or here.resident or isinstance(here, (Copy, Substitute))
