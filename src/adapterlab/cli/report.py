"""`adapterlab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterlab.cli._shared import AsJson, print_json, say


def report(
    folders: Annotated[list[Path], typer.Argument(help="One or more folders of `adapterlab compare`.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report; with one comparison, its own by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a comparison again, or lay several side by side.

    Everything comes from what is recorded in the folders; nothing is run. Comparisons that were judged on the same
    rows are ranked together, others each on its own.
    """
    from adapterlab.compare.report import PICTURE, rebuild

    written = rebuild(folders, output)
    if as_json:
        print_json({"files": [str(file) for file in written]})
        return
    for file in written:
        say(file)
    if PICTURE not in {file.name for file in written}:
        say(f"{PICTURE} is left out: it needs matplotlib (pip install 'adapterlab[reports]').", err=True)
