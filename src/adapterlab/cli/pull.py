"""`adapterlab pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterlab.cli._shared import say


def pull(
    name: Annotated[str, typer.Argument(help="An alias (see `adapterlab models`), a hub id or a local folder.")],
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even when it is there.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash all files; fetch it again if one differs.")] = False,
) -> None:
    """Download a base model, once, and say where it lies."""
    from adapterlab.models import pull as fetch

    where = fetch(name, force=force, verify=verify)
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    say(f"{where}  ({size / 1e6:,.1f} MB)")
