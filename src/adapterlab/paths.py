"""Paths as users write them."""

from __future__ import annotations

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
