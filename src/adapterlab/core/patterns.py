"""Expressions that match paths of modules, and settings that differ between modules by them.

Expressions come from files, and some never come to an end. `regex` reads what `re` reads and can be given a time; an
expression that needs it is refused.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, TypeVar

import regex  # type: ignore[import-untyped]
from pydantic import AfterValidator

from adapterlab.errors import TargetError, nearest

T = TypeVar("T")
_SECONDS, _SLOW = 0.5, 1e-3  # for all paths that take long; others need a few millionths of a second


@functools.lru_cache(maxsize=4096)
def expression(text: str) -> Callable[[str], bool]:
    """Return a test of whole paths by a regular expression, which always ends.

    Raises:
        ValueError: it is malformed. The test raises a `TargetError` where the expression takes too long.
    """
    try:
        re.compile(text)
        compiled = regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a valid regular expression ({error})") from None

    left = _SECONDS

    def fits(path: str) -> bool:
        nonlocal left
        began = time.process_time()
        try:
            found = compiled.fullmatch(path, timeout=max(left, _SLOW)) is not None
            spent = time.process_time() - began
            left -= spent if spent > _SLOW else 0
            if left < 0:
                raise TimeoutError
            return found
        except TimeoutError:
            left = 0
            raise TargetError(
                f"The expression {text!r} takes too long: it could not be decided in {_SECONDS:g} seconds which "
                f"modules it matches, {path!r} among them. Name the modules instead of nesting repetitions."
            ) from None

    return fits


def matches(key: str, path: str) -> bool:
    """Say whether a pattern matches the end of a path, at a dot."""
    return expression(rf"(.*\.)?({key})")(path)


def _compiles(key: str) -> str:
    expression(key)
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
