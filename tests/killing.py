"""Deaths at every change of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def killed_at(number: int, root: Path, action: Callable[[], Any]) -> bool:
    """Do something in a child that dies before its n-th change below a folder; say whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(number, 0, -1))

        def watch(event: str, args: tuple[Any, ...]) -> None:
            reading = event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if event not in _CHANGES or reading or not str(args[0]).startswith(str(root)):
                return
            if next(left) == 1:
                os._exit(77)

        sys.addaudithook(watch)
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def at_every_change(root: Path, prepare: Callable[[], None], action: Callable[[], Any]) -> Iterator[int]:
    """Yield after each death; the root is new each time."""
    number = 1
    while True:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        prepare()
        if not killed_at(number, root, action):
            assert number > 3
            return
        yield number
        number += 1
