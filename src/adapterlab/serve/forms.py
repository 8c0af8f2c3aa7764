"""In which form an adapter can be computed beside others, asked in one place; and what is live in a step.

`pages`: it only puts something in front of every sequence, whose keys and values are computed once and shared; it
costs a step nothing. `tokens`: the tokens of a step go through adapters of their own. `alone`: it is right in a packed
step, but changes what all tokens see, so it has steps of its own. What is right in no step is refused.

An adapter says much about itself, and a model has a say too; so the first of each kind is tried: what the packed steps
give must be what the model gives with that adapter by itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Front
from adapterlab.engine.attention import attention_modules, core_attention
from adapterlab.errors import AdapterlabError, UnusableAdapterError
from adapterlab.foreign.model import text_config
from adapterlab.hosts import Host, host, load
from adapterlab.io.folder import Saved
from adapterlab.serve.adapters import Form, Version
from adapterlab.serve.forward import Forward, Row
from adapterlab.serve.pages import Pages
from adapterlab.serve.reading import Reader
from adapterlab.serve.table import Table
from adapterlab.serve.whole_change import put_whole_change

MakeRoom = Callable[[int], bool]
Fronts = Mapping[nn.Module, Front]
_CUTS = (0, 5, 8, 9)  # the passes in which the tokens of a trial are computed: a prompt in two pieces, then one token
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit


class Trial(NamedTuple):
    """What packed passes have to give: logits `[tokens, vocabulary]` of the model called as it is.

    Attributes:
        ids: of the tokens.
        adapted: with the adapter by itself.
        plain: without any.
    """

    ids: list[int]
    adapted: Tensor
    plain: Tensor


class Way(NamedTuple):
    """How an adapter is computed.

    Attributes:
        form: see above.
        in_table: what can be is in the table.
    """

    form: Form
    in_table: bool = False


_WAYS = (Way("tokens", in_table=True), Way("tokens"), Way("alone"))  # the fastest first


class OnModel:
    """Puts adapters on a model and takes them off; see `serve.adapters.Loader`."""

    def __init__(self, model: Any, forward: Forward, pages: Pages, reader: Reader, table: Table | None = None):
        self.model, self.forward, self.pages, self.reader, self.table = model, forward, pages, reader, table
        self._tried: dict[str, Way] = {}
        self._live = contextlib.ExitStack()
        self._runs: list[tuple[str | None, int]] | None = None

    def live(self, segments: Sequence[tuple[Version | None, int]]) -> None:
        """Let the tokens of the next passes go through their adapters; steps that are alike change nothing.

        Args:
            segments: the adapter of each run of tokens, and how many tokens it has.
        """
        keys = [(None if version is None or version.form == "pages" else version.key, n) for version, n in segments]
        runs = [(key, sum(n for _, n in run)) for key, run in itertools.groupby(keys, lambda one: one[0])]
        if runs == self._runs:
            return
        self.rest()
        carrier, names = host(self.model), {key for key, _ in runs}
        if carrier is None or names == {None}:
            return
        tabled = self.table is not None and any(name in self.table for name in names if name is not None)
        if len(names) == 1 and not tabled:
            self._live.enter_context(carrier.using(*(name for name in names if name is not None)))
        else:
            if self.table is not None and tabled:
                carrier.state.products = self.table.products
                self._live.callback(setattr, carrier.state, "products", None)
            self._live.enter_context(carrier.tokens(runs))
        self._runs = runs

    def rest(self) -> None:
        """Leave the plain base."""
        self._runs = None
        self._live.close()

    def load(self, version: Version, make_room: MakeRoom) -> bool:
        """Read an adapter and find its form.

        Raises:
            AdapterlabError: its files are damaged, or are not for this model.
            UnusableAdapterError: it can be computed in no form.
        """
        self.rest()
        saved = self.reader.take(version)
        if self.table is not None and (size := self.table.read(version.key, saved)) is not None:
            version.form, version.bytes = "tokens", size
            return True
        carrier = load(self.model, saved, version.key, active=False)
        carrier.state.in_torch = self.table is None
        kind, put = repr(carrier.methods[version.key]), False
        try:
            trial = None if kind in self._tried else self._trial(carrier, version)
            fronts = fronts_of(carrier, version.key)
            if fronts is None:
                put, way = self._on_tokens(carrier, version, saved, self._tried.get(kind), trial, make_room)
            else:
                put, way = self._in_pages(version, fronts, trial, make_room), Way("pages")
            if put:
                self._tried[kind] = way
                if self.table is not None and way.in_table and version.key not in carrier.methods:
                    self.table.know(saved.kind)
        finally:
            self.rest()
            if not put:
                self.pages.drop(version.pages)
                version.pages = []
            if not put or version.form == "pages":  # the pages hold all there is
                self.unload(version)
        return put

    def is_at_hand(self, version: Version) -> bool:
        """Say whether it can be put on without waiting for a disk."""
        return not self.reader.is_reading(version)

    def unload(self, version: Version) -> None:
        """Take an adapter off the model; its pages are the caller's."""
        self.rest()
        if self.table is not None:
            self.table.drop(version.key)
        carrier = host(self.model)
        if carrier is not None and version.key in carrier.methods:
            carrier.detach(version.key)

    def close(self) -> None:
        """Leave the model as it was, after all are unloaded."""
        self.rest()
        carrier = host(self.model)
        if carrier is not None:
            carrier.state.in_torch = False
        if self.table is not None:
            self.table.close()

    # ------------------------------------------------------------------ pages in front

    def _in_pages(self, version: Version, fronts: Fronts, trial: Trial | None, make_room: MakeRoom) -> bool:
        """Compute keys and values of what stands in front of every sequence."""
        length = max(map(length_of, fronts.values()))
        count = -(-length // self.forward.page_tokens)
        if not make_room(count):
            return False
        version.pages, version.in_front, version.bytes = self.pages.take(count), length, 0
        version.form, version.shift = "pages", sum(front.shift for front in fronts.values())
        for module, front in fronts.items():
            if front.keys is not None and front.values is not None:
                self.forward.write(module, version.pages, front.keys, front.values)
            elif front.embedded is not None:
                self.forward.run([Row(range(length), 0, version.pages)], front.embedded)
        return trial is None or self._right(version, trial, make_room)

    # ------------------------------------------------------------------ other forms

    def _on_tokens(
        self,
        carrier: Host,
        version: Version,
        saved: Saved,
        known: Way | None,
        trial: Trial | None,
        make_room: MakeRoom,
    ) -> tuple[bool, Way]:
        """Find the best way that is right, or refuse."""
        key, table = version.key, self.table
        put_whole_change(carrier, key)
        for part in carrier.parts(key):
            for path, adapter in carrier.adapters(part).items():
                if not adapter.keeps_tokens_apart:
                    raise UnusableAdapterError(
                        "it cannot be computed step by step, beside others: what stands around "
                        f"{path or 'the whole model'} may make tokens depend on each other in a way of its own."
                    )
        for way in _WAYS if known is None else (known,):
            version.form = way.form
            size = table.take(carrier, key) if table is not None and way.in_table else 0
            if known is None and way.in_table and not size:
                continue
            version.bytes = size + (bytes_of(carrier, key) if key in carrier.methods else 0)
            try:
                return trial is None or self._right(version, trial, make_room), way
            except (AdapterlabError, RuntimeError):  # it changes what all tokens see, or cannot be told apart by tokens
                if way is _WAYS[-1]:
                    raise
                if size:
                    self.unload(version)
                    carrier = load(self.model, saved, key, active=False)
                    put_whole_change(carrier, key)
        raise AssertionError("the last way has been tried")

    # ------------------------------------------------------------------ trials

    def _trial(self, carrier: Host, version: Version) -> Trial:
        """What the model gives with an adapter by itself, and without any."""
        ids = [(7 * i * i + 3 * i + 1) % text_config(self.model).vocab_size for i in range(_CUTS[-1])]
        return Trial(ids, self._plain(carrier, (version.key,), ids), self._plain(carrier, (), ids))

    def _right(self, version: Version, trial: Trial, make_room: MakeRoom) -> bool:
        """Compute a trial in packed passes, beside the base where it can be.

        Returns:
            Whether there was room for it.

        Raises:
            UnusableAdapterError: they give something else.
        """
        names = (version,) if version.form == "alone" else (version, None)
        needed = -(-len(trial.ids) // self.forward.page_tokens)
        if not make_room(needed * len(names)):
            return False
        taken = [self.pages.take(needed) for _ in names]
        try:
            for start, stop in itertools.pairwise(_CUTS):
                ids = trial.ids[start:stop]
                self.live([(one, len(ids)) for one in names])
                found = self.forward.run([row_of(one, ids, start, p) for one, p in zip(names, taken, strict=True)])
                for logits, wanted in zip(found, (trial.adapted, trial.plain), strict=False):
                    _check_alike(logits, wanted[stop - 1])
        except (AdapterlabError, RuntimeError):
            self.forward.clear([page for pages in taken for page in pages])
            raise
        finally:
            for pages in taken:
                self.pages.drop(pages)
        return True

    def _plain(self, carrier: Host, names: tuple[str, ...], ids: Sequence[int]) -> Tensor:
        """Logits of the model as it is, `[tokens, vocabulary]`."""
        self.rest()
        given = torch.tensor([ids], device=self.forward.device)
        with carrier.using(*names), core_attention(self.forward.modules, None), self.forward.fast:
            logits: Tensor = self.model(input_ids=given, use_cache=False).logits[0]
        return logits


def row_of(version: Version | None, ids: Sequence[int], start: int, pages: Sequence[int], chooses: bool = True) -> Row:
    """Tokens of a sequence with an adapter, for a pass."""
    if version is None:
        return Row(ids, start, pages, chooses=chooses)
    return Row(ids, start, pages, version.pages, version.in_front, version.shift, chooses)


def fronts_of(carrier: Host, key: str) -> Fronts | None:
    """Return what an adapter puts in front, by module, if it does nothing else and pages can hold it."""
    parts, fronts = carrier.parts(key), dict[nn.Module, Front]()
    if any(carrier.patches[part] for part in parts):
        return None
    for part in parts:
        for adapter in carrier.adapters(part).values():
            front = adapter.serving()
            if not isinstance(front, Front):
                return None
            fronts[adapter.site.module] = front
    embedded = [front for front in fronts.values() if front.embedded is not None]
    lengths = [length_of(front) for front in fronts.values() if length_of(front)]
    wanted = 1 if embedded else len(attention_modules(carrier.model))  # as many positions at every module
    return fronts if len(lengths) == wanted and len(set(lengths)) == 1 else None


def length_of(front: Front) -> int:
    """Return how many positions a front has."""
    held = front.keys if front.embedded is None else front.embedded
    return 0 if held is None else held.shape[-2]


def bytes_of(carrier: Host, key: str) -> int:
    """Return what an adapter takes: its tensors, and the originals of base values that it changes in place."""
    changed = [patch.path for part in carrier.parts(key) for patch in carrier.patches[part].values()]
    tensors = (*carrier.tensors(key).values(), *map(carrier.model.get_parameter, changed))
    return sum(t.numel() * t.element_size() for t in tensors)


def _check_alike(found: Tensor, wanted: Tensor) -> None:
    tolerance = _TOLERANCE.get(found.dtype, 5e-2)
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not off <= tolerance:  # NaN is not either
        raise UnusableAdapterError(
            f"step by step it gives other logits than the model with it alone does (off by {off:.2g} of the largest): "
            "it makes tokens depend on others in a way of its own, or computes numbers that are not finite."
        )
