"""Shifting or stretching the positions that a model sees, whatever kind of position embedding it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.foreign.model import plain_class

_POSITIONS = "position_ids"


def position_sites(host: Carrier) -> list[Site]:
    """Return the modules that turn positions into embeddings: learned tables and rotary embeddings.

    A model with relative biases, or whose inputs have fixed places (image patches), has none.
    """
    return [site for site in host.all_sites() if site.role == "position" or _is_rotary(site.module)]


class Positions(Adapter):
    """Lets a module of `position_sites` see (position + offset) / factor."""

    not_linear: ClassVar[str] = "it changes the positions that the model sees"
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, site: Site, offset: int = 0, factor: float = 1.0):
        super().__init__(site)
        self.offset, self.factor = offset, factor
        self.rotary = _is_rotary(site.module)
        self.rows = None if self.rotary else self.table_rows()
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
        plain: Any = plain_class(self.site.module)
        if not isinstance(self.site.module, nn.Embedding) or plain.forward is not nn.Embedding.forward:
            raise AttachError(
                f"{self.site.path} ({plain.__name__}) computes its positions itself, so they cannot be shifted. Set "
                "the offset to 0."
            )
        return self.site.module.num_embeddings

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module on the changed positions."""
        given = self.site.bound(args, kwargs)
        key = _POSITIONS if self.rotary else self.site.arguments[0]
        given[key] = self.changed(given[key])
        return run(**given)

    def changed(self, ids: Tensor) -> Tensor:
        """Return the positions to use; whole numbers stay whole unless they are divided.

        Raises:
            AttachError: a learned table is too short.
        """
        # Many tokens need not mean high positions: packed samples begin anew.
        if self.rows is not None and ids.shape[-1] + self.offset > self.rows <= int(ids.max()) + self.offset:
            raise AttachError(
                f"{ids.shape[-1]} tokens after {self.offset} virtual positions need more than the {self.rows} learned "
                f"positions of this model. Shorten the inputs to {max(0, self.rows - self.offset)} tokens, or shorten "
                "the prefix."
            )
        return ids + self.offset if self.factor == 1 else (ids + self.offset) / self.factor


def _is_rotary(module: nn.Module) -> bool:
    plain: Any = plain_class(module)
    return "Rotary" in plain.__name__ and _POSITIONS in inspect.signature(plain.forward).parameters
