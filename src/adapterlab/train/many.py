"""Several training runs of one base in one process: from their configurations to adapters in their folders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from rich.progress import Progress

from adapterlab.errors import ConfigError
from adapterlab.foreign.process_memory import give_back
from adapterlab.foreign.streams import steady_output
from adapterlab.hosts import Host
from adapterlab.terminal import Terminal
from adapterlab.train import folder as files
from adapterlab.train.common import check_common
from adapterlab.train.config import Provenance, TrainConfig
from adapterlab.train.course import Course, carried_out
from adapterlab.train.display import Display, endings_table, training_bars
from adapterlab.train.loop import Listener, Loop, Record
from adapterlab.train.result import RunResult
from adapterlab.train.run import Base, attached, left_behind, load_base, loop_of, make_accelerator, recorded, sources_of
from adapterlab.train.sharing import LEAST, same_bits
from adapterlab.train.signals import Interrupted, Stopping, stop_on_signals
from adapterlab.train.together import Ending, Entrant, train_together
from adapterlab.train.trackers import check_trackers

_IN_THE_BASE = "it lives in the base's own weights, which the others share"


class _Apart(Exception):
    """A run cannot share the base."""


@dataclass
class _Run:
    """One of the runs.

    Attributes:
        config: of the run.
        sources: of the configuration's values.
        name: of its adapter while it trains.
        label: what people call it: its output folder.
        accelerator: of the run.
        state: of the checkpoint that it goes on from.
        need: bytes beside the base.
    """

    config: TrainConfig
    sources: Provenance
    name: str
    label: str
    accelerator: Accelerator
    state: Mapping[str, Any] | None = None
    need: int | None = 0


def fit_many(
    configs: Sequence[TrainConfig | Mapping[str, Any]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    force: bool = False,
    exact: bool = False,
    provenances: Sequence[Provenance | None] | None = None,
    callbacks: Sequence[Listener] = (),
) -> list[Ending]:
    """Train several adapters of one base at once; each leaves in its output folder what `fit` leaves there.

    The base is loaded once. Micro-batches of all runs stand behind each other in one forward and backward pass, and
    everything else is each run's own: method, data, steps, optimizer, evaluation, checkpoints, random numbers. A run
    that fails ends alone. Runs for which there is no memory yet wait until others have ended. Runs that need passes of
    their own have them on the same base; a run whose method lives in the base's own weights follows by itself.

    Args:
        configs: a `TrainConfig` or its fields for each run. Model, precision and whatever else is said of the base are
            the same in all, and each has an output folder of its own.
        resume: go on from the checkpoints in the output folders; what is finished stays as it is.
        overwrite: replace earlier runs in the output folders.
        quiet: print nothing.
        force: start even what cannot fit into memory.
        exact: every run has passes of its own, so that each number is that of `fit` to the bit.
        provenances: for each run as for `fit`.
        callbacks: told what happens in all runs; see `Listener`.

    Returns:
        How each run ended, in the order of `configs`: its `RunResult` in `value`, or what it failed of in `error`; the
        name is the output folder.

    Raises:
        ConfigError: the runs do not share a base, or one cannot be continued or cannot fit.
        OutputError: an output folder cannot be used.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; every run that was under way has a checkpoint.
    """
    made = [config if isinstance(config, TrainConfig) else TrainConfig(**config) for config in configs]
    check_common(made)
    for config in made:
        check_trackers(config.training.trackers)
    runs = list(_runs(made, provenances or [None] * len(made)))
    if runs[0].accelerator.num_processes > 1:
        raise ConfigError("Runs are trained together in one process. Start them without accelerate launch.")
    with contextlib.ExitStack() as held:
        held.enter_context(steady_output())
        for config in made:
            held.enter_context(files.claimed(config.output, resume=resume, overwrite=overwrite))
        console = Terminal(quiet=quiet, highlight=False)
        many = _Many(runs, console, callbacks, force=force, exact=exact)
        if resume:
            many.look_back()
        endings = many.train()
        console.print(endings_table(endings))
    stopped = [ending.error for ending in endings if isinstance(ending.error, Interrupted)]
    if stopped:
        raise max(stopped, key=lambda error: error.step)
    return endings


def _runs(configs: Sequence[TrainConfig], provenances: Sequence[Provenance | None]) -> Iterator[_Run]:
    for i, (config, provenance) in enumerate(zip(configs, provenances, strict=True)):
        accelerator = make_accelerator(config, beside=i > 0)
        yield _Run(config, sources_of(config, provenance), adapter_name(i), str(config.output), accelerator)


class _Many:
    """The runs of one call of `fit_many`, with what they have in common."""

    def __init__(self, runs: list[_Run], console: Terminal, callbacks: Sequence[Listener], *, force: bool, exact: bool):
        self.runs, self.console, self.callbacks = runs, console, callbacks
        self.force, self.exact = force, exact
        self.done: dict[str, Ending] = {}
        self.bars: Progress | None = training_bars(console) if console.is_terminal else None

    def look_back(self) -> None:
        """See what earlier processes left of the runs."""
        for run in self.runs:
            done, run.state = left_behind(run.config)
            if done is not None:
                self._say(f"{run.label} is finished already; nothing is left to do.")
                self.done[run.name] = Ending(run.name, done)

    def train(self) -> list[Ending]:
        """Train what is left, and say how each run ended."""
        left = [run for run in self.runs if run.name not in self.done]
        try:
            if left:
                self._train(left)
        finally:
            if self.bars is not None:
                self.bars.stop()
        return [dataclasses.replace(self.done[run.name], name=run.label) for run in self.runs]

    def _train(self, runs: list[_Run]) -> None:
        room = self._plan(runs)
        base = load_base(runs[0].config, runs[0].accelerator)
        self._announce(base.host)
        entrants = [
            Entrant(
                run.name,
                functools.partial(self._start, base, run),
                run.need,
                functools.partial(leave, base.host, run.name),
            )
            for run in runs
        ]
        endings = train_together(base.host, entrants, room=room, exact=self.exact, tell=self._tell)
        self.done |= {ending.name: ending for ending in endings}
        del base, entrants
        for run in runs:
            if isinstance(apart := self.done[run.name].error, _Apart):
                self.done[run.name] = self._by_itself(run, str(apart))

    def _plan(self, runs: list[_Run]) -> int | None:
        """Note what each run needs beside the base, and say how much there is; refuse what cannot fit."""
        from adapterlab.plan.before_run import needed

        room, needs = needed([run.config for run in runs], self._say, force=self.force, make=not self.console.quiet)
        for run, need in zip(runs, needs, strict=True):
            run.need = need
        return room

    def _announce(self, host: Host) -> None:
        if self.exact or self.console.quiet:
            return
        told = "the bits of separate runs" if same_bits(host.model) else "the numbers of separate runs up to rounding"
        self._say(f"Products of {LEAST} and more rows give {told} on this machine.")

    def _start(self, base: Base, run: _Run, stopping: Stopping) -> Course[Loop, Record, RunResult]:
        if _changes(base.host, run):
            raise _Apart(_IN_THE_BASE)
        return self._course(base, run, stopping)

    def _course(self, base: Base, run: _Run, stopping: Stopping) -> Course[Loop, Record, RunResult]:
        """Attach a run's method and make it ready."""
        job = attached(run.config, base, run.state, run.name)
        loop = loop_of(run.config, job, run.accelerator, prepare=run.state is None)
        self._say(
            f"{run.label}: {loop.method.id}, {job.host.summary(run.name).trainable:,} trainable; {loop.total:,} steps "
            f"of {loop.sampler.per_step} of {len(job.rows):,} rows, lr {run.config.training.lr:g}"
        )
        shown = [] if self.console.quiet else [Display(self.console, run.label, self.bars)]
        beside = [other.label for other in self.runs if other is not run]
        return recorded(
            run.config, job, loop, run.sources, state=run.state, listeners=[*shown, *self.callbacks],
            stopping=stopping, together=beside,
        )  # fmt: skip

    def _by_itself(self, run: _Run, why: str) -> Ending:
        """Train a run on a base of its own."""
        if any(isinstance(ending.error, Interrupted) for ending in self.done.values()):
            return Ending(run.name, error=Interrupted(0), why=why)
        gc.collect()
        give_back()
        self._say(f"{run.label} is trained by itself: {why}.")
        try:
            base = load_base(run.config, run.accelerator)
            course = self._course(base, run, stop_on_signals)
            return Ending(run.name, carried_out(course, operator.methodcaller("step")), why=why)
        except (Exception, Interrupted) as error:
            return Ending(run.name, error=error, why=why)

    def _tell(self, loop: Loop, why: str) -> None:
        label = next(run.label for run in self.runs if run.name == loop.name)
        self._say(f"{label} has passes of its own: {why}." if why else f"{label} shares passes.")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def adapter_name(number: int) -> str:
    """Return the name that the adapter of a run has while it trains with others, by its place among them."""
    return f"run{number}"


def in_the_base(host: Host, name: str) -> bool:
    """Say whether an adapter lives in the base's own weights, so that no other run can have the base meanwhile."""
    return any(host.patches[key] for key in host.parts(name))


def _changes(host: Host, run: _Run) -> bool:
    """The like of a run's method, without making it live."""
    host.attach(run.config.make_method(), run.name, active=False)
    try:
        return in_the_base(host, run.name)
    finally:
        host.detach(run.name)


def leave(host: Host, name: str) -> None:
    """Take an adapter off again, if its run came as far as to put it on."""
    if name in host.methods:
        host.detach(name)
