"""`adapterlab advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import AsJson, Trust, print_json, say, settings
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from adapterlab.compare.advice import Advice


def advise(
    model: Annotated[str, typer.Argument(help="A known shape, catalogue alias, local folder or hub id.")],
    data: Annotated[str, typer.Argument(help="File, folder or hub id of the rows, or a generated task.")],
    more: Annotated[
        list[str] | None, typer.Option("--data", help="Further settings of the data, such as eval_size=100.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that may be used, such as 24GB; default: that of this machine.")
    ] = None,
    past: Annotated[Path, typer.Option(help="Folder in which earlier comparisons are looked for.")] = Path("."),
    write: Annotated[Path | None, typer.Option(help="Write a training configuration to this file.")] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Advise settings to start from, each with its reason and source; earlier comparisons count first."""
    import dataclasses

    from adapterlab.compare.advice import advise as ask
    from adapterlab.errors import OutputError
    from adapterlab.io.atomic import write_text
    from adapterlab.yaml_text import written

    write = write and user_path(write)
    if write is not None and write.exists():
        raise OutputError(f"{write} exists already, and nothing is overwritten. Choose another file.")
    rows = _data(data, more or [])
    found = ask(model, rows, memory=_bytes(memory), folder=user_path(past), trust_remote_code=trust_remote_code)
    if as_json:
        print_json({**dataclasses.asdict(found), "plan": found.plan and found.plan.to_json(), "config": found.config()})
        return
    _show(found)
    text = written(found.config())
    if write is not None:
        write_text(write, text)
        say(f"Written to {write}. Train with: adapterlab train {write}")
    else:
        say(f"\nAs a configuration (keep it with --write FILE):\n\n{text}")


def _data(name: str, more: list[str]) -> Any:
    from pydantic import ValidationError

    from adapterlab.data import DataConfig
    from adapterlab.errors import ConfigError
    from adapterlab.settings import explain

    source = "path" if user_path(name).exists() or any(mark in name for mark in "/.") else "task"
    try:
        return DataConfig(**{source: name, **settings(more, "--data")})
    except ValidationError as error:
        raise ConfigError(explain(error, DataConfig)) from None


def _bytes(text: str | None) -> int | None:
    import re

    from adapterlab.errors import ConfigError

    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])?i?B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()) if match else 0
    if size < 2**20:
        raise ConfigError(f"--memory {text} is no size that could hold a model. Write it like 24GB or 800MB.")
    return round(size)


def _show(found: Advice) -> None:
    from rich.table import Table

    from adapterlab.terminal import Terminal

    facts, console = found.facts, Terminal(highlight=False)
    about = "about " if facts.estimated else ""
    console.print(
        f"{facts.rows:,} rows of {about}{facts.length} tokens on average, {facts.longest} at most; "
        f"{found.model} has {facts.parameters / 1e6:,.0f}M parameters."
    )
    table = Table("setting", "value", "why", "source")
    for column in table.columns:
        column.overflow = "fold"
    for rule in found.rules:
        why = "\n".join([rule.why, *(f"tested: {said}" for said in rule.tested)])
        table.add_row(rule.key, str(rule.value), why, rule.source)
    console.print(table)
    for sentence in [*found.tested, *found.past]:
        console.print(sentence, soft_wrap=True)
