"""The folder that adapters are served from: what lies in it, and that nothing outside of it is read."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapterlab.errors import ConfigError, FormatError, UnusableAdapterError
from adapterlab.io import read_info
from adapterlab.io.files import read_json
from adapterlab.io.links import check_links
from adapterlab.serve.http.limits import Limits

_MARKS = ("method.json", "adapter_config.json")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(f"{_PART}(/{_PART})*")
_LONGEST = 200
_RANK = frozenset({"r", "rank"})  # words in the names of settings that hold ranks, such as rank_pattern or init_r
TENANT = "@"  # a folder `@NAME` holds the adapters of the tenant NAME


@dataclass(frozen=True)
class Place:
    """An adapter that lies in the folder.

    Attributes:
        name: under which it is served: its path, with slashes.
        tenant: whose it is; None: everybody's.
        folder: where it lies, with links resolved.
    """

    name: str
    tenant: str | None
    folder: Path


class Shelf:
    """A folder of adapters.

    Attributes:
        root: the folder, with links resolved; None: adapters cannot be loaded at all.
    """

    def __init__(self, root: Path | None, limits: Limits | None = None):
        if root is not None and not root.is_dir():
            raise ConfigError(f"--adapters {root} is no folder. Make it, or name the folder that your adapters lie in.")
        if root is not None and any((root / name).is_file() for name in _MARKS):
            raise ConfigError(f"--adapters {root} is itself an adapter. Name the folder that it lies in.")
        self.root = root.resolve() if root is not None else None
        self.limits = limits or Limits()

    def found(self) -> Iterator[Place]:
        """Yield the adapters in the folder, by name; what lies in an adapter's folder is not looked at."""
        if self.root is None:
            return
        for where, folders, files in os.walk(self.root):
            folders.sort()
            if not set(_MARKS) & set(files):
                continue
            folders.clear()
            head, _, rest = Path(where).relative_to(self.root).as_posix().partition("/")
            tenant = head[1:] if head.startswith(TENANT) else None
            name = rest if tenant is not None else f"{head}/{rest}".rstrip("/")
            if _NAME.fullmatch(name) and len(name) <= _LONGEST:
                yield Place(name, tenant, Path(where))

    def place(self, path: str, tenant: str | None) -> Path:
        """Return the folder of an adapter that somebody wants to load.

        Args:
            path: below the folder, or whole; for a tenant below the folder `@TENANT`.
            tenant: who wants to.

        Raises:
            ConfigError: it lies outside, or there is none.
            UnusableAdapterError: it is larger than adapters may be.
            FormatError: it is damaged, or its files lead out of it.
        """
        if self.root is None:
            raise ConfigError("This server loads no adapters: it was started without --adapters FOLDER.")
        home = self.root if tenant is None else self.root / f"{TENANT}{tenant}"
        folder = _folder(home / path)
        # Whether something lies outside is not told apart from whether it is there: it is nobody's business.
        if folder is None or folder == home or not folder.is_relative_to(home):
            raise ConfigError(f"There is no adapter {path!r} in the folder that this server loads adapters from.")
        self.check(folder)
        return folder

    def check(self, folder: Path) -> None:
        """Refuse an adapter that is larger than adapters may be; only headers are read.

        Raises:
            UnusableAdapterError: it is.
            FormatError: it is damaged.
        """
        read_info(folder)
        files = sorted(folder.rglob("*.safetensors"))  # parts of an adapter lie in folders inside
        marks = [file for mark in _MARKS for file in sorted(folder.rglob(mark))]
        check_links(folder, *(file.relative_to(folder).as_posix() for file in (*files, *marks)))
        said = [read_json(file) for file in marks]
        try:
            sizes = {
                "adapter_bytes": sum(file.stat().st_size for file in files),
                "adapter_tensors": sum(map(_tensors, files)),
                "adapter_rank": max(_ranks(said), default=0),
            }
        except (OSError, SafetensorError) as error:
            raise FormatError(f"The tensors in {folder.name} cannot be read: {error}. Copy the folder again.") from None
        for name, size in sizes.items():
            most = getattr(self.limits, name)
            if size > most:
                raise UnusableAdapterError(
                    f"The adapter in {folder.name} has {name} {size:,}, and this server takes up to {most:,} "
                    f"(limits.{name})."
                )


def labelled(name: str, tenant: str | None) -> str:
    """The name of an adapter among those of all tenants."""
    return name if tenant is None else f"{TENANT}{tenant}/{name}"


def checked_name(name: str) -> str:
    """Require a name that an adapter may be served under.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise ConfigError(
            f"{name[:_LONGEST]!r} is no name for an adapter: up to {_LONGEST} letters, digits, '.', '_' and '-', in "
            "parts with '/' between them, each beginning with a letter or digit."
        )
    return name


def _folder(path: Path) -> Path | None:
    """The folder at a path, with links resolved; None where there is none."""
    try:
        found = path.resolve()
        return found if found.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null character, links in a circle
        return None


def _tensors(file: Path) -> int:
    with safe_open(file, "pt") as header:
        return len(header.keys())


def _ranks(settings: Any) -> Iterator[int]:
    """Every rank that settings name, those of single modules included; text counts that would be read as a number."""
    left = [(settings, False)]
    while left:
        said, counts = left.pop()
        if isinstance(said, Mapping):
            left += [(value, counts or not _RANK.isdisjoint(key.split("_"))) for key, value in said.items()]
        elif isinstance(said, list):
            left += [(value, counts) for value in said]
        elif counts:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                yield said if isinstance(said, int) else int(float(said))
