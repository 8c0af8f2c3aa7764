"""Which adapters of a model are live, and how they are put together: for all rows, by composition, by row or token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.composition import Composition, Parallel, Stack, leaves
from adapterlab.core.method import Method
from adapterlab.core.segments import Who, names_of, segments
from adapterlab.core.site import UNMERGED
from adapterlab.core.state import State
from adapterlab.engine.anatomy import Anatomy
from adapterlab.engine.batch_rows import followed, repeated
from adapterlab.engine.intact import Place, check_heard, hidden
from adapterlab.engine.patches import Patch
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import AttachError
from adapterlab.foreign.model import base_modules

Owner = str | Composition | tuple[str, ...] | None  # of a row or of tokens: an adapter, several, or the plain base


class Switching(Anatomy):
    """A model and what it carries, to be switched on and off.

    Attributes:
        state: what adapters share.
        methods: by the adapter's name.
        patches: base parameters that an adapter owns, by key (its name, or name/part of a composite) and path.
        places: what it came to, by key and path of the module or owned parameter, for `check_intact`.
        merged: what merging changed, by the adapter's name, in order.
        composition: how the live adapters were put together by `activate`; None: in order of attachment.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.state = State(carrier=self)
        self.methods: dict[str, Method] = {}
        self.patches: dict[str, dict[str, Patch]] = {}
        self.places: dict[str, dict[str, Place]] = {}
        self.merged: dict[str, list[Any]] = {}
        self.composition: Stack | None = None
        self._parts: dict[str, dict[str, Method]] = {}

    def check(self, name: str) -> None:
        """Refuse a name that no adapter has.

        Raises:
            AttachError: there is none of this name.
        """
        if name not in self.methods:
            attached = ", ".join(self.methods) or "none"
            raise AttachError(f"There is no adapter {name!r} on this model. Attached: {attached}.")

    def only(self, name: str | None) -> str:
        """Return the name, or that of the one adapter there is.

        Raises:
            AttachError: there is none of this name, or none is named and there are several.
        """
        if name is None and len(self.methods) != 1:
            raise AttachError(f"Say which adapter: {', '.join(self.methods) or 'none is attached'}.")
        name = name if name is not None else next(iter(self.methods))
        self.check(name)
        return name

    def parts(self, name: str) -> list[str]:
        """Return the keys that an adapter consists of: its name, then those of its parts."""
        return [name, *self._parts.get(name, {})]

    def part_methods(self, name: str) -> dict[str, Method]:
        """Return the methods of a composite's parts by key."""
        return dict(self._parts.get(name, {}))

    def adapters(self, name: str) -> dict[str, Adapter]:
        """Return the adapter's parts by the path of their module, in model order."""
        return {p: held[name] for p, m in base_modules(self.model) if name in (held := adapters_of(m))}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the live adapters."""
        return tuple(name for name in self.state.active if name in self.methods)

    @property
    def live(self) -> tuple[str | Composition, ...]:
        """What `activate` takes to make live again what is live now."""
        return self.active if self.composition is None else self.composition.parts

    def activate(self, *names: str | Composition) -> None:
        """Make exactly these adapters live; none means the plain base model.

        Names alone nest in the order in which they were attached. With a composition among them, see
        `core.composition`, they stand behind each other as they are named here.

        Raises:
            AttachError: a name is unknown, two of them own the same base parameter, one's copy of a module hides what
                another has there, one that would be switched off cannot be, or a composition cannot be computed.
        """
        composed = any(isinstance(name, Composition) for name in names)
        used = tuple(dict.fromkeys(leaf for name in names for leaf in leaves(name)))
        for name in used:
            self.check(name)
        if composed:
            self._check_composition(names, used)
        check_heard({key: self.places[key] for name in used for key in self.parts(name)})
        self._switch(used)
        if composed:
            self.composition = Stack(*names)
            self.state.together = self.composition.with_names(self._keys)

    def _keys(self, name: str) -> str | Composition:
        """The keys of an adapter, as a part of a composition."""
        keys = self.parts(name)
        return keys[0] if len(keys) == 1 else Stack(*keys)

    def _check_composition(self, parts: Sequence[str | Composition], names: Sequence[str]) -> None:
        if any(isinstance(part, Parallel) for part in parts):
            raise AttachError(
                "Parallel repeats the batch of a call, so it lasts for a context and stands alone in it: "
                'with host.using(Parallel("a", "b")): model(**batch).'
            )
        inner = [one for part in parts if isinstance(part, Composition) for one in part.within()]
        if all(isinstance(one, Stack) for one in inner):
            return
        for name in names:
            if name in self.merged or any(self.patches[key] for key in self.parts(name)):
                raise AttachError(
                    f"{name!r} lives in the base's own weights, which every part of {inner[0]} would see. Put it "
                    "behind or before others with Stack, or restore it first."
                )

    def check_uncomposed(self, what: str) -> None:
        """Refuse what would change the order of adapters while a composition says another one.

        Args:
            what: would be done.

        Raises:
            AttachError: a composition is live.
        """
        if self.composition is not None:
            raise AttachError(
                f"{', '.join(map(str, self.composition.parts))} is live, which another set of adapters would undo: "
                f"{what} outside of host.using, or after host.activate with plain names."
            )

    def _hide(self, one: str, other: str) -> bool:
        """Say whether one of two adapters has a copy of a module that keeps the other from being computed."""
        return hidden({key: self.places[key] for name in (one, other) for key in self.parts(name)}) is not None

    def _switch(self, names: Sequence[str]) -> None:
        leaving = [key for n in self.methods if n not in names for key in self.parts(n)]
        staying = [key for n in dict.fromkeys(names) for key in self.parts(n)]
        self._check_switch(leaving, staying)
        for key in leaving:
            for patch in self.patches[key].values():
                patch.undo(self.model)
        for key in staying:
            for patch in self.patches[key].values():
                patch.write(self.model)
        self.state.active = tuple(staying)
        self.composition = self.state.together = None

    def _check_switch(self, leaving: list[str], staying: list[str]) -> None:
        owners: dict[str, list[tuple[str, Patch]]] = {}
        for key in staying:
            for path, patch in self.patches[key].items():
                for other, theirs in owners.get(path, []):
                    if patch.clashes(theirs):
                        raise AttachError(f"{other!r} and {key!r} both own {path}: make only one of them active.")
                owners.setdefault(path, []).append((key, patch))
        for key in leaving:
            if key in self.merged:
                raise AttachError(f"{key!r} is merged into the weights: call host.restore({key!r}) first.")
            hidden = [p.path for p in self.patches[key].values() if p.live and self._merged_into(p.path)]
            if hidden:
                merged = ", ".join(self.merged)
                raise AttachError(f"{hidden[0]} has {merged} merged into what {key!r} put there: restore it first.")
            stuck = [p.path for p in self.patches[key].values() if p.original is None]
            if stuck and key in self.state.active:
                raise AttachError(
                    f"{key!r} trains {stuck[0]} in place and was attached without keeping the original, so it "
                    "cannot be switched off. Attach it with the originals kept, or load the base model again."
                )

    @contextlib.contextmanager
    def using(self, *names: str | Composition) -> Iterator[Self]:
        """Make exactly these adapters live inside the context; `using()` is the plain base model.

        With one `Parallel`, each call of the model computes the batch once for each of its parts, with the rows of the
        first part first.

        Raises:
            AttachError: as for `activate`, or for `rows` where there is a `Parallel`.
        """
        if len(names) == 1 and isinstance(names[0], Parallel):
            parts = [(part, 1) for part in names[0].parts]
            with self._mixed(parts), repeated(self.model, self.state):
                yield self
            return
        before = self.live
        self.activate(*names)
        try:
            yield self
        finally:
            self.activate(*before)

    @contextlib.contextmanager
    def rows(self, names: Sequence[Owner]) -> Iterator[Self]:
        """Give each row of a batch its own adapter inside the context.

        Args:
            names: for each row the name of an adapter, several names, a composition, or None for the plain base.

        Raises:
            AttachError: a name is unknown, an adapter is merged, or one lives in the base's own weights (every row
                would see it).
        """
        with self._mixed([(name, 1) for name in names]):
            yield self

    @contextlib.contextmanager
    def tokens(
        self, counted: Sequence[tuple[Owner, int]], *, generators: Mapping[str, torch.Generator] | None = None
    ) -> Iterator[Self]:
        """Give runs of the tokens of a batch their own adapters inside the context.

            with host.tokens([("math", 120), (None, 8), (("math", "polite"), 64)]):
                model(**batch)

        Tokens are counted over the rows of the batch `[rows, length]`, one behind the other, padding included; in
        every call of the model they must be as many. What works on each token by itself takes any runs; what stands
        inside the attention, or around a whole block and changes what that is given, takes whole rows, or whole samples
        of a packed batch whose borders the model is told (`cu_seq_lens_q`).

        Args:
            counted: (the name of an adapter, several names, a composition or None for the plain base; its tokens).
            generators: where adapters take the random numbers of their dropout on the CPU, by name; the others take
                them from torch's global one. An adapter whose generator stands where the global one stood draws the
                masks that it would have drawn alone.

        Raises:
            AttachError: as for `rows`, or a count is no whole number; at the call, the counts do not add up, or an
                adapter cannot have some of the tokens of a row.
        """
        for _, count in counted:
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise AttachError(f"host.tokens takes a whole number of tokens for each entry; received {count!r}.")
        for name in generators or {}:
            self.check(name)
        cuts = [one for who, _ in counted if isinstance(who, Composition) for one in who.within() if one.by_position]
        if cuts:
            raise AttachError(
                f"{cuts[0]} goes by the position of a token in its row, and tokens have owners here: give its parts as "
                "entries of their own."
            )
        self.state.generators = {key: one for name, one in (generators or {}).items() for key in self.parts(name)}
        try:
            with self._mixed(counted, by_token=True):
                yield self
        finally:
            self.state.generators = {}

    @contextlib.contextmanager
    def _mixed(self, counted: Sequence[tuple[Owner, int]], by_token: bool = False) -> Iterator[None]:
        if any(isinstance(who, Parallel) for who, _ in counted):
            raise AttachError("Parallel makes rows and cannot be one: give the rows of its parts one by one.")
        wanted = [() if n is None else n if isinstance(n, tuple) else (n,) for n, _ in counted]
        used = list(dict.fromkeys(leaf for who in wanted for part in who for leaf in leaves(part)))
        kept_apart = [name for name in used if name not in self.methods and self._keeps_apart(name, wanted)]
        used = [name for name in used if name not in kept_apart]
        for name in used:
            self.check(name)
        resident = [n for n in used if any(self.patches[key] for key in self.parts(n))]
        if resident or self.merged:
            raise AttachError(
                f"{(resident or list(self.merged))[0]!r} lives in the base's own weights, which all rows share, so it "
                "cannot be mixed in a batch. Run its rows in a batch of their own with host.using, or restore it first."
            )
        owners = [self._owner(who) for who in wanted]
        for owner in dict.fromkeys(owners):
            check_heard({key: self.places[key] for key in names_of(owner) if key in self.places})
        whole = segments(zip(owners, (count for _, count in counted), strict=True), by_token)
        before = self.live
        self._switch(used)
        self.state.segments = whole
        held = [self.places[key] for name in used for key in self.parts(name)]
        paths = dict.fromkeys(path for places in held for path, place in places.items() if place.adapter is not None)
        try:
            with followed(self.model, paths, self.state, lambda: self.state.segments or whole):
                yield
        finally:
            self.state.segments = None
            self.activate(*before)

    def _keeps_apart(self, name: str, wanted: Sequence[tuple[str | Composition, ...]]) -> bool:
        """Say whether nothing of an adapter is on the model, and what it adds is in `State.products`, for it alone."""
        products = self.state.products
        whose = [who for who in wanted if name in (leaf for part in who for leaf in leaves(part))]
        return products is not None and name in products and all(who == (name,) for who in whose)

    def _owner(self, parts: tuple[str | Composition, ...]) -> Who:
        if any(isinstance(part, Composition) for part in parts):
            return Stack(*parts).with_names(self._keys)
        return tuple(key for name in parts for key in self.parts(str(name)))

    def _merged_into(self, path: str) -> bool:
        """Say whether a merge has put another parameter in place of this one."""
        module, _, leaf = path.rpartition(".")
        found = self.module(module)
        before = found.__dict__.get(UNMERGED)
        return before is not None and before._parameters.get(leaf) is not found._parameters.get(leaf)
