"""`adapterlab adapters`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import ApiKey, AsJson, print_json, say
from adapterlab.errors import ConfigError

if TYPE_CHECKING:
    from adapterlab.serve.client import Client


class AdapterAction(StrEnum):
    """What is done with the adapters of a server."""

    LIST = "list"
    LOAD = "load"
    UNLOAD = "unload"
    WARM = "warm"
    PIN = "pin"
    UNPIN = "unpin"


def adapters(
    action: Annotated[AdapterAction, typer.Argument(help="list, load, unload, warm, pin or unpin.")],
    name: Annotated[str | None, typer.Argument(help="Of the adapter.", show_default=False)] = None,
    path: Annotated[
        str | None, typer.Option(help="For load: where it lies in the server's folder; default: its name.")
    ] = None,
    server: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List, load, unload and pin the adapters of a running server."""
    from adapterlab.serve.client import Client

    client = Client(server, key)
    if action is AdapterAction.LIST:
        found = client.adapters()
        print_json(found) if as_json else _show(found)
        return
    if name is None:
        raise ConfigError(f"adapterlab adapters {action} needs the name of an adapter; adapters list shows them.")
    if path is not None and action is not AdapterAction.LOAD:
        raise ConfigError(f"--path is for load; {action} takes the name alone.")
    done = _do(client, action, name, path)
    print_json(done) if as_json else say(f"{name}: {done['state']}{', pinned' if done.get('pinned') else ''}")


def _do(client: Client, action: AdapterAction, name: str, path: str | None) -> dict[str, Any]:
    if action is AdapterAction.UNLOAD:
        client.delete(name)
        return {"id": name, "state": "unloaded"}
    wishes: dict[AdapterAction, dict[str, Any]] = {
        AdapterAction.LOAD: {"path": path or name},
        AdapterAction.WARM: {"warm": True},
        AdapterAction.PIN: {"pinned": True},
        AdapterAction.UNPIN: {"pinned": False},
    }
    return client.put(name, **wishes[action])


def _show(found: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    from adapterlab.terminal import Terminal

    table = Table("adapter", "method", "form", "state", Column("MiB", justify="right"), Column("runs", justify="right"))
    for one in found:
        state = one["state"] + (", pinned" if one["pinned"] else "") + (f": {one['reason']}" if one["reason"] else "")
        table.add_row(
            one["id"], one["method"], one["form"] or "", state, f"{one['bytes'] / 2**20:.1f}", str(one["running"])
        )
    Terminal().print(table)
