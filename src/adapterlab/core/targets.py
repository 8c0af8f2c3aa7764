"""Which modules a method adapts: one type for all methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import field_validator, model_validator

from adapterlab.core.patterns import expression
from adapterlab.core.site import Site
from adapterlab.errors import TargetError, nearest
from adapterlab.foreign.roles import ROLES
from adapterlab.settings import Settings

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[\\^$*+?\[\](){}|]")


class Targets(Settings):
    """A choice of modules.

    An entry of `include` or `exclude` is one of

    - a role: `q`, `k`, `v`, `o`, `qkv`, `gate`, `up`, `gate_up`, `down`, `embed`, `position`, `head`;
    - `all-linear`: every linear layer of the backbone that is called, without output and task heads;
    - the last parts of a module path: `q_proj`, `self_attn.q_proj`, `layers.3.mlp.down_proj`;
    - a regular expression that matches a whole path: `.*layers\\.[0-3]\\..*_proj`.

    Every entry must match something: one that matches nothing is an error even when others match.

    Attributes:
        include: entries to adapt.
        exclude: entries to leave out.
        layers: only these layers: indices, or ranges such as "0-3, -2". Each stack of layers is counted by itself,
            negative numbers from its end. "encoder: 0-3, decoder: -1" says which of several stacks is meant, by a part
            of its path.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """Accept `"all-linear"` and `["q", "v"]` for `{"include": [...]}`."""
        if isinstance(value, (str, list, tuple, set)):
            return {"include": value}
        return value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = isinstance(value, (list, tuple, set, frozenset))
        return (value,) if isinstance(value, str) else tuple(value) if many else value

    @field_validator("include")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("name at least one role, module name or pattern")
        return value

    @field_validator("layers")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, str):
            _parse_layers(value)
        return value


def select(targets: Targets, sites: Sequence[Site], kinds: Sequence[str] | None, model: str) -> list[Site]:
    """Return the sites that `targets` means, in model order.

    Args:
        targets: what to look for.
        sites: every module of the model.
        kinds: kinds the method can adapt, or None for any module.
        model: class name of the model, for messages.

    Raises:
        TargetError: an entry matches nothing or only kinds that cannot be adapted, an expression is malformed, or a
            layer does not exist.
    """
    chosen: dict[str, Site] = {}
    for entry in dict.fromkeys(targets.include):
        matched = _matching(entry, sites, kinds, model, "targets")
        fitting = [s for s in matched if kinds is None or s.kind in kinds]
        if not fitting:
            raise TargetError(_wrong_kind(entry, matched, sites, kinds or ()))
        chosen.update({s.path: s for s in fitting})
    for entry in dict.fromkeys(targets.exclude):
        for site in _matching(entry, sites, None, model, "targets.exclude"):
            chosen.pop(site.path, None)
    if targets.layers is not None:
        wanted = _layers(targets.layers, sites, {site.stack for site in chosen.values() if site.stack is not None})
        chosen = {path: site for path, site in chosen.items() if (site.stack, site.layer) in wanted}
    if not chosen:
        raise TargetError(
            f"{targets!r} leaves no module of {model}: the exclusions and the layer range remove everything that "
            "`include` matches. List what there is with: adapterlab targets MODEL."
        )
    return [site for site in sites if site.path in chosen]


def matcher(entry: str) -> Callable[[Site], bool]:
    """Return a test for one entry.

    Raises:
        TargetError: the entry is a malformed regular expression.
    """
    if entry == ALL_LINEAR:
        return lambda site: site.kind == "linear" and not site.is_head and not site.bypassed
    if entry in ROLES:
        return lambda site: site.role == entry or site.path.rpartition(".")[2] == entry
    if _REGEX.search(entry):
        try:
            fits = expression(entry)
        except ValueError as error:
            raise TargetError(f"targets: {error}.") from None
        return lambda site: fits(site.path)
    return lambda site: site.path == entry or site.path.endswith("." + entry)


def _matching(entry: str, sites: Sequence[Site], kinds: Sequence[str] | None, model: str, field: str) -> list[Site]:
    fits = matcher(entry)
    found = [site for site in sites if fits(site)]
    if not found:
        names = {s.path.rpartition(".")[2] for s in sites if kinds is None or s.kind in kinds}
        roles = sorted({s.role for s in sites if s.role})
        raise TargetError(
            f"{field}: {entry!r} matches no module of {model}. {nearest(entry, {n for n in names if not n.isdigit()})} "
            f"Roles here: {', '.join(roles) or 'none'}. List everything with: adapterlab targets MODEL."
        )
    return found


def _wrong_kind(entry: str, matched: Sequence[Site], sites: Sequence[Site], kinds: Sequence[str]) -> str:
    prefix = matched[0].path + "."
    inside = sorted({s.path.rpartition(".")[2] for s in sites if s.path.startswith(prefix) and s.kind in kinds})
    hint = f" Inside it are: {', '.join(inside)}." if inside else ""
    return (
        f"targets: {entry!r} matches only {type(matched[0].module).__name__} ({matched[0].kind}), and this method "
        f"adapts {' or '.join(kinds)} modules.{hint}"
    )


def _layers(layers: tuple[int, ...] | str, sites: Sequence[Site], chosen: set[str]) -> set[tuple[str, int]]:
    """The layers that are meant, as (stack, index); a range without a stack means every stack that is targeted."""
    depths: dict[str, int] = {}
    for site in sites:
        if site.stack is not None and site.layer is not None:
            depths[site.stack] = max(depths.get(site.stack, 0), site.layer + 1)
    ranges = _parse_layers(layers) if isinstance(layers, str) else [(None, i, i) for i in layers]
    wanted: set[tuple[str, int]] = set()
    for name, first, last in ranges:
        stacks = [stack for stack in depths if stack in chosen] if name is None else _named(name, depths)
        for stack in stacks:
            low, high = (i + depths[stack] if i < 0 else i for i in (first, last))
            if not 0 <= low <= high < depths[stack]:
                raise TargetError(_out_of_range(first, last, stack, {s: depths[s] for s in depths if s in chosen}))
            wanted.update((stack, i) for i in range(low, high + 1))
    return wanted


def _named(name: str, depths: dict[str, int]) -> list[str]:
    found = [stack for stack in depths if f".{name}." in f".{stack}."]
    if not found:
        parts = {part for stack in depths for part in (stack, *stack.split("."))}
        raise TargetError(f"targets.layers: no stack of layers is called {name!r}. {nearest(name, parts)}")
    return found


def _out_of_range(first: int, last: int, stack: str, depths: dict[str, int]) -> str:
    shown = str(first) if first == last else f"{first}-{last}"
    text = f"targets.layers: {shown} is not within the layers 0-{depths.get(stack, 0) - 1} of {stack}."
    if len(depths) > 1:
        others = ", ".join(f"{path} has {count}" for path, count in depths.items())
        text += f" The stacks differ: {others}. Say which one, as in '{stack}: 0-{depths[stack] - 1}'."
    return text


def _parse_layers(text: str) -> list[tuple[str | None, int, int]]:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([\w.]+)\s*:)?\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?", part)
        if not match:
            raise ValueError(
                f"{part!r} is neither a layer nor a range; write for example '0-3, 8, -1', or with the names of stacks "
                "'encoder: 0-3, decoder: -1'"
            )
        first = int(match[2])
        ranges.append((match[1], first, int(match[3]) if match[3] else first))
    return ranges
