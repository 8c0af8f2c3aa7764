"""`adapterlab models`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapterlab.cli._shared import say


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the base models that have a short name, and which of them are on disk."""
    from adapterlab.models import catalogue

    rows = []
    for entry in catalogue().values():
        where = entry.where()
        rows.append(
            {
                "alias": entry.alias,
                "description": entry.description,
                "parameters": entry.parameters,
                "licence": entry.licence,
                "bytes": entry.size,
                "sha256": entry.sha256,
                "folder": str(where) if where else None,
            }
        )
    if as_json:
        import json

        say(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from pathlib import Path

    from rich.padding import Padding
    from rich.text import Text

    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    for row in rows:
        where = row["folder"].replace(str(Path.home()), "~") if row["folder"] else None
        size = f"{row['parameters'] / 1e6:,.0f} M parameters, {row['bytes'] / 1e6:,.0f} MB"
        console.print(Text.assemble((row["alias"], "bold"), f"  {size}, {row['licence']}"))
        console.print(Padding(row["description"], (0, 0, 0, 4)))
        place = Text(where, style="green") if where else Text("not on disk", style="dim")
        console.print(Padding(place, (0, 0, 0, 4)))
    console.print("Fetch one with: adapterlab pull ALIAS", highlight=False)
