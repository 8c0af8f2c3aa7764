"""Adapters without modules: what one makes of each token (`Tokenwise`) lies in a table, which the base's modules ask.

To put an adapter on a model makes hundreds of modules, a third of a second in which nobody gets an answer, and in a
step each has to be asked by itself. Of an adapter that was put on the model the table takes all that has that form.
Of adapters of its kind, which differ in their numbers alone, it then learns which tensor of the file is which factor of
which layer, by putting on one with numbers that are known again; and reads the next ones without the model.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Tokenwise
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.engine.products import Products
from adapterlab.engine.resting import behind, may_be_kept, resting
from adapterlab.errors import AdapterlabError
from adapterlab.hosts import Host, host, load
from adapterlab.io.folder import Saved, check_seal
from adapterlab.serve.forward import Forward, Row
from adapterlab.serve.pages import ZERO

_GROWTH = 8  # factors that are made take at most so many times the numbers that they are made of
_KINDS = 256  # of which is remembered how they are read
_MARKS, _PROBE = "served-table", "served-probe"  # names on the model


class Place(NamedTuple):
    """Where in a file the factors of a layer are.

    Attributes:
        number: of the layer.
        a: name of A.
        b: name of B.
        scale: of their product.
        dtype: that they are read in.
    """

    number: int
    a: str
    b: str
    scale: float
    dtype: torch.dtype


class Marks(Method):
    """Nothing, at modules that ask the table: it changes their class."""

    id: ClassVar[str] = "marks"
    trains: ClassVar[bool] = False

    def attach(self, host: Carrier, name: str) -> None:
        """Put nothing anywhere yet."""

    class Mark(Adapter):
        """Nothing."""

        def __init__(self, site: Site):
            super().__init__(site)
            self.idle = True


class Table:
    """What adapters add, by layer.

    Attributes:
        products: computes it.
    """

    def __init__(self, model: Any, forward: Forward, products: Products):
        self.model, self.forward, self.products = model, forward, products
        self._sites: dict[nn.Module, tuple[Site, int, int]] | None = None  # and the widths of input and output
        self._marked: set[nn.Module] = set()
        # By kind; None: one was taken as a whole, and nobody has looked yet; empty: they cannot be read so.
        self._kinds: OrderedDict[str, tuple[Place, ...] | None] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self.products

    def read(self, key: str, saved: Saved) -> int | None:
        """Take an adapter from its file, if one of its kind was taken before.

        Returns:
            The bytes that it takes, or None: it has to be put on the model.

        Raises:
            FormatError: its settings are not those that were saved.
        """
        if saved.kind not in self._kinds:
            return None
        places = self._kinds[saved.kind]
        if places is None:
            places = self._kinds[saved.kind] = self._learnt(saved)
        if not places:
            return None
        check_seal(saved.info)
        found, device = saved.tensors, self.forward.device
        return self.products.take(
            key,
            {n: Tokenwise(found[a].to(device, dtype), found[b].to(device, dtype), s) for n, a, b, s, dtype in places},
        )

    def know(self, kind: str) -> None:
        """Read adapters of a kind from now on: one was taken as a whole, and is right."""
        if kind:
            self._kinds.setdefault(kind, None)
            while len(self._kinds) > _KINDS:
                self._kinds.popitem(last=False)

    def take(self, carrier: Host, key: str) -> int:
        """Take what can be computed so of an adapter that is on the model; what cannot stays there.

        Returns:
            The bytes that it takes here.
        """
        parts = carrier.parts(key)
        at: dict[nn.Module, dict[str, Any]] = {}
        for part in parts:
            for adapter in carrier.adapters(part).values():
                at.setdefault(adapter.site.module, {})[part] = adapter
        found: dict[int, Tokenwise] = {}
        for module, held in at.items():
            number, change = self._number(carrier, module), _change(held)
            if number is None or change is None or not self.products.takes(number, change):
                continue
            found[number] = change
            for part in held:
                carrier.unwrap(part, module)
        size = self.products.take(key, found) if found else 0
        if found and len(found) == len(at) and not any(carrier.patches[part] for part in parts):
            carrier.detach(key)
        return size

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        self.products.drop(key)

    def close(self) -> None:
        """Leave the model as it was."""
        carrier = host(self.model)
        if carrier is not None and _MARKS in carrier.methods:
            carrier.detach(_MARKS)
        self._marked.clear()

    # ------------------------------------------------------------------ kinds

    def _learnt(self, saved: Saved) -> tuple[Place, ...]:
        """Find out which tensor of a file is which factor, or that they are not these factors, as they are."""
        draw = torch.Generator().manual_seed(0)
        made = {name: torch.randn(t.shape, generator=draw).to(t.dtype) for name, t in saved.tensors.items()}
        names = {_beginning(t): name for name, t in made.items()}
        try:
            carrier = load(self.model, Saved(saved.info, made), _PROBE, active=False)
        except AdapterlabError:  # it takes certain numbers alone
            return ()
        try:
            if carrier.parts(_PROBE) != [_PROBE] or carrier.patches[_PROBE]:
                return ()
            places = [self._place(carrier, adapter, made, names) for adapter in carrier.adapters(_PROBE).values()]
        finally:
            carrier.detach(_PROBE)
        known = [place for place in places if place is not None]
        used = [name for place in known for name in (place.a, place.b)]
        return tuple(known) if len(known) == len(places) and sorted(used) == sorted(made) else ()

    def _place(self, carrier: Host, adapter: Any, made: dict[str, Tensor], names: dict[Any, str]) -> Place | None:
        number, found = self._number(carrier, adapter.site.module), resting({"": adapter}, mixed=True)
        if number is None or found is None:
            return None
        one = found[""]
        if not self.products.takes(number, Tokenwise(one.a, one.b)):
            return None
        a, b = (names.get(_beginning(t), "") for t in (one.a, one.b))
        for name, t in ((a, one.a), (b, one.b)):
            if name not in made or not torch.equal(made[name].to(t.device, t.dtype), t):
                return None
        return Place(number, a, b, one.scale, one.a.dtype)

    # ------------------------------------------------------------------ modules

    def _number(self, carrier: Host, module: nn.Module) -> int | None:
        """The number of a module, which asks the table from now on; None where it cannot."""
        if self._sites is None:
            self._sites = self._watched(carrier)
        if module not in self._sites:
            return None
        site, n_in, out = self._sites[module]
        if _MARKS not in carrier.methods:
            carrier.attach(Marks(), _MARKS, active=False)
        if module not in self._marked:
            carrier.wrap(_MARKS, site, Marks.Mark(site))
            self._marked.add(module)
        return self.products.number(module, n_in, out)

    def _watched(self, carrier: Host) -> dict[nn.Module, tuple[Site, int, int]]:
        """The modules that are called once a pass, with all its tokens in one row, and keep the dtype."""
        count, times, widths = 3, dict[nn.Module, int](), dict[nn.Module, tuple[int, int]]()

        def watch(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(y, Tensor)
            fits = fits and args[0].dtype in self.products.way.dtypes and args[0].shape[:-1] == (1, count)
            fits = fits and y.shape[:-1] == (1, count) and (y.dtype, y.device) == (args[0].dtype, args[0].device)
            times[module] = times.get(module, 0) + (1 if fits else 2)
            if fits:
                widths[module] = args[0].shape[-1], y.shape[-1]

        sites = {site.module: site for site in carrier.all_sites() if site.kind in ("linear", "norm", "block")}
        hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in sites]
        try:
            with carrier.using():
                self.forward.run([Row(range(count), 0, [ZERO] * count)])
        finally:
            self.forward.clear([ZERO])
            for hook in hooks:
                hook.remove()
        return {module: (site, *widths[module]) for module, site in sites.items() if times.get(module) == 1}


@torch.no_grad()
def _change(held: dict[str, Any]) -> Tokenwise | None:
    """What the adapters of a module make of each token, or None: it has not that form, or would take much memory."""
    pairs = resting(held, mixed=True)
    if pairs is not None:
        one, *more = pairs.values()
        pair = behind([(p.a, p.scale * p.b) for p in (one, *more)]) if more else (one.a, one.b)
        return Tokenwise(pair[0].detach(), pair[1].detach(), 1.0 if more else one.scale)
    adapter, *others = held.values()
    if others or not may_be_kept(adapter, mixed=True):
        return None
    if adapter.idle or adapter.is_merged or "around" in adapter.__dict__:
        return None
    change = adapter.serving()
    if not isinstance(change, Tokenwise):
        return None
    own = sum(t.numel() for t in (*adapter.parameters(), *adapter.buffers()))
    size = sum(t.numel() for t in (change.a, change.b) if t is not None)
    return change if size <= _GROWTH * own else None


def _beginning(t: Tensor) -> tuple[float, ...]:
    """The first numbers of a tensor: in half precision a single one is that of many others."""
    return tuple(t.flatten()[:8].tolist())
