"""The README.md that stands beside a saved adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterlab.engine.summary import summarise
from adapterlab.terminal import shown

if TYPE_CHECKING:
    from adapterlab.engine.attachments import Attachments

_MARKS = {ord("\n"): " ", ord("<"): "&lt;", ord("|"): "&#124;"}  # a name comes from a file, and is no part of the page


def model_card(host: Attachments, name: str, base_model: str | None, peft: bool, notes: dict[str, Any]) -> str:
    """Write the card: metadata for a hub, what was trained, how to load it, and what the caller noted.

    Args:
        host: of the model.
        name: of the adapter.
        base_model: name of the base model.
        peft: whether HF PEFT can read the folder.
        notes: facts such as data and results, shown as a list.
    """
    method, summary = host.methods[name], summarise(host, name)
    head = {
        "base_model": base_model,
        "library_name": "peft" if peft else "adapterlab",
        "tags": ["adapterlab", method.id],
    }
    settings = {k: v for k, v in method.model_dump(mode="json").items() if v not in (None, {}, [], ())}
    base = base_model or "BASE_MODEL"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value),
        "---",
        "",
        f"# {type(method).__name__} adapter for {shown(base).translate(_MARKS)}",
        "",
        f"{method.paper or type(method).__name__}: {summary.trainable:,} of {summary.total:,} parameters were trained "
        f"({100 * summary.trainable / max(1, summary.total):.3f} %), on "
        + (", ".join(f"{role} ({count})" for role, count in summary.modules.items()) or "no module")
        + ".",
        "",
        *(f"- {key}: {value}" for key, value in notes.items()),
        *([""] if notes else []),
        "```python",
        "import adapterlab as al",
        "",
        f"model, tokenizer = al.load_model({json.dumps(base)})",
        'host = al.load(model, "THIS_FOLDER")',
        "```",
        "",
    ]
    if peft:
        lines += ["The folder is in HF PEFT's format as well: `PeftModel.from_pretrained(model, THIS_FOLDER)`.", ""]
    lines += ["Settings:", "", "```json", json.dumps(settings, indent=2), "```", ""]
    return "\n".join(lines)
