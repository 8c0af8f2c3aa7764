"""Frozen pydantic models whose validation errors read like advice, and what each of their keys means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from adapterlab.errors import ConfigError, nearest
from adapterlab.paths import user_path

UserPath = Annotated[Path, AfterValidator(user_path)]


class Settings(BaseModel):
    """Base of everything a user configures: frozen, no unknown fields, errors that name the nearest valid choice.

    Attributes:
        reference: where all settings are listed, for the message about an unknown one.

    Raises:
        ConfigError: a field is unknown, of the wrong type or out of range. All faults are reported at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    reference: ClassVar[str] = ""

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
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        fields = owner.model_fields if owner else {}
        where = f" {cls.reference}" if issubclass(cls, Settings) and cls.reference else ""
        hint = nearest(path[-1], fields)
        return f"{cls.__name__} has no setting {name!r} (received {fault['input']!r}). {hint}{where}"
    if fault["type"] == "missing":
        return f"{cls.__name__} needs the setting {name!r}, which was not given."
    error = fault.get("ctx", {}).get("error")
    if path and isinstance(error, ConfigError) and _owner(cls, path) is not None:
        return str(error)  # settings inside have said it
    message = str(fault["msg"]).removeprefix("Value error, ").rstrip(".")
    where = f"{cls.__name__}: {name}" if path else cls.__name__
    return f"{where} = {fault['input']!r} is not valid: {message[:1].lower() + message[1:]}."


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


SEEDS = 2**32  # numpy takes seeds below


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: dotted, as in the file.
        values: what it takes, in words.
        default: as written in a file; "" for a key that must be given.
        meaning: in a sentence.
        example: `key: value`, as written in a file.
    """

    name: str
    values: str
    default: str
    meaning: str
    example: str


def keys(cls: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the keys that a class of settings has, those of nested classes with their dotted names."""
    for name, field in cls.model_fields.items():
        inner = _owner(cls, [name])
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is PydanticUndefined else _written(default)
        example = field.examples[0] if field.examples else default
        yield Key(
            prefix + name,
            _values(field.annotation, field.metadata),
            shown,
            (field.description or "").rstrip("."),
            f"{prefix}{name}={'...' if example is PydanticUndefined else _written(example)}",
        )


def _written(value: Any) -> str:
    """A value as a configuration file has it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, (bool, int)) else str(value)


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", NoneType: "null"}
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What a type allows, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [m for one in args[1:] for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _values(args[0], [*metadata, *extra])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return ", or ".join(_values(one, [] if one is NoneType else metadata) for one in args)
    if origin in (tuple, list):
        return f"list of {_values(args[0], [])}"
    if origin is dict or annotation is dict:
        return "mapping"
    bounds = [
        f"{sign} {_written(getattr(one, attribute))}"
        for one in metadata
        for kind, (attribute, sign) in _SIGNS.items()
        if isinstance(one, kind)
    ]
    bounds += ["not empty" for one in metadata if isinstance(one, MinLen)]
    return " ".join([_WORDS.get(annotation, "path"), " and ".join(bounds)]).strip()
