"""`adapterlab methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import AsJson, print_json
from adapterlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from adapterlab.core.method import Method


def methods(
    pattern: Annotated[str, typer.Argument(help="An id, for its page, or a wildcard pattern such as 'lora*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the methods, or show the page of one."""
    from adapterlab import registry

    ids = registry.ids(pattern)
    if not ids:
        raise ConfigError(f"No method matches {pattern!r}. {nearest(pattern, registry.ids())}")
    if pattern in ids:
        cls = registry.method(pattern)
        print_json({**_facts(cls), "page": _page(cls), "fields": _fields(cls)}) if as_json else _show_page(cls)
        return
    rows = [_facts(registry.method(id)) for id in ids]
    print_json(rows) if as_json else _show_list(rows)


def _facts(cls: type[Method]) -> dict[str, Any]:
    names = ("id", "family", "year", "paper", "arxiv", "status", "formula")
    what = _page(cls).partition("\n")[0]
    return {**{name: getattr(cls, name) for name in names}, "what": what, "capabilities": cls.capabilities()}


def _page(cls: type[Method]) -> str:
    import inspect

    return inspect.cleandoc(cls.__doc__ or "")


def _fields(cls: type[Method]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": _type(field.annotation),
            "default": _default(field),
            "constraints": ", ".join(filter(None, map(_constraint, field.metadata))),
            "description": field.description or "",
        }
        for name, field in cls.model_fields.items()
    ]


def _type(annotation: Any) -> str:
    """An annotation as it would be typed: without module names and rules, literals as their values."""
    from types import UnionType
    from typing import Literal, Union, get_args, get_origin

    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Ellipsis:
        return "..."
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type, args))
    name = "None" if annotation is type(None) else getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type, args))}]" if args else name


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    include = getattr(value, "include", None)  # of `Targets`: shown as a user would write it
    return repr(include[0] if include and len(include) == 1 else value)


def _constraint(rule: Any) -> str:
    """A rule of annotated-types, such as `Ge(ge=1)`, as `>= 1`; "" for functions, which the description explains."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}
    for name, sign in signs.items():
        if getattr(rule, name, None) is not None:
            return f"{sign} {getattr(rule, name)}"
    return ""


def _show_list(rows: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from adapterlab.terminal import Terminal

    console = Terminal()
    for family in dict.fromkeys(row["family"] for row in rows):
        here = [row for row in rows if row["family"] == family]
        table = Table(
            Column("id", no_wrap=True, width=max(len(row["id"]) for row in rows)), Column("what", ratio=5),
            Column("trained parameters", ratio=2), expand=console.width <= 120, title=family, title_justify="left",
        )  # fmt: skip
        for row in here:
            status = "" if row["status"] == "stable" else f" ({row['status']})"
            what = Text.assemble(row["what"], status, (f" {row['year'] or ''}".rstrip(), "dim"))
            table.add_row(Text(row["id"], style="bold"), what, row["formula"])
        console.print(table)
    console.print("Everything on one of them: adapterlab methods ID", highlight=False)


def _show_page(cls: type[Method]) -> None:
    from rich.markdown import Markdown
    from rich.table import Table
    from rich.text import Text

    from adapterlab.terminal import Terminal

    facts, console = _facts(cls), Terminal()
    console.print(Markdown(f"# {facts['id']}: {cls.__name__}\n\n{_markdown(_page(cls))}"))
    can = [name.replace("_", " ") for name, there in facts["capabilities"].items() if there]
    lines = {
        "family": facts["family"],
        "paper": f"{facts['paper']} ({facts['year']})" if facts["paper"] else "",
        "arXiv": facts["arxiv"],
        "parameters": facts["formula"],
        "capabilities": ", ".join(can),
        "status": facts["status"],
    }
    console.print()
    for name, value in lines.items():
        if value:
            console.print(Text.assemble((name, "bold"), f": {value}"), highlight=False)
    table = Table("setting", "type", "default", "description", show_lines=True)
    for field in _fields(cls):
        kind = ", ".join(filter(None, [field["type"], field["constraints"]]))
        table.add_row(Text(field["name"], style="bold"), kind, field["default"], field["description"])
    console.print(table)


def _markdown(page: str) -> str:
    """A docstring as Markdown: its examples become code blocks, and so does indented text by itself."""
    lines: list[str] = []
    inside = False
    for line in page.splitlines():
        code = line.lstrip().startswith((">>>", "...")) or (inside and bool(line.strip()))
        if code != inside:
            lines.append("```python" if code else "```")
        inside = code
        lines.append(line.strip() if code else line)
    return "\n".join(lines + ["```"] * inside)
