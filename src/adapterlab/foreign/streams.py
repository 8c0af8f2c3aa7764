"""Standard streams whose reader may go away (`| head`, a closed terminal, a full disk) without ending the work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Steady:
    """A text stream that falls silent when it cannot be written any more, and is otherwise the one it stands for."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write it, or nothing."""
        return int(self._try(lambda: self.stream.write(text)) or len(text))

    def flush(self) -> None:
        """Flush it, or nothing."""
        self._try(self.stream.flush)

    def _try(self, action: Any) -> Any:
        try:
            return action()
        except OSError:
            # What is still in its buffer would fail again when Python ends, so it goes nowhere as well.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Go on working inside the context when nobody reads what is printed any more."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Steady(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
