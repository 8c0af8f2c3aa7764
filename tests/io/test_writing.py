"""Whoever writes a folder is alone, may be killed at any moment, and replaces nothing that is not its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from adapterlab.errors import ConfigError, OutputError
from adapterlab.io import successor
from adapterlab.io.atomic import Kind, check_free, new_file, new_folder, write_text
from adapterlab.io.disk import alone, content, tidy
from adapterlab.paths import user_path
from killing import at_every_change

THING = Kind("a thing", ("thing.json",), ("thing.json", "more"), listing="thing.json")


def make(folder: Path, text: str, **options: Any) -> None:
    with new_folder(folder, kind=THING, **options) as work:
        write_text(work / "thing.json", text)


def test_a_folder_is_replaced_or_not_wherever_a_kill_strikes(tmp_path: Path) -> None:
    root, final = tmp_path / "r", tmp_path / "r" / "f"
    for _ in at_every_change(root, lambda: make(final, "old"), lambda: make(final, "new", overwrite=True)):
        with pytest.raises(OutputError, match="not empty"):  # the old folder is back, or the new one is there
            check_free(final, kind=THING)
        assert (final / "thing.json").read_text() in ("old", "new")
        make(final, "third", overwrite=True)
        assert [p.name for p in root.iterdir()] == ["f"], "nothing is left lying about"
        assert [(p.name, p.read_text()) for p in final.iterdir()] == [("thing.json", "third")]


def test_results_take_the_place_of_earlier_ones_wherever_a_kill_strikes(tmp_path: Path) -> None:
    root, names = tmp_path / "r", ("a", "b", "c")

    def prepare() -> None:
        for name in ("a", "b", "mine"):
            (root / name).mkdir()
            (root / name / "x").write_text("old")

    def replace() -> None:
        place = successor.begin(root)
        for name in ("a", "c"):
            (place / name).mkdir()
            (place / name / "x").write_text("new")
        successor.arrive(root, names)

    seen = set()
    for _ in at_every_change(root, prepare, replace):
        successor.recover(root, names)
        found = {path.name: (path / "x").read_text() for path in root.iterdir()}
        assert found.pop("mine") == "old"
        assert found in ({"a": "old", "b": "old"}, {"a": "new", "c": "new"})
        seen |= set(found.values())
    assert seen == {"old", "new"}


def test_one_process_at_a_time_and_a_killed_one_locks_nothing(tmp_path: Path) -> None:
    here, there = os.pipe()
    other = os.fork()
    if other == 0:
        with alone(tmp_path):
            os.write(there, b"in")
            time.sleep(60)
    assert os.read(here, 2) == b"in"
    with pytest.raises(OutputError, match=r"Another process is writing(.|\n)*choose another folder"), alone(tmp_path):
        pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert os.listdir(tmp_path) == [".lock"]
    assert content(tmp_path) == [], "what is left of it does not count"
    with alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    final = tmp_path / "f"
    with new_folder(final) as work:
        (work / "x").write_text("first")
        with pytest.raises(OutputError, match="Another process"):
            make(final, "second")
    assert (final / "x").read_text() == "first"

    def overtaken() -> None:
        with new_folder(tmp_path / "g"):
            (tmp_path / "g").mkdir()  # by somebody who knows no locks
            (tmp_path / "g" / "theirs").touch()

    with pytest.raises(OutputError, match="not empty"):
        overtaken()
    assert content(tmp_path / "g") == ["theirs"]
    with alone(tmp_path / "g"), pytest.raises(OutputError, match="Another process"):
        make(tmp_path / "g", "x", overwrite=True)


def test_only_folders_of_the_same_kind_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "f"
    make(final, '{"files": ["part-1"]}')
    (final / "part-1").touch()
    check_free(final, overwrite=True, kind=THING)
    for place in (final, final / "thing.json"):
        with pytest.raises(OutputError, match="is read here"):
            check_free(final, overwrite=True, kind=THING, inputs=[None, "org/name", str(place)])
    (final / "thesis.txt").touch()
    with pytest.raises(OutputError, match=r"Only a thing(.|\n)*thesis\.txt(.|\n)*left alone"):
        make(final, "new", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(OutputError, match=r"one\.jpg"):
        make(tmp_path / "photos", "new", overwrite=True)
    (final / "thesis.txt").unlink()
    (final / "more").mkdir()
    monkeypatch.chdir(final / "more")
    with pytest.raises(OutputError, match="the working directory"):
        make(final, "new", overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(final / "more"))
    with pytest.raises(OutputError, match="the home folder"):
        make(final, "new", overwrite=True)
    assert content(final) == ["more", "part-1", "thing.json"]


def test_leftovers_are_told_from_files_of_others(tmp_path: Path) -> None:
    for name in (".x.abcd1234.part", ".y.abcd1234.old", ".z.abcd1234.old", "z", ".z.part", "z.abcd1234.part"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".z.part", "y", "z", "z.abcd1234.part"]


def test_the_checksum_is_of_what_was_written(tmp_path: Path) -> None:
    import hashlib

    with new_file(tmp_path / "x") as stream:
        stream.write(b"abc")
        stream.write(bytearray(b"def"))
        assert stream.hexdigest() == hashlib.sha256(b"abcdef").hexdigest()
    assert (tmp_path / "x").read_bytes() == b"abcdef"


def test_home_folders_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "else")
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("$PLACE/x") == Path("$PLACE/x")
    make(Path("~/f"), "new")
    assert (tmp_path / "f" / "thing.json").read_text() == "new"
    with pytest.raises(ConfigError, match="home folder of somebody unknown"):
        user_path("~nobody-of-this-name/x")
