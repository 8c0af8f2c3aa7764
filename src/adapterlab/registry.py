"""Find methods by file: `methods/<family>/<id>.py` defines the method `<id>`; third parties add theirs by entry point.

Listing reads file names only, so it imports neither torch nor any method.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import os
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from adapterlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from adapterlab.core.method import Method

GROUP = "adapterlab.methods"
_PACKAGE = f"{__package__}.methods"
_FOLDER = Path(__file__).parent / "methods"
_registered: dict[str, type[Method]] = {}
_REFERENCE = re.compile(r'Reference: "([^"]+)", arXiv (\d{4}\.\d{5})')
_RATE = re.compile(r"Rate: (\d+(?:\.\d+)?(?:e-\d+)?)")
M = TypeVar("M", bound="type[Method]")


def register(cls: M) -> M:
    """Class decorator that makes a method known under its id, which is the name of its file.

    Its family is the folder of the file; a method of a third party says its family itself. The paper's title, arXiv id
    and year are read from its docstring: `Reference: "Title", arXiv 2106.09685`, and so is the rate at which a search
    begins: `Rate: 5e-4, as in the authors' runs`. A class may also state them.

    Raises:
        ConfigError: another class has that id already.
    """
    package, _, file = cls.__module__.rpartition(".")
    if "id" not in cls.__dict__:
        cls.id = file
    if package.startswith(f"{_PACKAGE}."):
        cls.family = package.rpartition(".")[2].replace("_", " ")
    reference = _REFERENCE.search(" ".join((cls.__doc__ or "").split()))
    if reference and "paper" not in cls.__dict__:
        cls.paper, cls.arxiv, cls.year = reference[1], reference[2], 2000 + int(reference[2][:2])
    rate = _RATE.search(cls.__doc__ or "")
    if rate and "typical_lr" not in cls.__dict__:
        cls.typical_lr = float(rate[1])
    other = _registered.get(cls.id)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f"Two methods have the id {cls.id!r}: {other.__module__}.{other.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}. Rename one of them."
        )
    _registered[cls.id] = cls
    return cls


def _third_party() -> dict[str, EntryPoint]:
    return _points(tuple((place, _changed(place)) for place in sys.path))


@functools.lru_cache(maxsize=1)
def _points(path: tuple[tuple[str, int], ...]) -> dict[str, EntryPoint]:
    """Read the entry points of all packages, again when something was installed: it changes a folder of the path."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _changed(place: str) -> int:
    try:
        return os.stat(place).st_mtime_ns
    except OSError:
        return 0


def families() -> list[str]:
    """List the folders of methods."""
    return sorted(folder.name for folder in _FOLDER.iterdir() if (folder / "__init__.py").is_file())


@functools.cache
def _own() -> dict[str, str]:
    """The families of our methods by id; files with a leading underscore hold what methods of a family share."""
    return {
        file.stem: family
        for family in families()
        for file in (_FOLDER / family).glob("*.py")
        if not file.name.startswith("_")
    }


def ids(pattern: str = "*") -> list[str]:
    """List the ids of all methods that match a wildcard pattern.

    Args:
        pattern: shell-style, such as "lora*".
    """
    return sorted(i for i in {*_own(), *_third_party(), *_registered} if fnmatch.fnmatch(i, pattern))


def method(id: str) -> type[Method]:
    """Return the method class with this id.

    Raises:
        ConfigError: there is none.
    """
    if id not in _registered:
        if id not in ids():
            raise ConfigError(f"There is no method {id!r}. {nearest(id, ids())} List them with: adapterlab methods.")
        point = _third_party().get(id)
        point.load() if point else importlib.import_module(f"{_PACKAGE}.{_own()[id]}.{id}")
    return _registered[id]


def method_class(name: str) -> type[Method] | None:
    """Return the method whose class is called `name` (its id without underscores, in any case), or None."""
    id = next((i for i in ids() if i.replace("_", "") == name.lower()), None)
    return method(id) if id else None


def class_names() -> list[str]:
    """Names of all method classes; imports them."""
    return sorted(method(i).__name__ for i in ids())
