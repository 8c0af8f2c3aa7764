"""What a person sees: the configuration, what will train, progress, and the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from adapterlab.terminal import Terminal
from adapterlab.train.loop import Listener, Loop, Record

if TYPE_CHECKING:
    from adapterlab.engine.summary import Summary
    from adapterlab.train.result import RunResult
    from adapterlab.train.together import Ending

_SMOOTHING = 0.9  # weight of the past in the loss that is shown


def config_table(
    flat: Mapping[str, Any], provenance: Mapping[str, str], meanings: Mapping[str, str] | None = None
) -> Table | Group:
    """Show every setting with where it came from; what the user set stands out.

    Args:
        flat: values by dotted key.
        provenance: sources by dotted key.
        meanings: a sentence by dotted key, shown below each setting.
    """
    sources = {key: provenance.get(key, "default") for key in flat}
    if meanings is not None:
        lines: list[Any] = ["Configuration"]
        for key, value in flat.items():
            there = "" if sources[key] == "default" else f"  ({sources[key]})"
            lines.append(Text.assemble((key, "bold" if there else ""), f" = {value}", (there, "dim")))
            lines += [Padding(Text(meanings[key], style="dim"), (0, 0, 0, 4))] if meanings.get(key) else []
        return Group(*lines)
    table = Table(Column("setting", overflow="fold"), "value", "from", title="Configuration", title_justify="left")
    for key, value in flat.items():
        style = "dim" if sources[key] == "default" else "bold"
        table.add_row(*map(Text, (key, str(value), sources[key])), style=style)
    return table


def proof_table(summary: Summary, facts: Mapping[str, str], sample: Text | None) -> Group:
    """Show what will train and on which tokens, before the first step.

    Args:
        summary: of the adapter.
        facts: further lines, such as the loss path and the share of trained tokens.
        sample: one row as the model sees it.
    """
    table = Table("what", "is", title="What will train", title_justify="left", show_header=False)
    table.add_row("method", f"{summary.method}, as adapter {summary.name!r}")
    table.add_row("modules", Text(", ".join(f"{role} {n}" for role, n in summary.modules.items()) or "none"))
    share = 100 * summary.trainable / max(1, summary.total)
    table.add_row("trainable", f"{summary.trainable:,} of {summary.total:,} ({share:.3f} %)")
    for kind, counts in summary.dtypes.items():
        table.add_row(f"{kind} dtypes", ", ".join(f"{d} {n:,}" for d, n in counts.items()) or "none")
    for key, value in facts.items():
        table.add_row(key, Text(value))
    return Group(table, Panel(sample, title="first row", title_align="left")) if sample is not None else Group(table)


def result_table(result: RunResult) -> Table:
    """Show what came out."""
    table = Table("what", "is", title="Result", title_justify="left", show_header=False)
    table.add_row("steps", f"{result.steps} ({result.epochs:.2f} epochs)")
    if result.steps:
        table.add_row("train loss", f"{result.train_loss:.4f} at the last step, on rows it trains on")
    if result.eval_loss is not None:
        table.add_row("evaluation loss", f"{result.eval_loss:.4f} at the end, on rows set apart")
        table.add_row("best", f"{result.best_loss:.4f} at step {result.best_step}")
    if result.steps:
        table.add_row("training time", f"{result.seconds:.1f} s, {result.tokens_per_second:,.0f} tokens/s")
    gpu = result.memory["gpu_peak"]
    peak = f"{_mib(gpu)} on the GPU" if gpu else f"{_mib(result.memory['peak'])}"
    table.add_row("peak memory", f"{peak}, {_mib(result.memory['peak_beyond_loaded'])} beyond the loaded model")
    table.add_row("proven to train", f"{result.proven} tensors")
    for what, text in result.outcome.items():
        table.add_row(what, Text(text))
    for kind, path in (("best adapter", result.best), ("last adapter", result.last)):
        if path is not None:
            table.add_row(kind, Text(str(path)))
    return table


def training_bars(console: Terminal) -> Progress:
    """Make what shows how far runs are on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def endings_table(endings: Sequence[Ending]) -> Table:
    """Show how runs that were trained together ended."""
    table = Table("run", "steps", "loss", "best", "passes", title="Results", title_justify="left")
    for ending in endings:
        result, passes = ending.value, f"its own: {ending.why}" if ending.why else "shared"
        if result is None:
            table.add_row(Text(ending.name), "", Text(_reason(ending), style="bold red"), "", Text(passes))
            continue
        loss = result.train_loss if result.eval_loss is None else result.eval_loss
        best = "" if result.best_loss is None else f"{result.best_loss:.4f} at {result.best_step}"
        table.add_row(Text(ending.name), str(result.steps), f"{loss:.4f}", best, Text(passes))
    return table


def _reason(ending: Ending) -> str:
    first = (str(ending.error).strip().splitlines() or [""])[0]
    return f"{type(ending.error).__name__}: {first}"


class Display(Listener):
    """A progress bar on a terminal, and lines of text elsewhere.

    Args:
        console: to print on.
        label: of the run, where there are several.
        bars: of all of them, which somebody else starts and stops.
    """

    def __init__(self, console: Terminal | None = None, label: str = "", bars: Progress | None = None):
        self.console, self.label, self.bars = console or Terminal(), label, bars
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.loss: float | None = None
        self.first = (0, 0, 0.0)  # step, tokens and training time at which this process began

    def started(self, loop: Loop) -> None:
        """Open the bar."""
        status = loop.status
        self.first = (status.step, status.tokens, status.seconds)
        if status.step:
            self._line(f"continuing after step {status.step}")
        if self.console.is_terminal:
            self.progress = self.bars or training_bars(self.console)
            self.task = self.progress.add_task(
                self.label or "training", total=loop.total, completed=status.step, text=""
            )  # fmt: skip
            self.progress.start()  # what is started already goes on

    def stepped(self, loop: Loop, record: Record) -> None:
        """Move the bar, or print a line now and then."""
        loss = record["loss"]
        self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss
        tokens, seconds = record["tokens"] - self.first[1], max(1e-9, loop.status.seconds - self.first[2])
        text = (
            f"loss {self.loss:.4f}  lr {record['lr']:.2e}  {tokens / seconds:,.0f} tok/s  "
            f"{_mib(record['memory'])}  epoch {record['epoch']:.2f}"
        )
        step = record["step"]
        if self.progress is not None:
            self.progress.update(self.task, completed=step, text=text)
        elif step % loop.training.log_every == 0 or step == loop.total or step == self.first[0] + 1:
            left = (loop.total - step) * seconds / (step - self.first[0])
            self._line(f"step {step}/{loop.total}  {text}  {_clock(left)} left")

    def evaluated(self, loop: Loop, record: Record, improved: bool) -> None:
        """Print the evaluation."""
        best = "best so far" if improved else f"best {loop.status.best_loss:.4f} at step {loop.status.best_step}"
        self._line(f"step {record['step']}/{loop.total}  evaluation loss {record['eval_loss']:.4f} ({best})")

    def trained(self, loop: Loop) -> None:
        """Say why training ended before its last step."""
        if loop.status.step < loop.total:
            self._line(f"stopped early: {loop.status.stale} evaluations in a row without a new lowest loss")

    def closed(self, loop: Loop) -> None:
        """Close the bar."""
        if self.progress is not None and self.bars is None:
            self.progress.stop()

    def _line(self, text: str) -> None:
        told = f"{self.label}: {text}" if self.label else text
        self.console.print(told, highlight=False, soft_wrap=True, markup=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
