"""Run the application until it is asked to end."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapterlab.errors import ConfigError, ServingError, require
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from adapterlab.serve.http.announcing import Announcer
    from adapterlab.serve.http.service import Service


def check_packages() -> None:
    """Require what the extra `serve` brings, before anything is loaded.

    Raises:
        MissingDependencyError: a package is missing.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "to serve over HTTP")


def check_address(host: str, *, keys: bool) -> None:
    """Refuse to let others in without keys.

    Args:
        host: to listen on.
        keys: whether there are any.

    Raises:
        ConfigError: the address is not this machine's own, and there are none.
    """
    from adapterlab.serve.http.access import is_local

    if not keys and not is_local(host):
        raise ConfigError(
            f"--host {host} lets others in, and there are no keys. Make one with adapterlab keys add NAME, and start "
            "with --keys keys.json."
        )


def listener(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded; nobody is let in yet.

    Raises:
        ConfigError: another program has it, or it is none of this machine.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Another program listens on {host}:{port}. End it, or choose another port with --port; 0 takes any "
                "that is free."
            ) from None
        raise ConfigError(f"This machine cannot listen on {host}:{port}: {error.strerror}. Mend --host.") from None
    return made


def place_of(announce: str) -> str | Path:
    """Where a server is announced: an address, or a file.

    Raises:
        ConfigError: there is no such folder, or the place is one.
    """
    if urlsplit(announce).scheme in ("http", "https"):
        return announce
    file = user_path(announce).absolute()
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(
            f"--announce {announce} is no place for a file. Name a file in a folder that is there, one for each "
            "server, or an address: http://..."
        )
    return file


def run(service: Service, listening: socket.socket, announcer: Announcer | None = None) -> None:
    """Serve until SIGTERM or SIGINT; what runs then is finished, as long as the limits allow.

    Args:
        service: to serve.
        listening: made by `listener`.
        announcer: of this server.

    Raises:
        ServingError: the engine failed again and again.
    """
    import uvicorn

    from adapterlab.serve.http.app import build

    failures: list[BaseException] = []

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.draining = True
            if announcer is not None:
                await asyncio.to_thread(announcer.leave)
            await super().shutdown(sockets)

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    config = uvicorn.Config(
        build(service, failed, announcer), log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(service.limits.drain_seconds) + 1,
    )  # fmt: skip
    server = Server(config)
    server.run(sockets=[listening])
    if failures:
        raise ServingError(str(failures[0]))
