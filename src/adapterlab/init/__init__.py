"""Initialisers of low-rank factors, found by file: `init/<name>.py` defines the initialiser `<name>`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from adapterlab.errors import ConfigError, nearest
from adapterlab.init._base import Initialiser, Place, Start, Starts

__all__ = ["Init", "Initialiser", "Place", "Start", "Starts", "initialiser", "names"]


def names() -> list[str]:
    """List the initialisers."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def initialiser(name: str, **options: Any) -> Initialiser:
    """Make an initialiser.

    Args:
        name: of it.
        options: its fields.

    Raises:
        ConfigError: there is none of that name, or an option is unknown or out of range.
    """
    if name not in names():
        raise ConfigError(f"there is no initialiser {name!r}. {nearest(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    for cls in vars(module).values():
        if inspect.isclass(cls) and issubclass(cls, Initialiser) and cls.__module__ == module.__name__:
            return cls(**options)
    raise ConfigError(f"{module.__name__} defines no initialiser.")


def _read(value: Any) -> Initialiser:
    if isinstance(value, Initialiser):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("write a name such as 'pissa', or name and options such as {name: pissa, niter: 4}")
    try:
        return initialiser(**{str(key): option for key, option in value.items()})
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _write(value: Initialiser) -> str | dict[str, Any]:
    options = value.model_dump(mode="json", exclude_defaults=True)
    return {"name": value.name, **options} if options else value.name


# The type of a field that holds an initialiser: given and stored as a name, or as name and options.
Init = Annotated[Initialiser, PlainValidator(_read), PlainSerializer(_write)]
