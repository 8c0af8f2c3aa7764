"""Work that asks, piece by piece, for what others compute: whoever drives it decides how, and beside what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Any, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
Course = Generator[Asked, Answer, Result]


def carried_out(course: Course[Asked, Answer, Result], compute: Callable[[Asked], Answer]) -> Result:
    """Drive a course to its end.

    Args:
        course: yields what is to be computed, and is sent what came of it.
        compute: does so; what it raises is raised inside the course, at the place that asked.

    Returns:
        What the course returns.
    """
    go_on: Callable[[], Any] = functools.partial(next, course)
    while True:
        try:
            asked = go_on()
        except StopIteration as end:
            result: Result = end.value
            return result
        try:
            go_on = functools.partial(course.send, compute(asked))
        except BaseException as error:  # an interruption too: the course has to tidy up
            go_on = functools.partial(course.throw, error)
