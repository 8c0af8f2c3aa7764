"""Frozen pydantic models whose validation errors read like advice."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adapterlab.errors import ConfigError, nearest


class Settings(BaseModel):
    """Base of everything a user configures: frozen, no unknown fields, errors that name the nearest valid choice.

    Raises:
        ConfigError: a field is unknown, of the wrong type or out of range. All faults are reported at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def replace(self, **changes: Any) -> Any:
        """Return a validated copy with some fields changed."""
        return type(self)(**{**{k: getattr(self, k) for k in self.model_fields_set}, **changes})


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """Turn a pydantic error into one line a fault, each with the value received and the next step."""
    return "\n".join(_fault(fault, cls) for fault in error.errors())


def _fault(fault: Any, cls: type[BaseModel]) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path) or cls.__name__
    if fault["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        fields = owner.model_fields if owner else {}
        return f"{cls.__name__} has no setting {name!r} (received {fault['input']!r}). {nearest(path[-1], fields)}"
    if fault["type"] == "missing":
        return f"{cls.__name__} needs the setting {name!r}, which was not given."
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{cls.__name__}: {name} = {fault['input']!r} is not valid: {message[:1].lower() + message[1:]}."


def _owner(cls: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The nested settings class that a fault's path leads into."""
    for part in path:
        field = cls.model_fields.get(part)
        annotation = field.annotation if field else None
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        found = next((a for a in inner if issubclass(a, BaseModel)), None)
        if found is None:
            return None
        cls = found
    return cls
