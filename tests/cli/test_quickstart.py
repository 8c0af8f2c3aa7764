"""The main job: everything it promises to show is shown, and what it leaves can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterlab.cli import main


def quickstart(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["quickstart", *args])
    return int(caught.value.code or 0)


@pytest.mark.model
def test_it_shows_answers_before_and_after_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert quickstart("--output", str(run), "--steps", "4", "--questions", "3") == 0
    out = capsys.readouterr().out
    assert out.count("right answer") >= 2
    before, after = (next(line for line in out.splitlines() if word in line) for word in ("before:", "after:"))
    assert "of 3" in before
    assert "of 3" in after
    assert "95 % interval" in after
    assert "peak memory" in out
    assert f"The adapter is in {run}" in out
    commands = [line.strip() for line in out.partition("Try next:")[2].splitlines() if line.strip()]
    assert len(commands) == 3
    assert all(line.startswith("adapterlab ") for line in commands)
    assert json.loads((run / "run.json").read_text())["config"]["data"]["task"] == "chain_sum"
    assert (run / "best" / "adapter_config.json").is_file()


def test_a_folder_with_something_in_it_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    assert quickstart("--output", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "not empty" in err
    assert "--overwrite" in err
    assert (tmp_path / "thesis.txt").read_text() == "important"
