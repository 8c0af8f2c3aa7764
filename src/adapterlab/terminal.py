"""The only way to a terminal: what files, rows and models say is shown as text and never obeyed."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters other than line breaks and tabs, what turns the direction of writing around, halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Write characters that a terminal would obey as `\\u001b`, which is right inside JSON too."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Terminal(Console):
    """A console of rich that shows control characters of what it prints; its own colours and cursor moves remain.

    Markup is off, so that `[red]` in a row is shown too: coloured text is a `Text`.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, and show what would be obeyed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)


def show_messages_of_others() -> None:
    """Show control characters in log messages and warnings, whichever library writes them."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg, made.args = shown(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: shown(form(*args, **kwargs))
