"""Encoded rows do not pile up, and none go that somebody uses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapterlab.errors import ConfigError
from adapterlab.evaluate import pruning
from adapterlab.evaluate.pruning import DAYS, limit, prune, use


def filled(root: Path, name: str, days: float, size: int = 100) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "000000.rows").write_bytes(b"x" * size)
    lock = use(folder)
    assert lock is not None
    lock.close()
    used = time.time() - 86400 * days
    os.utime(root / f".{name}.used", (used, used))
    return folder


def test_the_oldest_go_first_and_the_unused_in_any_case(tmp_path: Path) -> None:
    folders = [filled(tmp_path, name, days) for name, days in (("c", 3), ("a", 1), ("d", DAYS + 1), ("b", 2))]
    assert prune(tmp_path, 1e9) == [folders[2]]
    assert prune(tmp_path, 250) == [folders[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.used", ".b.used", "a", "b"]
    assert prune(tmp_path / "none", 0) == []


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    folder = filled(tmp_path, "a", 100)
    code = f"from pathlib import Path\nfrom adapterlab.evaluate.pruning import use\nlock = use(Path({str(folder)!r}))\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    os.utime(tmp_path / ".a.used", (0, 0))
    assert prune(tmp_path, 0) == []
    child.kill()
    child.communicate()
    assert prune(tmp_path, 0) == [folder], "a killed process holds nothing"


def test_a_folder_that_goes_while_somebody_comes_is_held_when_it_is_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, going, found = filled(tmp_path, "a", 100), threading.Event(), []
    rename = Path.rename

    def slowly(self: Path, target: Path) -> Path:
        going.set()
        time.sleep(0.2)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slowly)
    other = threading.Thread(target=lambda: (going.wait(), found.append(use(folder))))
    other.start()
    assert prune(tmp_path, 0) == [folder]
    other.join()
    assert found[0] is not None
    folder.mkdir()
    assert prune(tmp_path, 0) == [], "the lock that is held is the one beside the new folder"


def test_where_files_cannot_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "a", 100)
    monkeypatch.setattr(pruning, "_locked", lambda *args, **kwargs: None)
    assert prune(tmp_path, 0) == []
    assert use(tmp_path / "a") is None


def test_the_limit_is_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pruning.LIMIT, "1.5")
    assert limit() == 1.5 * 2**30
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv(pruning.LIMIT, text)
        with pytest.raises(ConfigError, match="is no size"):
            limit()
