"""Settings that differ between modules: tables whose keys match the end of a module's path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from adapterlab.errors import TargetError, nearest

T = TypeVar("T")


def matches(key: str, path: str) -> bool:
    """Say whether a pattern matches the end of a path, at a dot."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _compiles(key: str) -> str:
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"{key!r} is not a valid regular expression ({error})") from None
    return key


Pattern = Annotated[str, AfterValidator(_compiles)]


def look_up(table: Mapping[str, T], path: str, default: T) -> T:
    """Return the value for a module; the first pattern that matches counts."""
    return next((value for key, value in table.items() if matches(key, path)), default)


def check_patterns(method: str, tables: Mapping[str, Iterable[str]], adapted: Iterable[str]) -> None:
    """Require every pattern to match an adapted module.

    Args:
        method: id of the method, for the message.
        tables: keys by the name of the setting.
        adapted: paths of the adapted modules.

    Raises:
        TargetError: one matches none.
    """
    paths = list(adapted)
    for field, keys in tables.items():
        for key in keys:
            if not any(matches(key, path) for path in paths):
                names = {path.rpartition(".")[2] for path in paths}
                raise TargetError(
                    f"{method}: {field} names {key!r}, which no adapted module has. {nearest(key, names)}"
                )
