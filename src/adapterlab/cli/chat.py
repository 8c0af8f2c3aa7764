"""`adapterlab chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from adapterlab.cli._shared import (
    ApiKey,
    BaseModel,
    Checkpoint,
    Device,
    Precision,
    Seed,
    System,
    Target,
    Temperature,
    Trust,
    say,
)
from adapterlab.errors import AdapterlabError, ConfigError, nearest

if TYPE_CHECKING:
    from adapterlab.evaluate.conversation import Conversation
    from adapterlab.evaluate.opening import Opened, Place
    from adapterlab.hosts import Host
    from adapterlab.serve.client import RemoteConversation


def chat(
    target: Target,
    more: Annotated[
        list[str] | None, typer.Argument(help="More runs or adapters for the same base.", show_default=False)
    ] = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    precision: Precision = None,
    trust_remote_code: Trust = False,
    server: Annotated[
        str | None, typer.Option(help="Address of a server; TARGET is then the base or an adapter there.")
    ] = None,
    key: ApiKey = None,
) -> None:
    """Talk with a model and switch its adapters meanwhile; /help lists the commands."""
    if server is not None:
        from adapterlab.serve.client import Client, RemoteConversation

        if more or model or device or precision or trust_remote_code:
            raise ConfigError("With --server, TARGET is a model or adapter there, and the server has chosen the rest.")
        far = RemoteConversation(Client(server, key), target, system, max_new_tokens, temperature, seed)
        Prompt(far, far).run()
        return
    from adapterlab.evaluate.conversation import Conversation
    from adapterlab.evaluate.opening import locate

    places = [
        locate(name, model=model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
        for name in [target, *(more or [])]
    ]
    opened = _open(places, device, precision)
    system = system if system is not None else next((p.system for p in places if p.system), None)
    talk = Conversation(opened.model, opened.tokenizer, system, max_new_tokens, temperature, seed)
    Prompt(talk, opened.host).run()


def _open(places: list[Place], device: str | None, precision: str | None) -> Opened:
    """Load the base and all adapters; the first one named is live."""
    import dataclasses

    from adapterlab.evaluate.opening import open_target
    from adapterlab.hosts import load

    bases = {place.base for place in places}
    if len({place.base_model for place in places}) > 1:
        raise ConfigError(
            f"All adapters of a chat share one base model, and these were made for {' and '.join(sorted(bases))}. If "
            "they are the same under other names, say so: --model NAME."
        )
    for place in places[1:]:
        if place.adapter is None:
            raise ConfigError(f"{place.base} is a base model; after the first name give runs or adapters only.")
    opened = open_target(places[0], device=device, precision=precision)
    host = opened.host
    for place in places[1:]:
        name = _free(place.label, host)
        host = load(opened.model, str(place.adapter), name, active=host is None)
    return dataclasses.replace(opened, host=host)


def _free(name: str, host: Host | None) -> str:
    taken = host.methods if host else {}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


class Prompt:
    """Reads lines, answers them, and obeys commands."""

    def __init__(self, talk: Conversation | RemoteConversation, host: Host | RemoteConversation | None):
        self.talk, self.host, self.going = talk, host, True
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "adapter": ("NAME  switch to this adapter", self.adapter),
            "base": ("turn all adapters off", self.base),
            "adapters": ("list the adapters", self.adapters),
            "reset": ("forget the conversation", self.reset),
            "system": ("TEXT  set the system message and forget the conversation; without TEXT, none", self.system),
            "help": ("list the commands", self.help),
            "quit": ("leave", self.quit),
        }

    def run(self) -> None:
        """Talk until the user leaves."""
        self.adapters("")
        say("Type a message, or /help.")
        for line in self.lines():
            try:
                self.obey(line[1:]) if line.startswith("/") else self.answer(line)
            except AdapterlabError as error:
                say(str(error), fg="red")
            if not self.going:
                break
        say("Bye.")

    def lines(self) -> Iterator[str]:
        """Yield what the user types; the end of input and Ctrl-C end it."""
        if sys.stdin is None or sys.stdin.closed:
            return
        asking = "you> " if sys.stdin.isatty() else ""
        if asking:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (importing it gives `input` editing and a history)
        while True:
            try:
                line = input(asking).strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line:
                yield line

    def answer(self, text: str) -> None:
        """Stream an answer; Ctrl-C stops it, not the chat."""
        try:
            self.talk.say(text, lambda piece: say(piece, nl=False))
        except KeyboardInterrupt:
            say(" [stopped]", nl=False)
        say()

    def obey(self, line: str) -> None:
        """Run a command."""
        word, _, rest = line.partition(" ")
        if word not in self.commands:
            raise ConfigError(f"There is no command /{word}. {nearest(word, self.commands)} /help lists them.")
        self.commands[word][1](rest.strip())

    def adapter(self, names: str) -> None:
        if self.host is None or not names:
            there = ", ".join(self.host.methods) if self.host else "none; name a run or an adapter when you start"
            raise ConfigError(f"/adapter needs the name of an adapter. Attached: {there}.")
        self.host.activate(*names.split())
        self.adapters("")

    def base(self, _: str) -> None:
        if self.host is not None:
            self.host.activate()
        self.adapters("")

    def adapters(self, _: str) -> None:
        live = self.host.active if self.host else ()
        named = [f"{n} (live)" if n in live else n for n in (self.host.methods if self.host else ())]
        say(f"Adapters: {', '.join(named) or 'none'}" + ("" if live else "; the base model answers") + ".")

    def reset(self, _: str) -> None:
        self.talk.reset()
        say("The conversation starts anew.")

    def system(self, text: str) -> None:
        self.talk.system = text or None
        self.reset("")

    def help(self, _: str) -> None:
        for name, (what, _command) in self.commands.items():
            say(f"  /{name} {what}")

    def quit(self, _: str) -> None:
        self.going = False
