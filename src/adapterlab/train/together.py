"""Several runs on one base at once: one pass for the micro-batches of all, each with its own loss, steps and end.

    entrants = [Entrant("a", start_a), Entrant("b", start_b, need=2**30)]
    for ending in train_together(host, entrants, room=2**32):
        ending.value, ending.error, ending.why

What a run has to offer is a course: a generator that yields its `Loop` whenever a step is due and returns what came of
it (`Loop.course`, or what stands around one, such as `run.recorded`). `Entrant.start(stopping)` makes it, with
`Entrant.name` attached and live, and passes `stopping` on to `Loop.course`. It is called when there is room, between
two passes, with random numbers that belong to this run; so is whatever the course does by itself (optimizer,
evaluation, checkpoints). `Entrant.leave()` is called between two passes when the run has ended, however that was; who
needs the adapter no longer detaches it there. An error ends its run alone. Afterwards no adapter is live.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterlab.core.segments import segments
from adapterlab.core.state import Sinks
from adapterlab.data.batching import joined
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.modes import gradients_aside
from adapterlab.engine.norms import lean_norms
from adapterlab.engine.recompute import offloading
from adapterlab.errors import AttachError
from adapterlab.hosts import Host
from adapterlab.train.course import Course
from adapterlab.train.loop import Loop, Part, Record
from adapterlab.train.rng import Stream
from adapterlab.train.sharing import own_passes
from adapterlab.train.signals import Interrupted, Stopping, stop_on_signals

EXACT = "asked for, so that every number is that of a separate run"


@dataclass(frozen=True)
class Entrant:
    """A run that is to take part.

    Attributes:
        name: of its adapter.
        start: attaches the adapter and makes the course.
        need: bytes that it takes beside the base; None: not known, so that it has the room for itself.
        leave: tidies up when the run has ended.
    """

    name: str
    start: Callable[[Stopping], Course[Loop, Record, Any]]
    need: int | None = 0
    leave: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        name: of its adapter.
        value: what its course returned.
        error: what ended it before, or None.
        why: why it had passes of its own, or "": its micro-batches were in one pass with those of others.
    """

    name: str
    value: Any = None
    error: BaseException | None = None
    why: str = ""


def train_together(
    host: Host,
    entrants: Sequence[Entrant],
    *,
    room: int | None = None,
    exact: bool = False,
    tell: Callable[[Loop, str], None] = lambda loop, why: None,
) -> list[Ending]:
    """Train several adapters of one model at once.

    In each round every run that is under way offers its next micro-batch. Those of runs that can share stand behind
    each other in one packed forward pass; each has its own loss over its own labels, and one backward pass gives each
    adapter the gradients of its own loss. Runs begin and end between rounds.

    Args:
        host: of the model, which stays as it is.
        entrants: the runs; those without room wait until others have ended.
        room: bytes beside the base; None: no bound.
        exact: every run has passes of its own, whose numbers are to the bit those of a separate run: the base is
            shared in memory alone.
        tell: told of each run that begins why it has passes of its own, or "".

    Returns:
        How each ended, in the order of `entrants`.
    """
    return _Rounds(host, list(entrants), room, exact, tell).run()


def admits(need: int | None, others: Sequence[int | None], room: int | None) -> bool:
    """Say whether a run may begin beside others.

    Args:
        need: bytes that it takes beside the base; None: not known.
        others: likewise, of those under way.
        room: bytes for all of them; None: no bound.
    """
    if not others or room is None:
        return True
    needs = [one for one in (need, *others) if one is not None]
    return len(needs) == 1 + len(others) and sum(needs) <= room


def in_parts(course: Course[Loop, Record, Any]) -> Generator[Part, float, Any]:
    """The micro-batches of a course: each step that it asks for is taken apart."""
    go_on: Callable[[], Loop] = functools.partial(next, course)
    while True:
        try:
            loop = go_on()
        except StopIteration as end:
            return end.value
        try:
            go_on = functools.partial(course.send, (yield from loop.stepping()))
        except BaseException as error:
            go_on = functools.partial(course.throw, error)


@dataclass(eq=False)
class _Runner:
    """A run under way: `part` is the micro-batch that it waits for."""

    entrant: Entrant
    stream: Stream = field(default_factory=Stream)
    why: str | None = None
    parts: Any = None
    part: Any = None

    @property
    def name(self) -> str:
        return self.entrant.name


class _Rounds:
    """The runs of one call of `train_together`."""

    def __init__(
        self,
        host: Host,
        waiting: list[Entrant],
        room: int | None,
        exact: bool,
        tell: Callable[[Loop, str], None],
    ):
        self.host, self.waiting, self.room, self.exact, self.tell = host, waiting, room, exact, tell
        self.order = [entrant.name for entrant in waiting]
        self.running: list[_Runner] = []
        self.endings: dict[str, Ending] = {}
        self.stopping: Stopping = stop_on_signals
        self._work: contextlib.ExitStack | None = None

    def run(self) -> list[Ending]:
        """Go on until every run has ended, or a signal asks for the end: each finishes its step then."""
        try:
            with stop_on_signals() as asked:
                self.stopping = lambda: contextlib.nullcontext(asked)
                while self.running or (self.waiting and not asked()):
                    if not asked():
                        self._admit()
                    for runner, go_on in self._round():
                        self._advance(runner, go_on)
        except BaseException as error:
            for runner in self.running:
                with contextlib.suppress(BaseException):
                    runner.parts.throw(error)
            raise
        finally:
            self._pause()
            self.host.activate()
        self.endings |= {entrant.name: Ending(entrant.name, error=Interrupted(0)) for entrant in self.waiting}
        return [self.endings[name] for name in self.order]

    # ------------------------------------------------------------------ beginning and ending

    def _admit(self) -> None:
        for entrant in list(self.waiting):
            if admits(entrant.need, [runner.entrant.need for runner in self.running], self.room):
                self.waiting.remove(entrant)
                self._begin(_Runner(entrant))

    def _begin(self, runner: _Runner) -> None:
        self._pause()
        self.host.activate()
        try:
            with runner.stream.current():
                runner.parts = in_parts(runner.entrant.start(self.stopping))
        except Exception as error:
            return self._end(runner, Ending(runner.name, error=error))
        self.running.append(runner)
        self._advance(runner, functools.partial(next, runner.parts))

    def _end(self, runner: _Runner, ending: Ending) -> None:
        self.endings[runner.name] = ending
        self.running = [other for other in self.running if other is not runner]
        self._pause()
        self.host.activate()
        runner.entrant.leave()

    def _advance(self, runner: _Runner, go_on: Callable[[], Part]) -> None:
        """Let a run work until it needs the loss of its next micro-batch."""
        with self._turn(runner):
            try:
                runner.part = go_on()
                if runner.why is None:
                    runner.why = EXACT if self.exact else own_passes(runner.part.loop)
                    self.tell(runner.part.loop, runner.why)
                return
            except StopIteration as end:
                ending = Ending(runner.name, end.value, why=runner.why or "")
            except (Exception, Interrupted) as error:
                ending = Ending(runner.name, error=error, why=runner.why or "")
        self._end(runner, ending)

    @contextlib.contextmanager
    def _turn(self, runner: _Runner) -> Iterator[None]:
        """Let one run be all that there is."""
        self._resume()
        with runner.stream.current():
            self.host.activate(runner.name)
            self._train_mode()
            yield

    def _train_mode(self) -> None:
        """A run that has ended leaves the model in eval mode."""
        if not self.host.model.training:
            self.host.model.train()

    def _resume(self) -> None:
        """Switch on what passes use, for all that is attached now: each finds it on, without a walk of its own."""
        if self._work is None:
            self._work = contextlib.ExitStack()
            self._work.enter_context(fast_attention(self.host.model))
            self._work.enter_context(lean_norms(self.host.model))

    def _pause(self) -> None:
        """Switch it off again, before anything is attached or detached."""
        if self._work is not None:
            self._work.close()
            self._work = None

    # ------------------------------------------------------------------ passes

    def _round(self) -> Iterator[tuple[_Runner, Callable[[], Part]]]:
        """Compute the micro-batch of each run, and say how each goes on."""
        sharing = [runner for runner in self.running if not runner.why]
        found = self._jointly(sharing) if len(sharing) > 1 else {}
        for runner in list(self.running):
            answer = found[runner] if runner in found else self._alone(runner)
            go_on = runner.parts.throw if isinstance(answer, Exception) else runner.parts.send
            yield runner, functools.partial(go_on, answer)

    def _alone(self, runner: _Runner) -> float | Exception:
        with self._turn(runner):
            try:
                return float(runner.part.loop.compute(runner.part))
            except Exception as error:
                return error

    def _jointly(self, runners: list[_Runner]) -> dict[_Runner, float | Exception]:
        """The losses of several micro-batches from one pass.

        Where it fails, all is as it was before: each run has a pass of its own then, to see whose fault it is. If it is
        nobody's, they share no further pass.
        """
        self._resume()
        self._train_mode()
        before = [runner.stream.generator.get_state() for runner in runners]
        parameters = [p for runner in runners for p in runner.part.loop.parameters()]
        try:
            # Gradients of a pass that fails could not be told from those of earlier ones.
            with gradients_aside(parameters), self._owned(runners) as sinks:
                losses = self._losses(runners, sinks)
                runners[0].part.loop.accelerator.backward(torch.stack(losses).sum())
                gradients = [p.grad for p in parameters]
        except Exception as error:
            for runner, state in zip(runners, before, strict=True):
                runner.stream.generator.set_state(state)
            found = {runner: self._alone(runner) for runner in runners}
            if not any(isinstance(answer, Exception) for answer in found.values()):
                for runner in runners:
                    runner.why = f"a pass for several runs failed: {type(error).__name__}: {error}"
            return found
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return {runner: float(loss.detach()) for runner, loss in zip(runners, losses, strict=True)}

    @contextlib.contextmanager
    def _owned(self, runners: list[_Runner]) -> Iterator[list[Sinks]]:
        """Say which tokens of the pass are whose, and where their adapters take random numbers and leave losses."""
        state = self.host.state
        counts = [(runner.name, _tokens(runner.part)) for runner in runners]
        generators = {runner.name: runner.stream.generator for runner in runners}
        sinks = [Sinks([], runner.part.used) for runner in runners]
        offload = offloading(self.host.model, runners[0].part.loop.training.offload)
        with self.host.tokens(counts, generators=generators), offload:
            state.sinks = {
                key: sink for runner, sink in zip(runners, sinks, strict=True) for key in self.host.parts(runner.name)
            }
            try:
                yield sinks
            finally:
                state.sinks = {}

    def _losses(self, runners: list[_Runner], sinks: list[Sinks]) -> list[Tensor]:
        parts, state = [runner.part for runner in runners], self.host.state
        with state.collect() as nobodys:
            hidden = parts[0].loop.loss.hidden(joined([part.batch for part in parts]))
            each = hidden.split([_tokens(part) for part in parts], 1)
            found = [self._loss(part, own) for part, own in zip(parts, each, strict=True)]
        if nobodys:
            raise AttachError("An adapter emits a loss of all tokens of a pass, and they belong to several runs.")
        return [part.whole(loss, sink.losses) for part, loss, sink in zip(parts, found, sinks, strict=True)]

    def _loss(self, part: Part, hidden: Tensor) -> Tensor:
        """The loss of one micro-batch, for which the head sees the labels of its run alone."""
        mine = segments([(tuple(self.host.parts(part.loop.name)), _tokens(part))], by_token=True)
        with self.host.state.showing(mine, None):
            return part.loop.loss.of(hidden, part.batch["labels"], part.labels)


def _tokens(part: Part) -> int:
    """Number of tokens of a packed micro-batch."""
    return int(part.batch["input_ids"].shape[1])
