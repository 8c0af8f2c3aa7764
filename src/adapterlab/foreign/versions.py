"""Versions of what this package stands on, without importing any of it."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

from adapterlab.version import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "bitsandbytes", "reasoning-gym")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it stands on."""
    found = {"python": platform.python_version(), "adapterlab": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
