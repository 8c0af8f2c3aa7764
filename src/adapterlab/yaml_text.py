"""Settings as YAML: files, `a.b=c` overrides, and one over the other.

YAML 1.2's numbers (`1e-4` is one), no dates, no tags, each key once; what anchors expand to has a bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from adapterlab.errors import ConfigError

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FLOAT, _DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_MOST = 100_000  # values that a text stands for, anchors written out


def _resolvers(of: Any) -> dict[str, list[tuple[str, Any]]]:
    """What plain words stand for: as YAML 1.1 has it, with the numbers of 1.2 and without dates."""
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in (_FLOAT, _DATE)]
        for first, pairs in of.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        kept.setdefault(first, []).append((_FLOAT, re.compile(f"(?:{_NUMBER.pattern})$")))
    return kept


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: one of the values would be lost."""
        seen = set()
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)
            if isinstance(name, (dict, list)) or name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is there twice, or is no name", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write values out wherever they are."""
        return True


_Loader.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)
_Dumper.yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)


def written(tree: Mapping[str, Any], width: int = 80) -> str:
    """Write settings, in their order; long texts are broken near a width."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def read(path: Path, example: str) -> dict[str, Any]:
    """Read a file of settings.

    Args:
        path: of the file.
        example: files that show how one looks, for the message.

    Raises:
        ConfigError: it is missing, cannot be read, is no valid YAML or holds no settings.
    """
    if not path.is_file():
        raise ConfigError(f"There is no configuration file {str(path)!r}. Examples are in {example}.")
    try:
        tree = _value(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid YAML: {_reason(error)}. Check brackets and indentation there.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold settings such as 'key: value', and holds a {type(tree).__name__}.")
    return {str(key): value for key, value in tree.items()}


def overrides(pairs: Sequence[str], example: str = "training.lr=1e-4") -> dict[str, Any]:
    """Read `a.b=c` pairs as nested settings; later ones win.

    Raises:
        ConfigError: a pair is malformed.
    """
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        names = key.strip().split(".")
        if not sign or not all(names) or pair.startswith("-"):
            raise ConfigError(f"{pair!r} is no override. Write key=value, such as {example}.")
        try:
            value = _value(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"The value of {pair!r} is not valid YAML: {_reason(error)}.") from None
        for name in reversed(names):
            value = {name: value}
        tree = merged(tree, value)
    return tree


def merged(under: Any, over: Any) -> Any:
    """Put settings over others: mappings key by key, anything else as a whole."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: merged(under.get(key), value) for key, value in over.items()}}


def _value(text: str) -> Any:
    value = yaml.load(text, Loader=_Loader)
    if _size(value, {}) > _MOST:
        raise ValueError(f"its anchors stand for more than {_MOST:,} values")
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """Count values with anchors written out; each is looked at once."""
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if id(value) not in known:
        known[id(value)] = _MOST + 1  # of what holds itself
        known[id(value)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(value)]


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"
