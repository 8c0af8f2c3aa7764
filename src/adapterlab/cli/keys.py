"""`adapterlab keys`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Annotated

import typer

from adapterlab.cli._shared import AsJson, print_json, say
from adapterlab.errors import ConfigError
from adapterlab.paths import user_path


class KeyAction(StrEnum):
    """What is done with keys."""

    ADD = "add"
    REMOVE = "remove"
    LIST = "list"


def keys(
    action: Annotated[KeyAction, typer.Argument(help="add, remove or list.")],
    name: Annotated[str | None, typer.Argument(help="Of the key.", show_default=False)] = None,
    file: Annotated[str, typer.Option(help="The file of keys; it holds hashes alone.")] = "keys.json",
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may ask for: infer, admin; may be repeated. Default: infer.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Sees, beside everybody's adapters, those of this tenant, and loads for it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make keys for adapterlab serve, and take them back; a running server notices at once."""
    from adapterlab.serve.http import keys as all_keys

    path = user_path(file)
    if action is KeyAction.LIST:
        found = [key.caller for key in all_keys.read(path)]
        if as_json:
            print_json([dataclasses.asdict(caller) for caller in found])
            return
        for caller in found:
            say(f"{caller.name}: {', '.join(caller.scopes)}" + (f"; tenant {caller.tenant}" if caller.tenant else ""))
        return
    if name is None:
        raise ConfigError(f"adapterlab keys {action} needs the name of a key: adapterlab keys {action} NAME.")
    if action is KeyAction.REMOVE:
        all_keys.remove(path, name)
        say(f"The key {name} is no longer valid.")
        return
    say(all_keys.add(path, name, scope or ["infer"], tenant))
    say("This is the only time it is shown: the file holds its hash.", err=True)
