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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Front
from adapterlab.engine.attention import attention_modules, core_attention
from adapterlab.engine.packing import mixes_positions
from adapterlab.errors import AdapterlabError, AttachError, UnusableAdapterError
from adapterlab.foreign.model import text_config
from adapterlab.hosts import Host, host, load
from adapterlab.serve.adapters import Form, Version
from adapterlab.serve.forward import Forward, Row
from adapterlab.serve.pages import Pages

_CUTS = (0, 5, 8, 9)  # the passes in which the tokens of a trial are computed: a prompt in two pieces, then one token
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit


class OnModel:
    """Puts adapters on a model and takes them off; see `serve.adapters.Loader`."""

    def __init__(self, model: Any, forward: Forward, pages: Pages):
        self.model, self.forward, self.pages = model, forward, pages
        self._tried: dict[str, Form] = {}

    @contextlib.contextmanager
    def live(self, segments: Sequence[tuple[Version | None, int]]) -> Iterator[None]:
        """Let the tokens of a pass go through their adapters.

        Args:
            segments: the adapter of each run of tokens, and how many tokens it has.
        """
        keys = [(None if version is None or version.form == "pages" else version.key, n) for version, n in segments]
        runs = [(key, sum(n for _, n in run)) for key, run in itertools.groupby(keys, lambda one: one[0])]
        carrier, names = host(self.model), {key for key, _ in runs}
        if carrier is None:
            yield
        elif len(names) == 1:
            with carrier.using(*(name for name in names if name is not None)):
                yield
        else:
            with carrier.tokens(runs):
                yield

    def load(self, version: Version, make_room: Callable[[int], bool]) -> bool:
        """Read an adapter and find its form.

        Raises:
            AdapterlabError: its files are damaged, or are not for this model.
            UnusableAdapterError: it can be computed in no form.
        """
        carrier = load(self.model, version.folder, version.key, active=False)
        put = False
        try:
            fronts = _fronts(carrier, version.key)
            if fronts is None:
                put = self._on_tokens(carrier, version, make_room)
            else:
                put = self._in_pages(carrier, version, fronts, make_room)
        finally:
            if not put:
                self.pages.drop(version.pages)
                version.pages = []
            if not put or version.form == "pages":  # the pages hold all there is
                carrier.detach(version.key)
        return put

    def unload(self, version: Version) -> None:
        """Take an adapter off the model; its pages are the caller's."""
        carrier = host(self.model)
        if carrier is not None and version.key in carrier.methods:
            carrier.detach(version.key)

    # ------------------------------------------------------------------ pages in front

    def _in_pages(
        self, carrier: Host, version: Version, fronts: Mapping[nn.Module, Front], make_room: Callable[[int], bool]
    ) -> bool:
        """Compute keys and values of what stands in front of every sequence."""
        length = max(map(_length, fronts.values()))
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
        return self._right(carrier, version, make_room)

    # ------------------------------------------------------------------ other forms

    def _on_tokens(self, carrier: Host, version: Version, make_room: Callable[[int], bool]) -> bool:
        """Choose between `tokens` and `alone`, or refuse."""
        key = version.key
        for part in carrier.parts(key):
            if why := mixes_positions(carrier.adapters(part)):
                raise UnusableAdapterError(f"its tokens cannot be computed step by step: {why}.")
        version.bytes = _bytes(carrier, key)
        kind = repr(carrier.methods[key])
        version.form = self._tried.get(kind)
        if version.form is not None:
            return True
        forms: tuple[Form, ...] = ("tokens", "alone") if hasattr(carrier, "tokens") else ("alone",)
        for version.form in forms:
            try:
                if not self._right(carrier, version, make_room):
                    version.form = None
                    return False
                break
            except AttachError:  # it cannot be told apart by tokens
                if version.form == forms[-1]:
                    raise
        self._tried[kind] = version.form
        return True

    def _right(self, carrier: Host, version: Version, make_room: Callable[[int], bool]) -> bool:
        """Compare packed passes, beside the base where it can be, with the model and the adapter by itself.

        Returns:
            Whether there was room for a trial.

        Raises:
            UnusableAdapterError: they differ.
        """
        ids = [(7 * i * i + 3 * i + 1) % text_config(self.model).vocab_size for i in range(_CUTS[-1])]
        names = (version, None) if version.form != "alone" else (version,)
        needed = -(-len(ids) // self.forward.page_tokens)
        if not make_room(needed * len(names)):
            return False
        wanted = [self._plain(carrier, () if one is None else (version.key,), ids) for one in names]
        taken = [self.pages.take(needed) for _ in names]
        try:
            for start, stop in itertools.pairwise(_CUTS):
                rows = [row_of(one, ids[start:stop], start, pages) for one, pages in zip(names, taken, strict=True)]
                with self.live([(one, stop - start) for one in names]):
                    found = self.forward.run(rows)
                for logits, expected in zip(found, wanted, strict=True):
                    _check_alike(logits, expected[stop - 1])
        except AdapterlabError:
            self.forward.clear([page for pages in taken for page in pages])
            raise
        finally:
            for pages in taken:
                self.pages.drop(pages)
        return True

    def _plain(self, carrier: Host, names: tuple[str, ...], ids: Sequence[int]) -> Tensor:
        """Logits of the model as it is, `[tokens, vocabulary]`."""
        given = torch.tensor([ids], device=self.forward.device)
        with carrier.using(*names), core_attention(self.forward.modules, None):
            logits: Tensor = self.model(input_ids=given, use_cache=False).logits[0]
        return logits


def row_of(version: Version | None, ids: Sequence[int], start: int, pages: Sequence[int], chooses: bool = True) -> Row:
    """Tokens of a sequence with an adapter, for a pass."""
    if version is None:
        return Row(ids, start, pages, chooses=chooses)
    return Row(ids, start, pages, version.pages, version.in_front, version.shift, chooses)


def _fronts(carrier: Host, key: str) -> dict[nn.Module, Front] | None:
    """What an adapter puts in front, by module, if it does nothing else and pages can hold it."""
    parts = carrier.parts(key)
    found = {a.site.module: a.front() for part in parts for a in carrier.adapters(part).values()}
    if any(carrier.patches[part] for part in parts):
        return None
    fronts = {module: front for module, front in found.items() if front is not None}
    lengths = [_length(front) for front in fronts.values() if _length(front)]
    # As many at every attention module, or vectors at the input.
    alike = len(set(lengths)) == 1 and len(lengths) in (1, len(attention_modules(carrier.model)))
    return fronts if len(fronts) == len(found) and alike else None


def _length(front: Front) -> int:
    held = front.keys if front.embedded is None else front.embedded
    return 0 if held is None else held.shape[-2]


def _bytes(carrier: Host, key: str) -> int:
    """What an adapter takes: its tensors, and the originals of base values that it changes in place."""
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
