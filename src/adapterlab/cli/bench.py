"""`adapterlab bench`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from adapterlab.cli._shared import ApiKey, AsJson, bars, help_config, print_json, say
from adapterlab.errors import ConfigError

if TYPE_CHECKING:
    from adapterlab.serve.load import Outcome

_TIMES = {
    "first_token_p50": "first token, median",
    "first_token_p95": "first token, 95 of 100 within",
    "token_p50": "between tokens, median",
    "token_p95": "between tokens, 95 of 100 within",
}


class Measured(StrEnum):
    """What is measured."""

    SERVE = "serve"


def bench(
    what: Annotated[Measured, typer.Argument(help="serve: a running server.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as requests=200 clients=32, or rate=4.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter to ask; may be repeated. Default: all that are there.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base alone.")] = False,
    server: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    key: ApiKey = None,
    as_json: AsJson = False,
    help_config: Annotated[bool, help_config("adapterlab.serve.load", "Load")] = False,
) -> None:
    """Put a load on a server: tokens a second, and how long its clients wait."""
    from adapterlab.serve.client import Client
    from adapterlab.serve.load import Load, run
    from adapterlab.yaml_text import overrides

    load, client = Load(**overrides(options or [], "requests=200")), Client(server, key)
    if base and adapter:
        raise ConfigError("--base asks the base alone, and --adapter an adapter: give one of them.")
    first, *others = [str(model["id"]) for model in client.models()]
    models = [first] if base else adapter or others or [first]
    with bars() as update:
        found = run(client, load, models, lambda done: update("answers", done, load.requests))
    summary = {**found.summary(), "models": len(models), **load.model_dump()}
    if as_json:
        print_json(summary)
    else:
        _show(found, len(models))
    if found.felt and all(one.error for one in found.felt):
        raise typer.Exit(1)


def _show(found: Outcome, models: int) -> None:
    summary = found.summary()
    say(f"{summary['requests']} requests to {models} models in {found.seconds:.1f} s")
    say(f"{summary['tokens_per_second']:.1f} tokens a second, {summary['requests_per_second']:.2f} requests")
    for name, text in _TIMES.items():
        if (value := summary[name]) is not None:
            say(f"{text}: {1000 * value:.0f} ms")
    errors = sorted({one.error for one in found.felt if one.error})
    if errors:
        say(f"{summary['errors']} failed, for example: {errors[0]}", err=True, fg="red")
