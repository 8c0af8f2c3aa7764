"""An adapter that lives in part in the base's weights, as what it makes of the original ones: W + B A.

Beside others it could only have steps of its own; as a plain product it is mixed like any other.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import PrivateAttr
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.hosts import Host

Factors = dict[str, tuple[Tensor, Tensor]]  # A `[r, in]` and B `[out, r]` by the path of a module


class WholeChange(Method):
    """Products of given factors beside the original weights."""

    id: ClassVar[str] = "whole change"
    trains: ClassVar[bool] = False

    _factors: Factors = PrivateAttr(default_factory=dict)

    def attach(self, host: Carrier, name: str) -> None:
        """Put each product beside its module."""
        for site in host.all_sites():
            if site.path in self._factors:
                host.wrap(name, site, self.Layer(site, *self._factors[site.path]))

    class Layer(Delta):
        """The product at one module."""

        holds: ClassVar[tuple[str, str] | None] = ("A", "B")

        def __init__(self, site: Site, a: Tensor, b: Tensor):
            super().__init__(site)
            self.A, self.B = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

        def factors(self) -> tuple[Tensor, Tensor]:
            return self.A, self.B


def put_whole_change(carrier: Host, key: str) -> None:
    """Replace an adapter by its whole changes, if it is in the base's weights and its changes are all products."""
    patches, found = carrier.patches[key], Factors()
    for path, adapter in carrier.adapters(key).items():
        if not isinstance(adapter, Delta) or (change := adapter.change()) is None:
            return
        found[path] = change[0].detach().clone(), adapter.scale * change[1].detach()
    if not patches or len(carrier.parts(key)) > 1 or {path.rpartition(".")[0] for path in patches} - found.keys():
        return
    method = WholeChange()
    method._factors.update(found)
    carrier.detach(key)
    carrier.attach(method, key, active=False)
