"""Ranks that learn at once when another one ends before its time, say so, and end too.

Each rank holds a connection to the first one. The system closes it when a process ends, however that happens: nothing
has to beat, and a rank that computes for long, or stands in a debugger, is not taken for a dead one. A machine that is
gone is found by the probes of TCP.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adapterlab.errors import AdapterlabError, RankError
from adapterlab.terminal import shown
from adapterlab.train.rank_log import hidden, hide, say
from adapterlab.train.ranks import launched, log_of
from adapterlab.train.signals import Interrupted

STATUS = 2  # of a process that ends because of another one, as of every error on the command line
_GRACE = 5.0  # seconds for the main thread to leave by itself: a collective may wait for the dead rank for ever
_HINT = 3.0  # seconds in which it becomes known that an error is the echo of another rank's end
_REACH = 30.0  # seconds for all connections
_LINE = 1 << 16  # bytes of a message at most
_PIECES = 8  # in which a first message may arrive
_TAIL = 6  # last lines of a log or of a traceback
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that is gone: some 25 seconds


class _Peer:
    """The other end of a connection."""

    def __init__(self, end: socket.socket, number: int = 0, place: str = ""):
        self.end, self.number, self.place = end, number, place
        self._rest = b""
        end.settimeout(_GRACE)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send a message, if there is still somebody."""
        with contextlib.suppress(OSError):
            self.end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that arrived; None: the other process is gone."""
        try:
            data = self.end.recv(_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            found = [dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError):
            return None
        return found if data and len(self._rest) < _LINE else None

    def first(self) -> dict[str, Any]:
        """Return the first message; an empty one if none comes."""
        for _ in range(_PIECES):
            if (found := self.receive()) is None:
                break
            if found:
                return found[0]
        return {}


class Watch:
    """What a rank knows of the others.

    Attributes:
        failure: what ended another rank, once it is known.
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.rank, self.world, self.folder = accelerator.process_index, accelerator.num_processes, folder
        self.failure: RankError | None = None
        self._told: BaseException | None = None
        self._peers: dict[int, _Peer] = {}
        self._known, self._left = threading.Event(), threading.Event()
        self._since, self._parent = time.time(), os.getppid()
        if self.world > 1:
            self._connect()
            threading.Thread(target=self._listen, daemon=True).start()

    # ------------------------------------------------------------------ connections

    def _connect(self) -> None:
        """Give each rank a connection to the first one; whoever cannot be reached is not watched, which is said."""
        near = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        server = _server(near) if self.rank == 0 else None
        said = [[server.getsockname()[1], secrets.token_hex(16), _place()] if server is not None else None]
        broadcast_object_list(said)
        port, token, place = said[0] or [0, "", ""]
        if server is not None:
            with server:
                self._accept(server, token)
            return
        address = "127.0.0.1" if near else os.environ.get("MASTER_ADDR", "127.0.0.1")
        with contextlib.suppress(OSError):
            peer = _Peer(socket.create_connection((address, port), timeout=_REACH), 0, place)
            peer.send(token=token, rank=self.rank, place=_place())
            if peer.first():
                self._peers[0] = peer
                hide()

    def _accept(self, server: socket.socket, token: str) -> None:
        end = time.monotonic() + _REACH
        while len(self._peers) < self.world - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, TypeError):
                peer = _Peer(server.accept()[0])
                hello = peer.first()
                number = int(hello.get("rank") or 0)
                if not hmac.compare_digest(str(hello.get("token")), token) or not 0 < number < self.world:
                    continue  # not one of ours
                peer.number, peer.place = number, str(hello.get("place"))
                peer.send(welcome=True)
                self._peers[number] = peer
        if missing := sorted({*range(1, self.world)} - {*self._peers}):
            say(f"Ranks {missing} cannot be watched: if one of them dies, its backend's timeout alone ends the others.")

    # ------------------------------------------------------------------ hearing

    def _listen(self) -> None:
        with selectors.DefaultSelector() as ends:
            for peer in self._peers.values():
                ends.register(peer.end, selectors.EVENT_READ, peer)
            while not self._left.is_set():
                for key, _ in ends.select(timeout=0.5):
                    if not self._hear(key.data):
                        ends.unregister(key.fileobj)
                if os.getppid() != self._parent and launched() > 1:
                    self._parent = os.getppid()
                    os.kill(os.getpid(), signal.SIGTERM)  # the launcher is gone: save, and end
        for peer in self._peers.values():
            peer.end.close()

    def _hear(self, peer: _Peer) -> bool:
        """Act on what a peer said; say whether more can come from it."""
        messages = peer.receive()
        for message in messages or ():
            if message.get("done"):
                return False
            self._learn(int(message.get("rank", peer.number)), str(message.get("why")), message.get("text"))
        if messages is None and not self._left.is_set():
            self._learn(peer.number, None)
        return messages is not None

    def _learn(self, number: int, why: str | None, text: str | None = None) -> None:
        """Another rank ended: tell the rest, and leave."""
        if self.failure is not None:
            return
        place = self._peers[number].place if number in self._peers else ""
        text = text or self._composed(number, place, why)
        self._pass_on(number, text)
        self.failure = RankError(text, number)
        self._known.set()
        threading.Thread(target=self._leave, daemon=True).start()

    def _pass_on(self, number: int, text: str) -> None:
        if self.rank == 0:
            for peer in self._peers.values():
                if peer.number != number:
                    peer.send(rank=number, text=text)

    def _leave(self) -> None:
        if not self._left.wait(_GRACE):
            if self.rank == 0 or self._speaks_for_first():
                say(f"error: {shown(str(self.failure))}")
            os._exit(STATUS)

    # ------------------------------------------------------------------ saying

    def _speaks_for_first(self) -> bool:
        return self.rank == 1 and self.failure is not None and self.failure.rank == 0

    def _composed(self, number: int, place: str, why: str | None) -> str:
        if why is None:
            why = "ended without a word: it was killed, as the system does when memory runs out, or it crashed"
            file = self.folder / log_of(number)
            lines = _last_lines(file, self._since)
            why += f". The last lines of {file}:\n{lines}" if lines else "."
        else:
            why = f"failed: {why}"
        return (
            f"Rank {number} of {self.world} ({place}) {why}\nThe other processes of the run end with it. What was "
            "saved before is kept; continue from it with --resume."
        )

    def explained(self, error: BaseException) -> BaseException:
        """Return what ended this rank: the end of another one, or its own error, which the others are told.

        Args:
            error: what was raised; an error of a collective may be the echo of another rank's end.
        """
        if self.world == 1 or error is self._told or isinstance(error, (Interrupted, RankError)):
            return error
        echo = isinstance(error, Exception) and not isinstance(error, AdapterlabError)
        if echo and self._known.wait(_HINT) and self.failure is not None:
            self._left.set()
            if self._speaks_for_first() and hidden():
                say(f"error: {shown(str(self.failure))}")
            return self.failure
        self._told = error
        why = _reason(error)
        self._pass_on(self.rank, self._composed(self.rank, _place(), why))
        if self.rank > 0 and 0 in self._peers:
            self._peers[0].send(why=why)
        self._left.set()
        return error

    def close(self) -> None:
        """End the watch: this rank is about to end as it should."""
        for peer in self._peers.values():
            peer.send(done=True)
        self._left.set()


@contextlib.contextmanager
def watched(accelerator: Accelerator, folder: Path) -> Iterator[Watch]:
    """Watch the other ranks while the context lasts. Enter it on every rank.

    Args:
        accelerator: of the run.
        folder: of the run, for the logs of ranks.

    Raises:
        RankError: another rank ended before its time.
    """
    watch = Watch(accelerator, folder)
    try:
        yield watch
    except Interrupted:
        watch.close()
        raise
    except BaseException as error:
        found = watch.explained(error)
        if found is error:
            raise
        raise found from error
    watch.close()


def _server(near: bool) -> socket.socket:
    if near:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _place() -> str:
    return f"on {socket.gethostname()}, process {os.getpid()}"


def _reason(error: BaseException) -> str:
    """The message of an error; of others' errors the end of the traceback too."""
    if isinstance(error, AdapterlabError):
        return str(error)
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return f"{type(error).__name__}: {error}"[: _LINE // 8] + "\n" + _indented(lines)


def _last_lines(file: Path, since: float) -> str:
    """The end of a log, if somebody wrote into it since then."""
    try:
        if file.stat().st_mtime < since:
            return ""
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            return _indented(stream.read().decode(errors="replace").splitlines())
    except OSError:
        return ""


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line[:300]}" for line in lines[-_TAIL:])
