"""How attached adapters are put together, as data: behind each other, averaged, by position, or beside each other.

    host.activate(al.Stack("language", "task"))
    with host.using(al.Average("math", "code", weights=[0.7, 0.3])): ...
    with host.using(al.Parallel("math", al.Stack("language", "task"))): ...

The words are those of "AdapterHub: A Framework for Adapting Transformers" (arXiv 2007.07779). A part is the name of an
adapter or a composition again; `Parallel` alone stands around all others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign.cache import NAMES as CACHES

Run = Callable[..., Any]
Around = Callable[[str], Run | None]  # the `around` of an adapter where it has something, by key


@dataclasses.dataclass(frozen=True, init=False)
class Composition:
    """Adapters, or compositions of them, that act together.

    Attributes:
        parts: names of adapters, or compositions.
        by_position: what a part does depends on where a token stands.
    """

    by_position: ClassVar[bool] = False

    parts: tuple[str | Composition, ...]

    def __init__(self, *parts: str | Composition):
        """Check and keep the parts.

        Raises:
            ConfigError: there are none, one is neither a name nor a composition, or `Parallel` stands inside another.
        """
        word = type(self).__name__
        if not parts:
            raise ConfigError(f'{word}() puts nothing together: name adapters, such as {word}("a", "b").')
        for part in parts:
            if not isinstance(part, (str, Composition)):
                raise ConfigError(
                    f"{word} takes names of adapters and compositions of them; received {part!r}. Attach the adapter "
                    "and give its name."
                )
            if isinstance(part, Parallel):
                raise ConfigError(
                    f"Parallel stands inside {word}, but it repeats the whole batch, so it can only be the outermost: "
                    f"write Parallel({word}(...), ...)."
                )
        object.__setattr__(self, "parts", parts)

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.parts))})"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters inside, each once."""
        inner = (part.names if isinstance(part, Composition) else (part,) for part in self.parts)
        return tuple(dict.fromkeys(name for names in inner for name in names))

    def within(self) -> Iterator[Composition]:
        """Yield this composition and all inside it."""
        yield self
        for part in self.parts:
            if isinstance(part, Composition):
                yield from part.within()

    def with_names(self, leaf: Callable[[str], str | Composition]) -> Composition:
        """Return the same composition with something else in the place of each name."""
        made = tuple(part.with_names(leaf) if isinstance(part, Composition) else leaf(part) for part in self.parts)
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__, parts=made)
        return same

    def enter(self, run: Run, around: Around) -> Run:
        """Return the computation of a module through the parts; `run` itself where none has something there.

        Args:
            run: the rest of the computation.
            around: gives an adapter's `around` by its key, or None where it has nothing.
        """
        if all(entered(part, run, around) is run for part in self.parts):
            return run

        def call(*args: Any, **kwargs: Any) -> Any:
            once = _Once(run, str(self))
            return self.joined([entered(part, once, around)(*args, **kwargs) for part in self.parts])

        return call

    def joined(self, results: Sequence[Any]) -> Any:
        """Make one result of those of the parts."""
        raise NotImplementedError(f"{type(self).__name__} does not say what becomes of the results of its parts")


class Stack(Composition):
    """Behind each other: the first is nearest to the module, and each further one gets what those before it made."""

    def enter(self, run: Run, around: Around) -> Run:
        for part in self.parts:
            run = entered(part, run, around)
        return run


class Parallel(Composition):
    """Beside each other: the batch is repeated for each part, and the rows of the first part come first.

    A batch of B rows gives P · B rows for P parts, in the order of the parts.
    """


@dataclasses.dataclass(frozen=True, init=False)
class Average(Composition):
    """Averaged at each module: y = Σ w_i · y_i, with y_i what the module computes through part i alone.

    For adapters that add an update to a weight, the module computes with W + Σ w_i ΔW_i.

    Attributes:
        weights: w_i; they sum to one.
    """

    weights: tuple[float, ...]

    def __init__(self, *parts: str | Composition, weights: Sequence[float] | None = None):
        """Check the parts, and keep the weights divided by their sum.

        Raises:
            ConfigError: as for all compositions, or there is not one finite weight for each part, or they sum to zero.
        """
        super().__init__(*parts)
        chosen = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
        total = math.fsum(chosen)
        if len(chosen) != len(parts) or not math.isfinite(total) or not total:
            raise ConfigError(
                f"Average has {len(parts)} parts and the weights {chosen}: give one finite number for each part; they "
                "are divided by their sum, which must not be zero."
            )
        object.__setattr__(self, "weights", tuple(w / total for w in chosen))

    def joined(self, results: Sequence[Any]) -> Any:
        return _elementwise(self._mean, results, str(self))

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        total = sum(weight * part.to(wide) for weight, part in zip(self.weights, parts, strict=True))
        return total.to(parts[0].dtype)  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True, init=False)
class Split(Composition):
    """By position: of each row the first `sizes[0]` tokens come from the first part, the next from the second, ...

    Each part sees the whole row, so attention goes over the borders. Every token must be there at once: with a cache
    the position of a token is not known to a module.

    Attributes:
        sizes: tokens of each part; together the tokens of a row, padding included.
    """

    by_position: ClassVar[bool] = True

    sizes: tuple[int, ...]

    def __init__(self, *parts: str | Composition, sizes: Sequence[int]):
        """Check and keep the parts and sizes.

        Raises:
            ConfigError: as for all compositions, or there is not one positive size for each part.
        """
        super().__init__(*parts)
        chosen = tuple(sizes)
        if len(chosen) != len(parts) or not all(isinstance(n, int) and n > 0 for n in chosen):
            raise ConfigError(
                f"Split has {len(parts)} parts and the sizes {list(chosen)}: give one positive number of tokens each."
            )
        object.__setattr__(self, "sizes", chosen)

    def joined(self, results: Sequence[Any]) -> Any:
        return _elementwise(self._cut, results, str(self))

    def _cut(self, parts: Sequence[Tensor]) -> Tensor:
        tokens = parts[0].shape[1] if parts[0].dim() > 2 else None
        if tokens != sum(self.sizes):
            raise AttachError(
                f"{self} cuts rows of {sum(self.sizes)} tokens, and a module gave {list(parts[0].shape)}. Sizes must "
                "add up to the tokens of a row, padding included; generate without a cache and at one length, or in a "
                "batch for each adapter with host.using."
            )
        columns = [part.split(self.sizes, 1)[i] for i, part in enumerate(parts)]
        return torch.cat(columns, 1)


def entered(part: str | Composition, run: Run, around: Around) -> Run:
    """Return the computation of a module through a part; `run` itself where it has nothing there."""
    if isinstance(part, Composition):
        return part.enter(run, around)
    own = around(part)
    return run if own is None else functools.partial(own, run)


def leaves(part: str | Composition) -> tuple[str, ...]:
    """The adapters of a part, each once."""
    return part.names if isinstance(part, Composition) else (part,)


class _Once:
    """The rest of the computation, for several parts: what they ask for with the same arguments is computed once."""

    def __init__(self, run: Run, what: str):
        self.run, self.what = run, what
        self.given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            self.given, self.result = (args, kwargs), self.run(*args, **kwargs)
            return self.result
        if _same(self.given, (args, kwargs)):
            return self.result
        if any(kwargs.get(name) is not None for name in CACHES):
            raise AttachError(
                f"{self.what} computes a whole block once for each part, and a key-value cache takes its keys once. "
                "Pass use_cache=False, or compute each adapter in a batch of its own with host.using."
            )
        return self.run(*args, **kwargs)


def _same(one: tuple[tuple[Any, ...], Mapping[str, Any]], other: tuple[tuple[Any, ...], Mapping[str, Any]]) -> bool:
    (args, kwargs), (more, named) = one, other
    alike = len(args) == len(more) and kwargs.keys() == named.keys()
    return alike and all(a is b for a, b in (*zip(args, more, strict=True), *((kwargs[k], named[k]) for k in kwargs)))


def _elementwise(join: Callable[[Sequence[Tensor]], Tensor], results: Sequence[Any], what: str) -> Any:
    """Join results tensor by tensor; what is the same in all, such as a cache, stays as it is."""
    first = results[0]
    if all(result is first for result in results):
        return first
    if all(isinstance(result, Tensor) for result in results):
        if len({result.shape for result in results}) > 1:
            raise AttachError(
                f"The parts of {what} give results of other shapes: {[list(r.shape) for r in results]}. Adapters that "
                "make rows longer, as prompts do, must be in all of them, or run in a batch of their own."
            )
        return join(results)
    if all(type(result) is type(first) for result in results):
        if isinstance(first, tuple) and not hasattr(first, "_fields") and len({len(r) for r in results}) == 1:
            return tuple(_elementwise(join, parts, what) for parts in zip(*results, strict=True))
        if isinstance(first, dict) and len({tuple(r) for r in results}) == 1:
            return type(first)(**{key: _elementwise(join, [r[key] for r in results], what) for key in first})
    raise AttachError(
        f"The parts of {what} give results that cannot be joined ({', '.join(type(r).__name__ for r in results)}). Run "
        "each adapter in a batch of its own with host.using."
    )
