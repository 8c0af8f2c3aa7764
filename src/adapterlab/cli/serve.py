"""`adapterlab serve`."""

from __future__ import annotations

import contextlib
import os
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import Device, Precision, Trust, bars, help_config, say
from adapterlab.errors import ConfigError
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from pathlib import Path

    from adapterlab.evaluate.opening import Place
    from adapterlab.serve.http.limits import ServerSettings
    from adapterlab.serve.http.service import Service

_SHOWN = 8


class EngineKind(StrEnum):
    """What computes."""

    OWN = "own"
    VLLM = "vllm"


def serve(
    model: Annotated[str, typer.Argument(help="The base: a catalogue alias, local folder or hub id.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as engine.memory_gb=4 limits.seconds=60.", show_default=False),
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folder of adapters; each is served under its path in it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the base in requests; default: MODEL, or its folder's name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    keys: Annotated[str | None, typer.Option(help="File of keys, as adapterlab keys writes it.")] = None,
    announce: Annotated[
        str | None, typer.Option(help="File, or address for POST, to say what is held here and how busy it is.")
    ] = None,
    announce_as: Annotated[
        str | None, typer.Option(help="Address of this server for others; default: http://HOST:PORT.")
    ] = None,
    engine: Annotated[EngineKind, typer.Option(help="own, or vllm where it is installed.")] = EngineKind.OWN,
    device: Device = None,
    precision: Precision = None,
    trust_remote_code: Trust = False,
    help_config: Annotated[bool, help_config("adapterlab.serve.http.limits", "ServerSettings")] = False,
) -> None:
    """Serve a base model and all adapters of a folder over OpenAI's HTTP API."""
    # Read when torch is imported: weights and factors, which every step reads from end to end, come to lie in pages of
    # 2 MiB. Training, which takes and gives back memory in every step, is slower with them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from adapterlab.evaluate.opening import locate
    from adapterlab.serve.http.limits import ServerSettings
    from adapterlab.serve.http.shelf import Shelf
    from adapterlab.yaml_text import overrides

    settings = ServerSettings(**overrides(options or [], "engine.memory_gb=4"))
    place = locate(model, trust_remote_code=trust_remote_code)
    if place.kind != "model":
        raise ConfigError(
            f"{model} is {place.kind} and no base model. Serve its base, {place.base}, and name the folder that "
            "holds adapters with --adapters."
        )
    called = name or _name_of(place)
    shelf = Shelf(user_path(adapters) if adapters is not None else None, settings.limits)
    if engine is EngineKind.VLLM:
        _start_vllm(place, shelf, host, port, called, bool(options or keys or announce or device or precision))
        return
    if announce_as is not None and announce is None:
        raise ConfigError("--announce-as is the address that --announce says; give that too, or leave it out.")
    from adapterlab.serve.http.server import check_address, check_packages, listener, place_of

    check_packages()
    check_address(host, keys=keys is not None)
    target = place_of(announce) if announce is not None else None
    with contextlib.closing(listener(host, port)) as listening:
        made = _service(place, shelf, settings, called, keys, device, precision)
        _serve(made, listening, host, target, announce_as)


def _service(
    place: Place, shelf: Any, settings: ServerSettings, name: str,
    keys: str | None, device: str | None, precision: str | None,
) -> Service:  # fmt: skip
    import logging

    from adapterlab.evaluate.generation import stop_ids, window_of
    from adapterlab.evaluate.opening import open_target
    from adapterlab.foreign.model import vocabulary
    from adapterlab.serve import Engine
    from adapterlab.serve.http.grammar import Grammars
    from adapterlab.serve.http.keys import Keys
    from adapterlab.serve.http.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    known = Keys(user_path(keys)) if keys is not None else None
    say(f"Loading {place.base} ...")
    opened = open_target(place, device=device, precision=precision)
    model, tokenizer = opened.model, opened.tokenizer
    window = settings.engine.max_length or window_of(model, tokenizer)
    return Service(
        lambda: Engine(model, tokenizer, settings.engine), tokenizer, base=name, shelf=shelf, window=window,
        grammars=Grammars(tokenizer, vocabulary(model)[1] or len(tokenizer), stop_ids(model, tokenizer)), keys=known,
        limits=settings.limits,
    )  # fmt: skip


def _serve(
    service: Service, listening: socket.socket, host: str, target: str | Path | None, announce_as: str | None
) -> None:
    from adapterlab.serve.http.announcing import Announcer, address
    from adapterlab.serve.http.server import run

    _register(service)
    url = address(host, listening.getsockname()[1])
    announcer = Announcer(target, announce_as or url, service) if target is not None else None
    say(f"Serving {service.base} on {url}/v1; Ctrl-C ends it.")
    run(service, listening, announcer)


def _register(service: Service) -> None:
    with bars() as update:
        bad = service.register_found(lambda done: update("adapters", done, done))
    for line in bad[:_SHOWN]:
        say(f"not served: {line}", err=True, fg="yellow")
    if len(bad) > _SHOWN:
        say(f"... and {len(bad) - _SHOWN} more that cannot be served", err=True, fg="yellow")
    engine = service.engine
    say(f"Adapters: {len(engine.adapters(every=True)):,}, computed by: {engine.products}.")
    if copies := engine.statistics().bytes_reordered:
        say(f"{copies / 1e9:.2g} GB hold weights again, in the order that the processor reads (engine.reordered_gb).")


def _name_of(place: Place) -> str:
    """The alias or hub id as it was given; of a folder its name."""
    folder = user_path(place.base)
    return folder.resolve().name if folder.is_dir() else place.base


def _start_vllm(place: Place, shelf: Any, host: str, port: int, name: str, more: bool) -> None:
    import subprocess

    from adapterlab.serve.vllm import plan

    if more:
        raise ConfigError(
            "--keys, --announce, --device, --precision and settings are those of adapterlab's own engine. Leave them "
            "out, or start vllm yourself with its own options."
        )
    found = [(at.name, at.folder) for at in shelf.found() if at.tenant is None]
    made = plan(place.base, found, host=host, port=port, name=name)
    for adapter, why in made.refused.items():
        say(f"not served: {adapter}: {why}", err=True, fg="yellow")
    say(f"Starting vLLM with {len(made.served)} adapters.")
    raise typer.Exit(subprocess.run(made.command, check=False).returncode)
