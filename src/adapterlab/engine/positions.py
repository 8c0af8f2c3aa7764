"""Shifting or stretching the positions that a model sees, whatever kind of position embedding it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Front
from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.foreign.model import plain_class

_POSITIONS = "position_ids"
_BEFORE = ("cache_length", "past_key_values_length")  # how many tokens are in the cache: newer name, older name


def position_sites(host: Carrier) -> list[Site]:
    """Return the modules that turn positions into embeddings: learned tables and rotary embeddings.

    A model with relative biases, or whose inputs have fixed places (image patches, frames of sound), has none.
    """
    sites = {site.path: site for site in host.all_sites()}
    return [
        s for path, s in sites.items() if _is_rotary(s.module) or (s.role == "position" and _of_tokens(path, sites))
    ]


def _of_tokens(path: str, sites: Mapping[str, Site]) -> bool:
    """Say whether what looks a table of positions up reads tokens."""
    owner = sites.get(path.rpartition(".")[0])
    return owner is None or "input_ids" in owner.arguments


class Positions(Adapter):
    """Lets a module of `position_sites` see (position + offset) / factor."""

    not_linear: ClassVar[str] = "it changes the positions that the model sees"
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, site: Site, offset: int = 0, factor: float = 1.0):
        super().__init__(site)
        self.offset, self.factor = offset, factor
        self.rotary = _is_rotary(site.module)
        self.rows = None if self.rotary else self.table_rows()
        # A table that numbers the tokens itself takes positions too, or how many tokens are in the cache already.
        taken = self.site.arguments
        self.key = _POSITIONS if self.rotary or _POSITIONS in taken else taken[0]
        self.before = next((name for name in _BEFORE if name in taken), None)
        if not self.rotary and factor != 1:
            raise AttachError(
                f"{site.path} looks learned positions up in a table, which has no entries between them: positions can "
                "be divided only in models with rotary embeddings."
            )

    def table_rows(self) -> int:
        """Number of positions that a learned table has.

        Raises:
            AttachError: the module is not looked up by position.
        """
        plain, table = plain_class(self.site.module), self.site.module
        given = plain.forward is nn.Embedding.forward or _POSITIONS in self.site.arguments
        if not isinstance(table, nn.Embedding) or not given:
            raise AttachError(
                f"{self.site.path} ({plain.__name__}) computes its positions itself, so they cannot be shifted. Set "
                "the offset to 0."
            )
        return table.num_embeddings - int(getattr(table, "offset", 0))

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module on the changed positions."""
        given = self.site.bound(args, kwargs)
        if given.get(self.key) is None and self.before is not None:
            seen = given.get(self.before) or 0
            tokens = given[self.site.arguments[0]].shape[1]
            self.check_room(tokens, seen + tokens - 1)
            given[self.before] = seen + self.offset
        else:
            given[self.key] = self.changed(given[self.key])
        return run(**given)

    def serving(self) -> Front | None:
        return Front(shift=self.offset) if self.factor == 1 else None

    def changed(self, ids: Tensor) -> Tensor:
        """Return the positions to use; whole numbers stay whole unless they are divided.

        Raises:
            AttachError: a learned table is too short.
        """
        if self.rows is not None and ids.shape[-1] + self.offset > self.rows:
            self.check_room(ids.shape[-1], int(ids.max()))
        return ids + self.offset if self.factor == 1 else (ids + self.offset) / self.factor

    def check_room(self, tokens: int, last: int) -> None:
        """Raise AttachError where a learned table ends before the last position; packed samples begin anew."""
        if self.rows is not None and self.rows <= last + self.offset:
            raise AttachError(
                f"{tokens} tokens after {self.offset} virtual positions need more than the {self.rows} learned "
                f"positions of this model. Shorten the inputs to {max(0, self.rows - self.offset)} tokens, or shorten "
                "the prefix."
            )


def _is_rotary(module: nn.Module) -> bool:
    plain: Any = plain_class(module)
    return "Rotary" in plain.__name__ and _POSITIONS in inspect.signature(plain.forward).parameters
