"""What files, rows and models say is shown on the terminal as text."""

from __future__ import annotations

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import adapterlab
from adapterlab.cli import main
from adapterlab.cli._shared import print_json, say
from adapterlab.terminal import Terminal, show_messages_of_others, shown

EVIL = "a\x1b[31mred\x1b]0;title\x07\x9b2J\rb\u202ec\ud800[bold]:smile:"
WRITERS = ("Console", "print", "typer.echo", "typer.secho")
SHOWN = r"a\u001b[31mred\u001b]0;title\u0007\u009b2J\u000db\u202ec\ud800[bold]:smile:"


def test_controls_are_shown_and_ordinary_text_is_left_alone():
    assert shown(EVIL) == SHOWN
    for text in ("two\nlines\tand a tab", "Grüße 你好 שלום", "👩‍💻 é"):
        assert shown(text) == text


def test_what_is_said_and_json(capsys):
    say(EVIL)
    print_json({"answer": EVIL})
    plain, _, rest = capsys.readouterr().out.partition("\n")
    assert plain == SHOWN
    assert "\x1b" not in rest
    assert json.loads(rest) == {"answer": EVIL}


@pytest.mark.parametrize("wrap", [str, Text, lambda text: f"{text} and more"])
def test_a_console_obeys_its_own_colours_only(wrap):
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, color_system="truecolor", width=300)
    table = Table("column", title=EVIL)
    table.add_row(wrap(EVIL))
    console.print(table)
    console.print(wrap(EVIL), style="green")
    written = stream.getvalue()
    assert "\x1b[32m" in written  # our green
    for bad in ("\x1b[31m", "\x1b]", "\x9b", "\u202e", "\r", "\x07"):
        assert bad not in written
    assert "[bold]:smile:" in written


def test_errors_and_messages_of_other_libraries(capsys, caplog, monkeypatch):
    with pytest.raises(SystemExit):
        main(["targets", "./no\x1b[31mwhere"])
    assert "\x1b[31m" not in capsys.readouterr().err
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    show_messages_of_others()
    logging.getLogger("somebody").warning("read %s", "\x1b[31mred")
    assert caplog.messages[-1] == r"read \u001b[31mred"


def test_a_wrong_value_is_named_without_the_kind_of_error(capsys):
    for args in (["adapters", "lst"], ["keys", "ad"], ["serve", "m", "--engine", "vlm"], ["bench", "srve"]):
        with pytest.raises(SystemExit, match="2"):
            main(args)
        said = capsys.readouterr().err
        assert "is not one of" in said
        assert "Value error" not in said


def test_nobody_else_writes_to_the_terminal():
    root, found = Path(adapterlab.__file__).parent, []
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "Console",
                "print",
                "typer.echo",
                "typer.secho",
            ):
                found.append(f"{file.relative_to(root)}: {ast.unparse(node)}")
    assert sorted(found) == [
        "cli/__init__.py: print(shown(_message(error)), file=sys.stderr)",
        "cli/_shared.py: typer.echo(typer.style(plain, **style) if style else plain, nl=nl, err=err)",
    ]
