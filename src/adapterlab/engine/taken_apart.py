"""A call of a module in a mixed batch: taken apart by who owns what of it, and its results put together again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterlab.core.segments import names_of
from adapterlab.engine.batch_rows import Batch
from adapterlab.errors import AttachError

if TYPE_CHECKING:
    from adapterlab.core.segments import Segments, Who
    from adapterlab.core.site import Site
    from adapterlab.core.state import State

Run = Callable[..., Any]
Index = slice | Tensor


@dataclass(frozen=True)
class Part:
    """What of a call belongs to one owner.

    Attributes:
        who: the owner.
        index: which entries.
        count: how many.
        args: what of the arguments belongs to them.
        kwargs: likewise.
    """

    who: Who
    index: Index
    count: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of a module: its entries are rows, in the first dimension of what it is given.

    Attributes:
        site: of the module.
        x: the tensor that says how many entries there are.
        batch: what of rows it is given.
        size: number of entries.
        args: what it is given.
        kwargs: likewise.
    """

    site: Site
    x: Tensor | None
    batch: Batch
    size: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    by_token = False

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions of a tensor that has all entries."""
        return (self.size,)

    def flat(self, t: Tensor) -> Tensor:
        """Entries in the first dimension; what all share is repeated."""
        return t.expand(self.size, *t.shape[1:]) if len(t) == 1 < self.size else t

    def part(self, who: Who, index: Index) -> Part:
        """What belongs to some entries."""
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        args, kwargs = (_walked(value, lambda t: self.narrowed(t, index)) for value in (self.args, self.kwargs))
        return Part(who, index, count, args, kwargs)

    def batch_of(self, part: Part) -> Batch:
        """What of rows a part has."""
        return dataclasses.replace(self.batch, rows=self.batch.rows * part.count // self.size)

    def narrowed(self, t: Tensor, index: Index) -> Tensor:
        """What of an argument belongs to some entries."""
        rows = t is self.x or t.dim() > 1
        told = t is self.x or t.dim() != 2 or not t.is_floating_point()
        if not told and len(t) == self.size == self.batch.tokens:
            raise AttachError(
                f"A tensor of {list(t.shape)} may belong to the rows or to the tokens of a batch that has as many "
                "of both. Run the rows of each adapter in a batch of their own, with host.using."
            )
        return _at(t, index) if rows and len(t) == self.size else t

    def cut(self, result: Any, part: Part) -> Any:
        """What of a result of the whole call belongs to a part."""
        return _walked(result, lambda t: self.cut_tensor(t, part), held=False)

    def cut_tensor(self, t: Tensor, part: Part) -> Tensor | None:
        """The same of one tensor: entries, or runs of each."""
        if not t.dim() or len(t) < self.size or len(t) % self.size:
            return t
        runs = len(t) // self.size
        return _at(t, part.index) if runs == 1 else _at(t.unflatten(0, (self.size, runs)), part.index).flatten(0, 1)

    def spread(self, result: Any, part: Part) -> Any:
        """Repeat in a result what all entries share."""
        if isinstance(result, Tensor):
            shared = result.dim() and result.shape[0] == 1
            return result.expand(part.count, *result.shape[1:]) if shared else result
        if isinstance(result, tuple) and not hasattr(result, "_fields"):
            return tuple(self.spread(inner, part) for inner in result)
        return result

    def changed(self, run: Run, whole: Run, part: Part, segments: Segments, args: Any, kwargs: Any) -> Any:
        """Compute the module for a part by itself."""
        return run(*args, **kwargs)

    def joined(self, results: Sequence[Tensor], counts: Sequence[int], back: Tensor | None) -> Tensor:
        """Put parts of a result in the order of the entries, each of which may have a run."""
        total = sum(len(r) if r.dim() else 0 for r in results)
        runs, left = divmod(total, self.size)
        if left or not runs:
            raise AttachError(
                f"A result of {[list(r.shape) for r in results]} cannot be put together from {self.size} rows. Run "
                "the rows of each adapter in a batch of their own, with host.using."
            )
        whole = torch.cat(list(results))
        if back is None:
            return whole
        return whole.unflatten(0, (self.size, runs))[back.to(whole.device)].flatten(0, 1)


@dataclass(frozen=True)
class TokenCall(Call):
    """A call whose entries are tokens, counted over the first one or two dimensions; a part has one row of them."""

    dims: int = 2

    by_token = True

    @property
    def lead(self) -> tuple[int, ...]:
        rows = self.batch.shape[0]
        return (self.size,) if self.dims == 1 else (rows, self.size // rows)

    def flat(self, t: Tensor) -> Tensor:
        return t if self.dims == 1 else t.expand(*self.lead, *t.shape[2:]).flatten(0, 1)

    def batch_of(self, part: Part) -> Batch:
        return dataclasses.replace(self.batch, rows=1, tokens=part.count, shape=(1, part.count))

    def narrowed(self, t: Tensor, index: Index) -> Tensor:
        found = self.entries(t, index)
        return t if found is None else found[None]

    def entries(self, t: Tensor, index: Index) -> Tensor | None:
        """Some entries `[count, ...]` of a tensor that has all of them."""
        shared = (1, *self.lead[1:]) if self.dims > 1 else self.lead
        return _at(self.flat(t), index) if tuple(t.shape[: self.dims]) in (self.lead, shared) else None

    def cut_tensor(self, t: Tensor, part: Part) -> Tensor | None:
        if not t.dim():
            return t
        found = self.entries(t, part.index)
        if found is not None:
            return found[None]
        return _at(t, part.index) if len(t) == self.size else None

    def spread(self, result: Any, part: Part) -> Any:
        return result

    def changed(self, run: Run, whole: Run, part: Part, segments: Segments, args: Any, kwargs: Any) -> Any:
        if self.site.tokenwise:
            return run(*args, **kwargs)
        if not segments.whole_samples:
            raise AttachError(
                f"{', '.join(names_of(part.who))} changes what {self.site.path} is given, whose tokens may depend on "
                "each other, and a sample has several owners. Let the segments of host.tokens be whole samples of "
                "a packed batch, whose borders the model is told (cu_seq_lens_q), or whole rows."
            )
        return self.cut(whole(**self.scattered(part, args, kwargs)), part)

    def scattered(self, part: Part, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of the whole call, with those of a part changed; samples do not see each other."""
        bound = self.site.bound
        own, everyone = bound(part.args, part.kwargs), bound(self.args, self.kwargs)
        index = part.index if isinstance(part.index, Tensor) else torch.arange(part.index.start, part.index.stop)
        found = {}
        for name, value in bound(args, kwargs).items():
            before, all_of_it = own.get(name), everyone.get(name)
            found[name] = all_of_it if value is before else value
            if value is not before and before is not all_of_it and isinstance(value, Tensor):
                entries = self.flat(all_of_it).to(value.dtype)
                found[name] = entries.index_copy(0, index.to(value.device), value[0]).unflatten(0, self.lead)
        return found

    def joined(self, results: Sequence[Tensor], counts: Sequence[int], back: Tensor | None) -> Tensor:
        rows = all(r.dim() > 1 and len(r) == 1 and r.shape[1] == n for r, n in zip(results, counts, strict=True))
        flat = [r[0] for r in results] if rows else list(results)
        if any(not r.dim() or len(r) != n for r, n in zip(flat, counts, strict=True)):
            raise AttachError(
                f"A result of {[list(r.shape) for r in results]} cannot be put together from {self.size} tokens. Run "
                "the tokens of each adapter in a batch of their own, with host.using."
            )
        entries = torch.cat(flat)
        entries = entries if back is None else entries[back.to(entries.device)]
        return entries.unflatten(0, self.lead) if rows else entries


class Rest:
    """The rest of a module's computation, for the parts of a call.

    Where the adapters share it, those that ask for what they were given get their part of one computation of the whole
    batch, which a key-value cache sees too. Otherwise each part is computed by itself.
    """

    def __init__(self, run: Run, call: Call, segments: Segments, state: State, shared: bool):
        self.run, self.call, self.segments, self.state, self.shared = run, call, segments, state, shared
        self._place = state.standing()
        self._results: list[Any] = []

    def of(self, part: Part) -> Run:
        """The rest of the computation for one part."""
        return functools.partial(self._asked, part)

    def _asked(self, part: Part, *args: Any, **kwargs: Any) -> Any:
        if self.shared and _same(part, args, kwargs):
            return self.call.cut(self._once(), part)
        for value in (*args, *kwargs.values()):
            if isinstance(value, _Held):
                value.refuse()
        return self.call.changed(self.run, self._whole, part, self.segments, args, kwargs)

    def _once(self) -> Any:
        if not self._results:
            self._results.append(self._whole(*self.call.args, **self.call.kwargs))
        return self._results[0]

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        with self.state.standing_at(self._place):
            return self.run(*args, **kwargs)


def _same(part: Part, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Say whether arguments are those that a part was given."""
    if len(args) != len(part.args) or kwargs.keys() != part.kwargs.keys():
        return False
    alike = all(one is other for one, other in zip(args, part.args, strict=True))
    return alike and all(value is part.kwargs[name] for name, value in kwargs.items())


class _Held:
    """Stands for a key-value cache of the whole batch in what a part of it is given."""

    def __init__(self, cache: Any):
        self.__dict__["_cache"] = cache

    def __getattr__(self, name: str) -> Any:
        self.refuse()

    def refuse(self) -> None:
        """Say that a part cannot use it."""
        raise AttachError(
            "An adapter changes what a block or model with a key-value cache is given, and the cache cannot be split "
            "by rows. Generate for each adapter in a batch of its own with host.using, or pass use_cache=False."
        )


def _walked(value: Any, narrow: Callable[[Tensor], Any], held: bool = True) -> Any:
    """Narrow all tensors in a value; a cache is held back from whoever is not to use it."""
    if isinstance(value, Tensor):
        return narrow(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_walked(inner, narrow, held) for inner in value)
    if isinstance(value, dict):
        made = {key: _walked(inner, narrow, held) for key, inner in value.items()}
        return made if type(value) is dict else type(value)(**made)
    return _Held(value) if held and _is_cache(value) else value


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def _at(t: Tensor, index: Index) -> Tensor:
    return t[index if isinstance(index, slice) else index.to(t.device)]


def joined(call: Call, results: Sequence[Any], counts: Sequence[int], back: Tensor | None, inside: bool = False) -> Any:
    """Put the results of parts together."""
    first = results[0]
    if not isinstance(first, (Tensor, tuple, dict)) and all(result is first for result in results):
        return first
    if _is_cache(first) or any(result is None for result in results):
        return None  # that of one part would be wrong for the others
    if inside and isinstance(first, Tensor) and len({r.shape[1 + call.by_token :] for r in results}) > 1:
        return None  # attention weights over different numbers of keys
    if isinstance(first, Tensor):
        return call.joined(results, counts, back)
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(joined(call, [r[i] for r in results], counts, back, True) for i in range(len(first)))
    if isinstance(first, dict):
        return type(first)(**{k: joined(call, [r[k] for r in results], counts, back, True) for k in first})
    return first
