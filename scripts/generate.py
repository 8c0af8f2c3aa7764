"""Write what is generated: tables in README and docs, a page for each method, the CLI reference, the support matrix.

Methods come from the registry, benchmarks from their results. What a new method supports is measured by running it,
which takes about a minute; rows of methods that are gone are dropped.

`python scripts/generate.py` writes; `--check` measures nothing and fails when a file is not what would be written.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import click
import typer.main

from adapterlab.cli import build
from adapterlab.io.atomic import json_text, write_text
from adapterlab.io.hf_peft import find_method
from adapterlab.registry import ids, method

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import rules  # noqa: E402  (a script beside this one)
import support_matrix  # noqa: E402  (likewise)


def table() -> str:
    rows = ["| id | what | family | trainable parameters | paper |", "|---|---|---|---|---|"]
    for id in ids():
        cls = method(id)
        what = (cls.__doc__ or "").strip().splitlines()[0]
        paper = f"[{cls.year}](https://arxiv.org/abs/{cls.arxiv})" if cls.arxiv else "–"
        formula = cls.formula.replace("|", r"\|")
        rows.append(f"| [`{id}`](docs/methods/{id}.md) | {what} | {cls.family} | {formula} | {paper} |")
    return "\n".join(rows)


def page(id: str) -> str:
    from adapterlab.cli._pages import method_page

    return method_page(method(id))


def costs() -> str:
    """What the pages of methods say of their cost."""
    rows = ["| id | what a step costs beside |", "|---|---|"]
    for id in ids():
        found = re.search(r"^ *Cost of a step: (.*?)(?:\n *\n|\Z)", method(id).__doc__ or "", re.DOTALL | re.MULTILINE)
        if found:
            rows.append(f"| [`{id}`](methods/{id}.md) | {' '.join(found[1].split())} |")
    return "\n".join(rows)


def exchange(support: dict[str, Any]) -> str:
    """Which type of HF PEFT's holds a method, and on which modules files were exchanged; alike methods in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for id in ids():
        codec = method(id).hf
        if codec is None:
            continue
        options = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in codec.when.items())
        cells = support["methods"][id]["peft"]
        exchanged, ours = (
            ", ".join(where.replace(support_matrix.PLACE, "where it attaches") for where in _where(cells, status))
            or "–"
            for status in ("passed", "not applicable")
        )
        reader = find_method({"peft_type": codec.peft_type, **codec.when}).id
        holds = f"`{codec.peft_type}`" + (f" with {options}" if options else "")
        rows.setdefault((holds, exchanged, ours, f"`{reader}`"), []).append(f"`{id}`")
    head = ["here", "PEFT", "exchanged on", "in our own form on", "PEFT's files are read as"]
    order = sorted(rows, key=lambda row: (row[0], -len(rows[row])))
    lines = [head, ["---"] * len(head), *([", ".join(rows[row]), *row] for row in order)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(cells: dict[str, dict[str, str]], status: str) -> list[str]:
    return [where for where, cell in cells.items() if cell["status"] == status]


def cli_reference() -> str:
    root = typer.main.get_command(build())
    lines = ["# Command line", "", "Generated from the verbs' own help texts.", ""]
    context = click.Context(root, info_name="adapterlab")
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        child = click.Context(command, info_name=name, parent=context)
        usage = command.get_usage(child).removeprefix("Usage: ")
        lines += [f"## adapterlab {name}", "", f"`{usage}`", "", (command.help or "").strip(), ""]
        for parameter in command.params:
            help = getattr(parameter, "help", None)
            if help:
                shown = ", ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.name.upper()
                lines.append(f"- `{shown}`: {help}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def configuration() -> str:
    """A page of the keys of configuration files."""
    from adapterlab.compare.config import CompareConfig
    from adapterlab.settings import keys
    from adapterlab.train.config import TrainConfig

    lines = ["# Configuration files", "", "Generated from the settings' own descriptions. `null` means: not set."]
    for verb, cls in (("train", TrainConfig), ("compare", CompareConfig)):
        lines += [
            "",
            f"## adapterlab {verb}",
            "",
            "| key | values | default | meaning | example |",
            "|---|---|---|---|---|",
        ]
        for key in keys(cls):
            cells = (f"`{key.name}`", key.values, f"`{key.default}`" if key.default else "must be given", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, f"`{key.example}`")) + " |")
    return "\n".join(lines) + "\n"


def files(support: dict[str, Any]) -> dict[Path, str]:
    """What every generated file should hold.

    Args:
        support: the data of the support matrix, without gaps.
    """
    from _bench import between, fill

    out, tables = {}, {"methods": table(), "costs": costs(), "exchange": exchange(support)}
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = between(text, name, content)
        out[file] = fill(text)
    out |= {ROOT / "docs" / "methods" / f"{id}.md": page(id) for id in ids()}
    out[ROOT / "docs" / "cli.md"] = cli_reference()
    out[ROOT / "docs" / "configuration.md"] = configuration()
    out |= {rules.PAGE: rules.page(), rules.EVIDENCE: json_text(rules.evidence())}
    out[rules.PICTURE] = rules.picture()
    out |= {support_matrix.STORED: json_text(support), support_matrix.PAGE: support_matrix.render(support)}
    return out


def supported(check: bool) -> dict[str, Any]:
    """The data of the support matrix; what is missing is measured, or with `check` an error.

    Raises:
        SystemExit: results are missing, and nothing may be measured.
    """
    data = support_matrix.tidied(support_matrix.load())
    missing = support_matrix.lacking(data)
    if missing and check:
        raise SystemExit(f"not measured, run `make docs`:\n  {support_matrix.STORED.name}: {', '.join(missing)}")
    if missing:
        logging.disable(logging.WARNING)
        data = support_matrix.extend(data, missing)
    return data


def main() -> None:
    check = "--check" in sys.argv[1:]
    support = supported(check)
    wanted = files(support)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [p for p in (ROOT / "docs" / "methods").glob("*.md") if p not in wanted]
    if check and stale:
        raise SystemExit("not up to date, run `make docs`:\n  " + "\n  ".join(str(p.relative_to(ROOT)) for p in stale))
    for path in stale:
        if path in wanted:
            write_text(path, wanted[path])
        else:
            path.unlink()
    print(f"{len(wanted)} generated files, {len(stale)} written")
    if failed := support_matrix.failures(support):
        raise SystemExit("failed, mend it and run scripts/support_matrix.py --failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
