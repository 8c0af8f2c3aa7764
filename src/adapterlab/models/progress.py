"""Progress bars for the phases of fetching a model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from adapterlab.terminal import Terminal

Advance = Callable[[int], None]


def bars(visible: bool) -> Progress:
    """Make the display of one pull, on stderr so that stdout carries results alone."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Terminal(stderr=True), disable=not visible)


@contextlib.contextmanager
def phase(progress: Progress, text: str, size: int | None = None) -> Iterator[Advance]:
    """Show one phase while the block runs.

    Args:
        progress: the display.
        text: what is being done.
        size: bytes to go through; None when the phase cannot be measured.

    Yields:
        A function to call with the number of bytes done so far.
    """
    task = progress.add_task(text, total=size, amount="")

    def advance(done: int) -> None:
        if size is not None:  # a downloader may hold a file twice for a moment
            progress.update(task, completed=min(done, size), amount=f"{min(done, size) / 1e6:,.1f} MB")

    yield advance
    advance(size or 0)
    progress.update(task, total=size or 1, completed=size or 1)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers while the block runs; its warnings stay."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging

    shown, make = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    tqdm.__init__ = functools.partialmethod(make, disable=True)  # its GGUF reader asks no setting
    try:
        yield
    finally:
        tqdm.__init__ = make
        if shown:
            logging.enable_progress_bar()
