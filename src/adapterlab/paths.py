"""Paths as users write them, and where adapterlab keeps things of its own."""

from __future__ import annotations

import os
from pathlib import Path

from adapterlab.errors import ConfigError


def user_path(path: str | Path) -> Path:
    """Read a path as a shell would: `~` and `~name` are home folders. Environment variables stay as they are.

    Raises:
        ConfigError: nobody is called like that.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path} begins with the home folder of somebody unknown. Write the whole path.") from None


def home() -> Path:
    """Say where adapterlab keeps what it downloads or builds: `$ADAPTERLAB_HOME`, else `~/.cache/adapterlab`."""
    return Path(os.environ.get("ADAPTERLAB_HOME") or "~/.cache/adapterlab").expanduser().absolute()
