"""Which adapters there are: names and their versions, what is loaded, who uses it, and what goes when room is needed.

Bookkeeping alone: a `Loader` reads adapters and puts them on the model. Registering costs a look at a dictionary,
however many there are.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adapterlab.errors import AdapterlabError, BusyError, UnknownAdapterError, UnusableAdapterError, nearest
from adapterlab.serve.pages import Pages, PrefixCache
from adapterlab.serve.requests import AdapterState

Form = Literal["tokens", "pages", "alone"]


@dataclass(eq=False)
class Version:
    """An adapter as it was registered once; the same name registered again is another version.

    Attributes:
        uid: unique among all versions, never used again.
        name: for requests.
        tenant: whose it is, or None.
        number: counts the versions of a name.
        folder: where it lies.
        method: id of its method.
        bytes: it takes; a guess until it was loaded.
        form: how it is computed; None until it was loaded.
        pages: with what it puts in front of every sequence; held as long as it is loaded.
        in_front: how many positions that has.
        shift: by how many positions tokens move.
        state: see `AdapterState`.
        reason: why it is quarantined.
        pinned: never unloaded.
        registered: its name still means it.
        is_loaded: it can be computed with.
        running: sequences that are computed with it.
        waiting: sequences that will be.
        paid: pages that are kept free for it.
    """

    uid: int
    name: str
    tenant: str | None
    number: int
    folder: str
    method: str
    bytes: int
    form: Form | None = None
    pages: list[int] = field(default_factory=list)
    in_front: int = 0
    shift: int = 0
    state: Literal["registered", "loaded", "quarantined"] = "registered"
    reason: str = ""
    pinned: bool = False
    registered: bool = True
    is_loaded: bool = False
    running: int = 0
    waiting: int = 0
    paid: int = 0

    @property
    def key(self) -> str:
        """Its name on the model."""
        return f"served{self.uid}"

    @property
    def room(self) -> int:
        """Pages that there will be more when it is unloaded."""
        return self.paid + len(self.pages)

    def shown(self) -> AdapterState:
        """What is told of it."""
        return AdapterState(
            self.name, self.tenant, self.number, self.folder, self.method, self.form, self.state, self.reason,
            self.pinned, self.running, self.waiting, self.bytes,
        )  # fmt: skip


class Loader(Protocol):
    """Puts adapters on the model and takes them off."""

    def load(self, version: Version, make_room: Callable[[int], bool]) -> bool:
        """Put it on, take the `pages` it needs, and set `form`, `in_front`, `shift` and `bytes`, the pages left out.

        Returns:
            Whether there was room for its pages. If not, or on an error, nothing is left behind.
        """

    def is_at_hand(self, version: Version) -> bool:
        """Say whether loading need not wait for its files, as far as anybody is reading them now."""

    def unload(self, version: Version) -> None:
        """Take it off."""


class Adapters:
    """All versions that are registered, loaded or used.

    Attributes:
        loads: how often one was loaded.
        unloads: how often one had to go.
    """

    def __init__(self, loader: Loader, pages: Pages, cache: PrefixCache, page_bytes: int):
        self.loader, self.pages, self.cache, self.page_bytes = loader, pages, cache, page_bytes
        self.loads = self.unloads = 0
        self._uids = itertools.count(1)
        self._names: dict[tuple[str | None, str], Version] = {}
        self._loaded: OrderedDict[int, Version] = OrderedDict()  # the one used longest ago first

    # ------------------------------------------------------------------ names

    def add(self, name: str, tenant: str | None, folder: str, method: str, size: int) -> Version:
        """Register an adapter; the version that had the name before goes when nobody needs it any more."""
        before = self._names.get((tenant, name))
        number = 1 if before is None else before.number + 1
        version = Version(next(self._uids), name, tenant, number, folder, method, size)
        self._names[tenant, name] = version
        if before is not None:
            self._leave(before)
        return version

    def take_back(self, version: Version, before: Version | None) -> None:
        """Forget a version that cannot be used after all; `before` has its name again, if there was one."""
        if before is None:
            del self._names[version.tenant, version.name]
        else:
            self._names[version.tenant, version.name] = before
            before.registered = True
        self._leave(version)

    def named(self, name: str, tenant: str | None) -> Version | None:
        """Return the version that a name means for exactly this tenant, if it means one."""
        return self._names.get((tenant, name))

    def remove(self, name: str, tenant: str | None) -> None:
        """Forget a name.

        Raises:
            UnknownAdapterError: there is none of this name for exactly this tenant.
        """
        version = self.own(name, tenant)
        del self._names[tenant, name]
        self._leave(version)

    def own(self, name: str, tenant: str | None) -> Version:
        """Return the version that a name means for exactly this tenant.

        Raises:
            UnknownAdapterError: there is none.
        """
        found = self.named(name, tenant)
        if found is None:
            raise self._unknown(name, tenant)
        return found

    def find(self, name: str, tenant: str | None) -> Version:
        """Return the version that a request of a tenant means by a name: its own, or everybody's.

        Raises:
            UnknownAdapterError: there is none.
        """
        found = self._names.get((tenant, name)) or self._names.get((None, name))
        if found is None:
            raise self._unknown(name, tenant, None)
        return found

    def _unknown(self, name: str, *tenants: str | None) -> UnknownAdapterError:
        others = [other for tenant, other in self._names if tenant in tenants]
        return UnknownAdapterError(f"No adapter {name!r} is registered. {nearest(name, others)}")

    def seen_by(self, tenant: str | None, *, every: bool = False) -> list[Version]:
        """Return what a tenant sees, by name; with `every`, all there are."""
        if every:
            return sorted(self._names.values(), key=lambda v: (v.name, v.tenant or ""))
        names = sorted({name for owner, name in self._names if owner in (tenant, None)})
        return [self.find(name, tenant) for name in names]

    def __len__(self) -> int:
        return len(self._names)

    # ------------------------------------------------------------------ memory

    @property
    def loaded(self) -> list[Version]:
        """Those on the model, the one used longest ago first."""
        return list(self._loaded.values())

    def make_room(self, count: int) -> bool:
        """Make pages available: those of prefixes that nobody holds first, then idle adapters.

        Returns:
            Whether there are `count` now; if not, nothing was given up.
        """
        missing = count - self.pages.available
        if missing <= 0:
            return True
        if missing > self.cache.idle + sum(version.room for version in self._idle()):
            return False
        self.cache.give_up(missing)
        for version in list(self._idle()):
            if count <= self.pages.available:
                break
            self.unloads += 1
            self._unload(version)
        return count <= self.pages.available

    def could_hold(self, version: Version | None, count: int) -> bool:
        """Say whether an adapter and so many pages fit at all, beside what is pinned and nothing else."""
        pinned = sum(v.room for v in self._loaded.values() if v.pinned and v is not version)
        own = 0 if version is None else version.room or self._cost(version) + -(-version.in_front // self.cache.size)
        return own + count + pinned <= self.pages.count

    def load(self, version: Version) -> bool:
        """Put a version on the model, if it is not.

        Returns:
            Whether there was room.

        Raises:
            UnusableAdapterError: it is damaged or cannot be served, and is quarantined.
        """
        if version.state == "quarantined":
            raise UnusableAdapterError(version.reason)
        if version.is_loaded:
            self._loaded.move_to_end(version.uid)
            return True
        if not self.make_room(self._cost(version)):
            return False
        try:
            if not self.loader.load(version, self.make_room):
                return False
        except MemoryError:
            return False
        except Exception as error:  # files of strangers, and methods of others
            self.quarantine(version, str(error) if isinstance(error, AdapterlabError) else repr(error))
            raise UnusableAdapterError(version.reason) from error
        self.loads += 1
        version.is_loaded, version.state = True, "loaded"
        self._loaded[version.uid] = version
        paid = self._cost(version)
        version.running += 1  # it makes no room for itself
        fits = self.make_room(paid)
        version.running -= 1
        if not fits:  # it is larger than its files said
            self._unload(version)
            return False
        version.paid = paid
        self.pages.pay(paid)
        return True

    def now(self, version: Version) -> None:
        """Put a version on the model, or say why not.

        Raises:
            UnusableAdapterError: as for `load`.
            BusyError: there is no room.
        """
        if not self.load(version):
            raise BusyError(
                f"There is no room for the adapter {version.name!r}: it takes {version.bytes / 1e6:.1f} MB, and what "
                "is pinned or running leaves less. Unpin one, ask again later, or start with more memory_gb."
            )

    def quarantine(self, version: Version, reason: str) -> None:
        """Let no request use a version any more."""
        if version.state != "quarantined":
            named = f"The adapter {version.name!r} is out of use"
            version.state, version.reason, version.pinned = "quarantined", f"{named}: {reason}", False
        self.settle(version)

    def settle(self, version: Version) -> None:
        """Take a version off the model that no request will use any more."""
        unwanted = version.state == "quarantined" or not (version.registered or version.waiting)
        if unwanted and not version.running:
            if version.is_loaded:
                self._unload(version)
            self.cache.forget(version.uid)

    def close(self) -> None:
        """Take all off the model."""
        for version in self.loaded:
            self._unload(version)

    def _cost(self, version: Version) -> int:
        return math.ceil(version.bytes / self.page_bytes)

    def _idle(self) -> Iterator[Version]:
        """What may be unloaded: first those that nobody waits for."""
        idle = [v for v in self._loaded.values() if not v.running and not v.pinned]
        return iter(sorted(idle, key=lambda v: v.waiting > 0))

    def _unload(self, version: Version) -> None:
        self.loader.unload(version)
        self.pages.pay(-version.paid)
        self.pages.drop(version.pages)
        version.paid, version.pages, version.is_loaded = 0, [], False
        version.state = "registered" if version.state == "loaded" else version.state
        del self._loaded[version.uid]

    def _leave(self, version: Version) -> None:
        version.registered = version.pinned = False
        self.settle(version)
