"""Who may ask for what: keys, of which the server knows hashes alone."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adapterlab.errors import ConfigError, FormatError, nearest
from adapterlab.io.atomic import write_json
from adapterlab.io.files import read_json

Scope = Literal["infer", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key; "" where the server has none.
        scopes: what may be asked for.
        tenant: whose adapters are seen besides everybody's; None: nobody's.
    """

    name: str = ""
    scopes: tuple[Scope, ...] = SCOPES
    tenant: str | None = None


@dataclass(frozen=True)
class Key:
    """An entry of the file of keys.

    Attributes:
        caller: who holds it.
        sha256: of the key's text. Keys are 256 random bits, so a slow hash would add nothing.
    """

    caller: Caller
    sha256: str


class Keys:
    """The keys in a file, which is read again when it changes: a key that is taken out is refused from then on."""

    def __init__(self, file: Path):
        self.file = file
        self._seen: tuple[int, int] | None = None
        self._keys: list[Key] = []
        self._read()

    def holder(self, text: str) -> Caller | None:
        """Return whose key a text is, or None. The time it takes does not depend on how much of it is right.

        Raises:
            FormatError: the file is damaged or gone; then no key is valid.
        """
        self._read()
        hashed = _hash(text)
        found = [key.caller for key in self._keys if hmac.compare_digest(key.sha256, hashed)]
        return found[0] if found else None

    def _read(self) -> None:
        try:
            stat = self.file.stat()
        except OSError as error:
            raise FormatError(
                f"The file of keys {self.file} cannot be read: {error.strerror}. Make one: adapterlab keys add NAME."
            ) from None
        seen = (stat.st_mtime_ns, stat.st_ino)
        if seen != self._seen:
            self._keys, self._seen = read(self.file), seen


def read(file: Path) -> list[Key]:
    """Read a file of keys.

    Raises:
        FormatError: it is damaged.
    """
    found = read_json(file)
    if found.get("format") != FORMAT or not isinstance(found.get("keys"), list):
        raise FormatError(f"{file} is no file of keys of format {FORMAT}. Make one: adapterlab keys add NAME.")
    return [_entry(file, entry) for entry in found["keys"]]


def add(file: Path, name: str, scopes: list[str], tenant: str | None = None) -> str:
    """Make a key, write its hash to a file, and return its text, which is kept nowhere.

    Raises:
        ConfigError: the name is taken or malformed, or there is no such scope.
        OutputError: the file cannot be written.
    """
    keys = read(file) if file.exists() else []
    for word in (name, *([tenant] if tenant is not None else [])):
        if not _NAME.fullmatch(word):
            raise ConfigError(f"{word!r} is no name of a key or tenant: up to 64 letters, digits, '.', '_', '-'.")
    if any(key.caller.name == name for key in keys):
        raise ConfigError(f"{file} has a key named {name!r}. Choose another name, or remove that one first.")
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"There is no scope {scope!r}. {nearest(scope, SCOPES)}")
    text = f"al-{secrets.token_urlsafe(32)}"
    chosen = tuple(scope for scope in SCOPES if scope in scopes)
    _write(file, [*keys, Key(Caller(name, chosen, tenant), _hash(text))])
    return text


def remove(file: Path, name: str) -> None:
    """Take a key out of a file.

    Raises:
        ConfigError: it holds none of this name.
        FormatError, OutputError: the file cannot be read or written.
    """
    keys = read(file)
    left = [key for key in keys if key.caller.name != name]
    if len(left) == len(keys):
        raise ConfigError(f"{file} has no key named {name!r}. {nearest(name, [key.caller.name for key in keys])}")
    _write(file, left)


def _write(file: Path, keys: list[Key]) -> None:
    entries = [
        {"name": k.caller.name, "scopes": list(k.caller.scopes), "tenant": k.caller.tenant, "sha256": k.sha256}
        for k in keys
    ]
    write_json(file, {"format": FORMAT, "keys": entries})


def _entry(file: Path, entry: Any) -> Key:
    try:
        name, scopes, tenant, sha256 = entry["name"], entry["scopes"], entry["tenant"], entry["sha256"]
        valid = (
            set(entry) == {"name", "scopes", "tenant", "sha256"}
            and all(isinstance(word, str) and _NAME.fullmatch(word) for word in (name, tenant or name))
            and set(scopes) <= set(SCOPES)
            and re.fullmatch("[0-9a-f]{64}", sha256) is not None
        )
    except (TypeError, KeyError):
        valid = False
    if not valid:
        raise FormatError(f"{file} holds an entry that is no key. Restore the file, or make its keys again.")
    return Key(Caller(name, tuple(scopes), tenant), sha256)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
