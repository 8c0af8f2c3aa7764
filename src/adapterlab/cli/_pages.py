"""A method's page as Markdown, for the generated docs: its docstring and the table of its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterlab.cli.methods import _facts, _fields, _markdown, _page

if TYPE_CHECKING:
    from adapterlab.core.method import Method


def method_page(cls: type[Method]) -> str:
    """Return the page of one method."""
    facts = _facts(cls)
    source = f"[{facts['paper']}](https://arxiv.org/abs/{facts['arxiv']})" if facts["arxiv"] else facts["paper"]
    can = [name.replace("_", " ") for name, there in facts["capabilities"].items() if there]
    year = f" ({facts['year']})" if facts["year"] else ""
    lines = [
        f"# {facts['id']}: {cls.__name__}",
        "",
        "Generated from the method's file.",
        "",
        _markdown(_page(cls)),
        "",
        f"- Family: {facts['family']}",
        f"- Paper: {source}{year}",
        f"- Trainable parameters: {facts['formula']}",
        *([f"- Capabilities: {', '.join(can)}"] if can else []),
        f"- Status: {facts['status']}",
        "",
        "| setting | type | default | description |",
        "|---|---|---|---|",
    ]
    for field in _fields(cls):
        kind = ", ".join(filter(None, [field["type"], field["constraints"]]))
        cells = (f"`{field['name']}`", f"`{kind}`", f"`{field['default']}`", field["description"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
