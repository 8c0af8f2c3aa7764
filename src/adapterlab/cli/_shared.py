"""What several verbs have in common: options, progress, `key=value` settings. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from adapterlab.errors import ConfigError
from adapterlab.paths import user_path
from adapterlab.terminal import shown

Target = Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a base model.", show_default=False)]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Another base model than the one the run or adapter names.")
]
Checkpoint = Annotated[str, typer.Option(help="Which adapter of a run: best or last.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the fastest there is.")]
Precision = Annotated[str | None, typer.Option(help="Of the base weights: fp32, bf16 or fp16; default: the run's.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings; read it before.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher values sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
ApiKey = Annotated[str | None, typer.Option("--key", help="Key of the server; default: $ADAPTERLAB_KEY.")]
System = Annotated[str | None, typer.Option(help="System message; default: the one of the run.")]


def help_config(module: str, name: str) -> Any:
    """Make the option `--help-config`, which lists the keys of a class of settings and leaves.

    Args:
        module: of the class, imported when the option is given.
        name: of the class.
    """

    def show(asked: bool) -> None:
        if asked:
            import importlib

            from adapterlab.settings import keys

            for key in keys(getattr(importlib.import_module(module), name)):
                default = f"; default: {key.default}" if key.default else "; must be given"
                say(key.name, nl=False, bold=True)
                say(f"  ({key.values}{default})")
                say(textwrap.fill(key.meaning, 78, initial_indent="    ", subsequent_indent="    "))
            raise typer.Exit

    return typer.Option("--help-config", is_eager=True, callback=show, help="List all settings and leave.")


def settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Read `key=value` pairs; values are YAML, and dots lead into nested settings.

    Args:
        pairs: as typed.
        option: name of the option, for messages.

    Raises:
        ConfigError: a pair is malformed.
    """
    from adapterlab.yaml_text import overrides

    return overrides(pairs, f"{option} eval_size=50")


def read_lines(file: str) -> list[str]:
    """Read a text file, or standard input for `-`, without blank lines.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    import sys

    try:
        if file == "-" and (sys.stdin is None or sys.stdin.closed):
            raise OSError("standard input is closed")
        text = sys.stdin.read() if file == "-" else user_path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. Give a UTF-8 text file with one prompt a line.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{file} holds no prompt. Write one on each line.")
    return lines


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr.

    Yields:
        A function of the phase's name, how much of it is done, and how much there is.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from adapterlab.foreign.streams import steady_output
    from adapterlab.terminal import Terminal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with steady_output(), Progress(*columns, console=Terminal(stderr=True), transient=True) as display:

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = display.add_task(phase, total=total)
            display.update(tasks[phase], completed=done)

        yield update


def by_role(paths: Sequence[str]) -> dict[str, list[int]]:
    """Put modules of one role together, as "q x 24": hundreds of lines say less than a few.

    Args:
        paths: of modules.

    Returns:
        Positions in `paths` by what a table calls the group, in the order of their first.
    """
    from adapterlab.foreign.roles import role_of

    found: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        found.setdefault(role_of(path) or path.rpartition(".")[2], []).append(i)
    return {f"{role} x {len(places)}" if len(places) > 1 else role: places for role, places in found.items()}


def say(text: object = "", *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print a text; what a terminal would obey in it is shown.

    Args:
        text: what to print.
        nl: whether the line ends.
        err: on stderr instead of stdout.
        style: colours and the like, as of `typer.style`.
    """
    plain = shown(str(text))
    typer.echo(typer.style(plain, **style) if style else plain, nl=nl, err=err)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for programs."""
    import json

    say(json.dumps(value, indent=2, ensure_ascii=False))
