"""Send requests to several servers so that each adapter has a home among them. Needs nothing but Python.

    adapterlab serve MODEL --adapters runs/ --port 8001 --announce live/one.json
    adapterlab serve MODEL --adapters runs/ --port 8002 --announce live/two.json
    python examples/router.py live/ --port 8000

An adapter has an order of servers, by their hashes with it (rendezvous hashing), so that a server that comes or goes
moves its own share of the adapters and no other. The next one answers where the first is crowded, ends or is gone. The
base goes to whoever has least to do; changes of adapters go to all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

LARGEST = 1 << 24  # bytes of a body
CROWDED = 8  # answers more than twice the mean: then another server is better, although it has to load the adapter
CHANGES = ("/v1/adapters/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def live(folder: Path) -> list[dict]:
    """The servers that announce that they answer."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it has just ended
            continue
        if said.get("ready") and said.get("until", 0) > time.time():
            found.append(said)
    return found


def ordered(servers: list[dict], adapter: str) -> list[dict]:
    """The servers for an adapter, the best first; "" or its name is the base."""
    busy = {one["url"]: one["load"]["running"] + one["load"]["waiting"] for one in servers}
    most = 2 * sum(busy.values()) / max(1, len(servers)) + CROWDED
    if not servers or adapter in ("", servers[0]["base"]):
        return sorted(servers, key=lambda one: busy[one["url"]])

    def rank(one: dict) -> tuple:
        return busy[one["url"]] > most, hashlib.sha256(f"{one['url']} {adapter}".encode()).digest()

    return sorted(servers, key=rank)


def named(body: bytes) -> str:
    """The adapter that a request asks for."""
    try:
        asked = json.loads(body)
        return str(asked.get("adapter_id") or asked.get("parameters", {}).get("adapter_id") or asked.get("model") or "")
    except (ValueError, AttributeError):
        return ""  # a server says what is wrong with it


class Router(BaseHTTPRequestHandler):
    """Passes requests on."""

    folder = Path()

    def route(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if size > LARGEST:
            return self.send_error(413)
        body = self.rfile.read(size)
        servers = ordered(live(self.folder), named(body))
        changes = self.command != "GET" and self.path.startswith(CHANGES)
        with contextlib.ExitStack() as links:
            answer = None
            for server in servers:
                try:
                    found = self.ask(server["url"], body, links)
                except OSError:
                    continue  # it is gone, and its announcement not yet
                if answer is None or answer.status == 503 or (changes and found.status > answer.status):
                    answer = found
                if not changes and answer.status != 503:
                    break
            if answer is None:
                return self.send_error(503, "no server answers")
            self.pass_on(answer)

    do_GET = do_POST = do_PUT = do_DELETE = route

    def ask(self, url: str, body: bytes, links: contextlib.ExitStack) -> http.client.HTTPResponse:
        link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        links.callback(link.close)
        kept = ("Host", "Content-Type", "Authorization")  # the host too: a server looks at whom it was meant for
        link.request(self.command, self.path, body, {name: self.headers[name] for name in kept if name in self.headers})
        return link.getresponse()

    def pass_on(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name in ("Content-Type", "Retry-After", "X-Without-Effect"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        while piece := answer.read1(1 << 16):
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        """Write no log."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the announcements")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    Router.folder = options.folder
    ThreadingHTTPServer(("127.0.0.1", options.port), Router).serve_forever()


if __name__ == "__main__":
    main()
