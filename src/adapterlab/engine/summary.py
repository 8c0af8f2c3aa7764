"""Counting what an adapter trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from adapterlab.foreign.roles import role_of

if TYPE_CHECKING:
    from adapterlab.engine.attachments import Attachments


@dataclass(frozen=True)
class Summary:
    """What one adapter trains.

    Attributes:
        name: of the adapter.
        method: id of its method.
        modules: number of adapted modules by role or last part of the path.
        trainable: number of trainable scalars.
        total: number of scalars of base and adapter together.
        dtypes: number of scalars by dtype, "trainable" and "frozen" apart.
    """

    name: str
    method: str
    modules: dict[str, int]
    trainable: int
    total: int
    dtypes: dict[str, dict[str, int]]

    def __str__(self) -> str:
        where = ", ".join(f"{role} {count}" for role, count in self.modules.items()) or "no module"
        share = 100 * self.trainable / max(1, self.total)
        return f"{self.name} ({self.method}): {self.trainable:,} of {self.total:,} train ({share:.3f} %); on {where}"


def summarise(host: Attachments, name: str) -> Summary:
    """Count what one adapter of a model trains, and the model with it."""
    own = {id(t): t for t in host.tensors(name).values()}
    owned = [p for key in host.parts(name) for p in host.patches[key].values() if p.derive is None]
    away = [p for p in owned if not p.live and p.entries is None]
    replaced = {id(host.model.get_parameter(p.path)) for p in away}
    every = {**{id(p): p for p in host.model.parameters() if id(p) not in replaced}, **own}
    others = {id(t) for n in host.methods if n != name for t in host.tensors(n).values()} - own.keys()
    base = [p for key, p in every.items() if key not in others]
    dtypes: dict[str, Counter[str]] = {"trainable": Counter(), "frozen": Counter()}
    trained = {id(p) for p in host.parameters(name)} | {id(p.trained) for p in away}
    for p in base:
        dtypes["trainable" if id(p) in trained else "frozen"][str(p.dtype).removeprefix("torch.")] += numel(p)
    keys = host.parts(name)
    roles = Counter(role_of(p) or p.rpartition(".")[2] or "model" for key in keys for p in host.adapters(key))
    roles.update("base " + (role_of(p.path.rpartition(".")[0]) or "tensors") for p in owned)
    return Summary(
        name, host.methods[name].id, dict(roles), sum(dtypes["trainable"].values()), sum(map(numel, base)),
        {key: dict(count) for key, count in dtypes.items()},
    )  # fmt: skip


def numel(tensor: Tensor) -> int:
    """Number of logical scalars; a packed 4-bit weight holds two in a byte."""
    state = getattr(tensor, "quant_state", None)
    return int(state.shape.numel()) if state is not None else tensor.numel()
