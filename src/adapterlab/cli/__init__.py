"""The command line: one file per verb.

A file `cli/<verb>.py` defines a function of the same name, annotated for typer; its docstring is the help text.
The files are found by name, so adding a verb edits nothing else. They import heavy modules inside the function,
which keeps `adapterlab --help` fast.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from adapterlab.cli._shared import say
from adapterlab.errors import AdapterlabError
from adapterlab.terminal import Terminal, show_messages_of_others, shown

_UsageError: Any = typer.BadParameter.__base__  # click's own, or that of the copy which typer brings
_SETTINGS = ("overrides", "options")  # arguments that are written key=value


def build() -> typer.Typer:
    """Collect the verbs of this folder into one application."""
    app = typer.Typer(
        name="adapterlab",
        help="Parameter-efficient fine-tuning: attach, train, prove, evaluate, export.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            app.command(name=info.name.replace("_", "-"), cls=_Verb)(getattr(module, info.name))

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    ) -> None:
        if version:
            from adapterlab.version import __version__

            say(f"adapterlab {__version__}")
            raise typer.Exit

    return app


class _Verb(TyperCommand):
    """A verb that says what is wrong with its arguments.

    Wrong values are named without the kind of error that pydantic puts before its message, and a setting that is
    written as an option is told how settings are written.
    """

    def parse_args(self, *args: Any) -> list[str]:
        try:
            return super().parse_args(*args)
        except _UsageError as error:
            option = getattr(error, "option_name", None)
            if isinstance(error, typer.BadParameter):
                error.message = error.message.removeprefix("Value error, ")
            elif option and any(parameter.name in _SETTINGS for parameter in self.params):
                error.message += f". Settings are written without dashes: {option.lstrip('-')}=VALUE."
            raise


def main(args: list[str] | None = None) -> None:
    """Run the command line; an `AdapterlabError` becomes one message and exit code 2."""
    show_messages_of_others()
    try:
        build()(args=args, standalone_mode=True)
    except (AdapterlabError, MemoryError, RuntimeError) as error:
        if not isinstance(error, AdapterlabError) and not _is_out_of_memory(error):
            raise
        Terminal(stderr=True, highlight=False, soft_wrap=True).print("error:", style="bold red", end=" ")
        print(shown(_message(error)), file=sys.stderr)
        raise SystemExit(2) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch has a class for it on GPUs alone."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    )


def _message(error: Exception) -> str:
    if isinstance(error, AdapterlabError):
        return str(error)
    first = (str(error).strip().splitlines() or ["MemoryError"])[0]
    return (
        f"There is not enough memory: {first} Lower batch_size, max_length or the method's rank, or pack the base with "
        "quantize=nf4; adapterlab plan says what a run needs."
    )
