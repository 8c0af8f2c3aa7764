"""A server of several says where it is, what it holds and how busy it is, for a router that sends requests to them.

An announcement is a JSON object in a file of its own, or sent by POST. It holds until a time that is in it, so that a
server that vanished is forgotten, and is taken back when a server ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from adapterlab.io.atomic import write_json
from adapterlab.serve.http.service import Service
from adapterlab.serve.http.shelf import labelled

log = logging.getLogger("adapterlab.serve")
FORMAT = 1
_EVERY = 2.0  # seconds
_HOLDS = 3 * _EVERY  # one that is late, or lost, is not the end
_TIMEOUT = 5.0


def address(host: str, port: int) -> str:
    """Where others reach a server that listens on an address: by the name of this machine if it is on all of them."""
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(host)
        if found.is_unspecified:
            host = socket.gethostname()
        elif found.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"


class Announcer:
    """Announces a server, again and again.

    Attributes:
        url: of the server, as others reach it.
    """

    def __init__(self, target: str | Path, url: str, service: Service):
        """Prepare.

        Args:
            target: a file, or the address that announcements are sent to.
            url: of the server.
            service: what is announced.
        """
        self.target, self.url, self.service = target, url, service
        self._lock = threading.Lock()
        self._failed = ""

    def message(self) -> dict[str, Any]:
        """What is announced."""
        service = self.service
        states = service.engine.adapters(every=True) if service.alive else []
        counts = service.engine.statistics() if service.alive else None
        return {
            "format": FORMAT,
            "url": self.url,
            "base": service.base,
            "ready": service.alive and not service.draining,
            "until": time.time() + _HOLDS,
            "adapters": len(states),
            "loaded": [labelled(state.name, state.tenant) for state in states if state.state == "loaded"],
            "load": counts and {
                "running": counts.running, "waiting": counts.waiting, "pages": counts.pages,
                "pages_used": counts.pages_used,
            },
        }  # fmt: skip

    def tell(self) -> None:
        """Announce once; what goes wrong is logged, and tried again the next time."""
        with self._lock:
            try:
                self._write()
                self._failed = ""
            except Exception as error:  # of a disk, a network, an engine that fails just now: the server goes on
                if str(error) != self._failed:
                    log.warning("this server could not be announced: %s", error)
                self._failed = str(error)

    def _write(self) -> None:
        if not isinstance(self.target, Path):
            _send(self.target, self.message())
        elif self.service.draining:
            self.target.unlink(missing_ok=True)
        else:
            write_json(self.target, self.message())

    def leave(self) -> None:
        """Take the announcement back: nothing is sent here any more."""
        self.service.draining = True
        self.tell()

    async def run(self) -> None:
        """Announce until the server ends."""
        while not self.service.draining:
            await asyncio.to_thread(self.tell)
            await asyncio.sleep(_EVERY)


def _send(url: str, message: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(message).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        response.read(1)
