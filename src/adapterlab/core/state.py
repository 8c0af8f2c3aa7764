"""The one mutable object that all adapters of a model share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterlab.core.composition import Composition
from adapterlab.core.segments import Segments
from adapterlab.errors import AttachError


class Sinks(NamedTuple):
    """Where the adapters of one owner of a mixed batch leave things.

    Attributes:
        losses: what they emit.
        observed: what parts of mixtures are used, see `State.observe`; None: nobody looks.
    """

    losses: list[Tensor]
    observed: dict[str, Tensor] | None


@dataclass
class State:
    """What wrapped modules consult on every call. Plain attributes: Dynamo guards them cheaply.

    Attributes:
        active: keys of the live adapters, parts of composites included.
        together: how they are put together, by keys; None: they nest in order of attachment.
        segments: of a mixed batch, who owns which rows or tokens; or None.
        products: what adapters add in a mixed batch that are kept apart from the model, see `engine.products`, or None.
        in_torch: torch multiplies few tokens too, where a kernel of ours could.
        generators: of a mixed batch, where the dropout of an adapter takes its random numbers, by key; others take
            them from torch's own.
        sinks: of a mixed batch, where adapters leave what they emit and observe, by key; the others leave it in the
            sinks of all.
        losses: sink for auxiliary losses while someone collects them, else None.
        listening: someone collects them, or did in the pass that is computed again now. An adapter inside a block asks
            this before it computes a loss, since both passes have to compute the same.
        share: of the batch that is being computed, where a module gets it in portions.
        observed: sink for what the parts of mixtures are used while someone looks, else None.
        taps: tensors that one adapter leaves for another during a forward pass.
        carrier: what the adapters were attached with, to be found from a wrapped module.
        batches: while a mixed batch is computed, what each of the modules around the current one was given.
        calls: what the calls around say about their tokens, the innermost last; None where no adapter counts tokens.
    """

    active: tuple[str, ...] = ()
    together: Composition | None = None
    segments: Segments | None = None
    products: Any = field(default=None, repr=False, compare=False)
    in_torch: bool = False
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    sinks: Mapping[str, Sinks] = field(default_factory=dict)
    losses: list[Tensor] | None = None
    listening: bool = False
    share: float = 1.0
    observed: dict[str, Tensor] | None = None
    taps: dict[str, Any] = field(default_factory=dict)
    carrier: Any = field(default=None, repr=False, compare=False)
    batches: list[Any] = field(default_factory=list)
    calls: list[Any] | None = None

    def real_tokens(self, x: Tensor) -> Tensor | None:
        """Say which tokens of what a module gets are no padding; for adapters that set `counts_tokens`.

        Right for padding on either side, packed rows (they have none), encoders and decoders (a decoder's tokens
        without a label fill its row), cross-attention, caches, rows with adapters of their own, and when a block is
        computed again. A head that sees the tokens with labels alone sees real ones.

        Args:
            x: `[..., width]`, as the module is given it.

        Returns:
            A boolean `[...]`, or None where all are real, or nothing says otherwise.

        Raises:
            AttachError: the batch has padding, and where it is in x cannot be told; or the adapter does not set
                `counts_tokens`.
        """
        if self.calls is None:
            raise AttachError(
                "Nobody watches which tokens are real: an adapter that asks for real_tokens sets counts_tokens = True "
                "in its class."
            )
        found: Tensor | None = self.calls[-1].of(x) if self.calls and self.calls[-1] is not None else None
        return found

    @contextlib.contextmanager
    def seeing(self, like: Tensor | None, index: slice | Tensor, by_token: bool = False) -> Iterator[None]:
        """Let `real_tokens` speak of some rows, or some tokens, of what a module is given."""
        if not self.calls or self.calls[-1] is None:
            yield
            return
        self.calls.append(self.calls[-1].part(like, index, by_token))
        try:
            yield
        finally:
            self.calls.pop()

    def emit(self, loss: Tensor) -> None:
        """Add an auxiliary loss to the forward pass, a mean over what the module is given; dropped if nobody collects.

        It counts as the task's loss of the batch does, whatever a step is made of.
        """
        if self.losses is not None:
            self.losses.append(loss if self.share == 1 else self.share * loss)

    @contextlib.contextmanager
    def portion(self, share: float) -> Iterator[None]:
        """Take what a module is given inside the context to be a share of the batch."""
        before, self.share = self.share, share
        try:
            yield
        finally:
            self.share = before

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[Tensor]]:
        """Collect what `emit` receives inside the context."""
        before = self.losses, self.listening
        self.losses, self.listening = [], True
        try:
            yield self.losses
        finally:
            self.losses, self.listening = before

    def observe(self, path: str, x: Tensor, weights: Tensor) -> None:
        """Add to what the parts of a mixture are used, for people to see; dropped when nobody looks.

        Padding does not count. A module of which `real_tokens` cannot tell it is not shown.

        Args:
            path: of the module.
            x: what it was given `[..., width]`.
            weights: of the parts for each token `[..., parts]`.
        """
        if self.observed is None:
            return
        try:
            real = self.real_tokens(x)
        except AttachError:
            if self.calls is None:
                raise
            return
        weights = weights.detach() if real is None else weights.detach()[real]
        load = weights.flatten(0, -2).sum(0, dtype=torch.float64 if weights.dtype == torch.float64 else torch.float32)
        before = self.observed.get(path)
        self.observed[path] = load if before is None else before + load

    @contextlib.contextmanager
    def observing(self, used: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Look inside the context: sums `[parts]` of the weights of real tokens, by the path of the module.

        Args:
            used: what was seen before, to go on with.
        """
        used = {} if used is None else used
        before, self.observed = self.observed, used
        try:
            yield used
        finally:
            self.observed = before

    @contextlib.contextmanager
    def showing(self, segments: Segments, batch: Any) -> Iterator[None]:
        """Take the batch to be another one inside the context, of which `batch` says what there is of it."""
        before, self.segments = self.segments, segments
        self.batches.append(batch)
        try:
            yield
        finally:
            self.segments = before
            self.batches.pop()

    def standing(self) -> dict[str, Any]:
        """Record where in a batch the computation is, for `standing_at`."""
        calls = None if self.calls is None else list(self.calls)
        return {"segments": self.segments, "batches": list(self.batches), "calls": calls}

    @contextlib.contextmanager
    def standing_at(self, place: dict[str, Any]) -> Iterator[None]:
        """Compute something of the whole batch, from inside a part of it."""
        now = {key: self.__dict__[key] for key in place}
        self.__dict__.update(place)
        try:
            yield
        finally:
            self.__dict__.update(now)

    @contextlib.contextmanager
    def acting(self, names: tuple[str, ...]) -> Iterator[None]:
        """Let adapters of one owner compute: random numbers of the CPU that they take, and what they leave, are its.

        Adapters for which nobody gave a generator or sinks take and leave what all do.
        """
        generator = next((self.generators[name] for name in names if name in self.generators), None)
        before = self.losses, self.observed
        self.losses, self.observed = next((self.sinks[name] for name in names if name in self.sinks), before)
        try:
            with contextlib.nullcontext() if generator is None else _drawn_from(generator):
                yield
        finally:
            self.losses, self.observed = before

    def snapshot(self) -> dict[str, Any]:
        """Record what a later recomputation of the same forward pass must see."""
        return {
            "active": self.active, "together": self.together, "taps": dict(self.taps), "listening": self.listening,
            "generators": self.generators, "drawn": self._drawn(self.generators), **self.standing(),
        }  # fmt: skip

    @contextlib.contextmanager
    def replay(self, snapshot: dict[str, Any]) -> Iterator[None]:
        """Show a recorded state again; what is emitted and observed is dropped, since the first pass did it."""
        seen = {**snapshot, "losses": None, "observed": None, "sinks": {}}
        drawn = seen.pop("drawn")
        now, drawn_now = {key: self.__dict__[key] for key in seen}, self._drawn(seen["generators"])
        self.__dict__.update(seen)
        self._draw_on(drawn)
        try:
            yield
        finally:
            self.__dict__.update(now)
            self._draw_on(drawn_now)

    @staticmethod
    def _drawn(generators: Mapping[str, torch.Generator]) -> list[tuple[torch.Generator, Tensor]]:
        """How far generators are; parts of a composite share one."""
        return [(one, one.get_state()) for one in {id(g): g for g in generators.values()}.values()]

    @staticmethod
    def _draw_on(drawn: list[tuple[torch.Generator, Tensor]]) -> None:
        for generator, state in drawn:
            generator.set_state(state)


@contextlib.contextmanager
def _drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Let torch's random numbers on the CPU come from a generator."""
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)
