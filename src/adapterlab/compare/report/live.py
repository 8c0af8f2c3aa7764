"""A live view of a comparison in the terminal: one line for each run, with the time left for each and for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adapterlab.compare.report import amounts
from adapterlab.compare.results import Comparison, Run
from adapterlab.terminal import Terminal

if TYPE_CHECKING:
    from adapterlab.compare.engine import Active

_STYLES = {"waiting": "dim", "running": "cyan", "finished": "green", "failed": "red"}
_URGENCY = {"running": 0, "failed": 1, "waiting": 2, "finished": 3}  # what is shown when not all fits
_REASON = 60  # characters of a failure's reason


class LiveView:
    """Shows runs while they go; a watcher for `compare`.

    Args:
        console: a terminal; standard error by default.
        clock: rising seconds, for the time spent.

    Example:
        with LiveView() as view:
            compare(config, watcher=view)
    """

    def __init__(self, console: Terminal | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Terminal(stderr=True)
        self.clock = clock
        self.begun = clock()
        self.live = Live(console=self.console, auto_refresh=False)

    def __enter__(self) -> Self:
        """Open the view."""
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self.live.stop()

    def update(self, comparison: Comparison, active: Sequence[Active]) -> None:
        """Show a new state."""
        self.live.update(self.render(comparison, active), refresh=True)

    def render(self, comparison: Comparison, active: Sequence[Active]) -> Group:
        """Return what is shown."""
        runs = comparison.runs
        at_work = {(job.label, job.seed): job for job in active if job.kind in ("run", "untrained")}
        others = [job for job in active if job.kind not in ("run", "untrained")]
        table = Table("method", "seed", "status", "progress", "loss", "score", "time", "left", title=comparison.name)
        for column in table.columns[4:]:
            column.justify = "right"
        for run in self._fitting(runs, len(others)):
            table.add_row(*_row(run, at_work.get((run.label, run.seed))))
        for job in others:
            name, *rest = _at_work(job)
            table.add_row(Text(job.name), "", name, *rest)
        ended = sum(run.status in ("finished", "failed") for run in runs)
        left = remaining(runs, at_work, max(1, len(active)))
        text = f"{ended} of {len(runs)} runs ended, {amounts.time(self.clock() - self.begun)} spent"
        return Group(table, Text(text + (f", about {amounts.time(left)} left" if left else "")))

    def _fitting(self, runs: Sequence[Run], others: int) -> Sequence[Run]:
        room = max(3, self.console.height - 7 - others)
        if len(runs) <= room:
            return runs
        chosen = sorted(range(len(runs)), key=lambda i: _URGENCY[runs[i].status])[:room]
        return [runs[i] for i in sorted(chosen)]


def remaining(runs: Sequence[Run], active: Mapping[tuple[str, int], Active], processes: int = 1) -> float | None:
    """Estimate the seconds until all runs have ended; None before anything is known.

    A run that waits is taken to last as long as the other seeds of its method did, else as long as the mean of all.

    Args:
        runs: all of them.
        active: jobs at work, by label and seed.
        processes: how many go at a time.
    """
    known: dict[str, list[float]] = {}
    open_: list[tuple[str, float | None]] = []
    for run in runs:
        job = active.get((run.label, run.seed))
        left = None if job is None else _left(job)
        if run.status in ("waiting", "running"):
            open_.append((run.label, left))
        if job is not None and left is not None:
            known.setdefault(run.label, []).append(job.elapsed + left)
        elif run.status == "finished" and run.own_seconds and not run.is_untrained:
            known.setdefault(run.label, []).append(run.own_seconds)
    if not known:
        return None
    typical = statistics.fmean(seconds for many in known.values() for seconds in many)
    expected = {label: statistics.fmean(many) for label, many in known.items()}
    each = [expected.get(label, typical) if left is None else left for label, left in open_]
    return max(sum(each) / processes, *each) if each else 0.0


def _left(job: Active) -> float | None:
    return job.elapsed * (job.total - job.step) / job.step if 0 < job.step <= job.total else None


def _row(run: Run, job: Active | None) -> list[RenderableType]:
    if job is not None:
        return [Text(run.label), str(run.seed), *_at_work(job)]
    status = Text(run.status, _STYLES[run.status])
    if run.status == "failed":
        status.append(f": {run.reason[:_REASON]}", "dim")
    loss = "" if run.best is None else amounts.loss(run.best.loss)
    score = "" if run.best is None or run.best.score is None else amounts.percent(run.best.score)
    spent = "" if run.wall_seconds is None else amounts.time(run.wall_seconds)
    return [Text(run.label), str(run.seed), status, "", loss, score, spent, ""]


def _at_work(job: Active) -> list[RenderableType]:
    left = _left(job)
    bar = ProgressBar(total=job.total, completed=job.step, width=16) if job.total else ""
    loss = "" if job.loss is None else amounts.loss(job.loss)
    phase = Text(job.phase, _STYLES["running"])
    return [phase, bar, loss, "", amounts.time(job.elapsed), "" if left is None else amounts.time(left)]
