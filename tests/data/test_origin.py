"""Rows that change in between: hub data sets are read at the commit they had, files of streams have to stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from adapterlab.data import DataConfig, load_data, origin
from adapterlab.data.config import OF_SOURCE
from adapterlab.errors import DataError
from adapterlab.evaluate import opening

datasets = pytest.importorskip("datasets")
OLD, NEW = "a" * 40, "b" * 40
ROWS = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(30)]


class Hub:
    """A hub whose data sets have two commits; `main` is at one of them, `gone` ones were removed."""

    def __init__(self) -> None:
        self.main, self.answers = OLD, True
        self.gone: set[str] = set()
        self.asked: list[str | None] = []
        self.loaded: list[dict[str, Any]] = []

    def info(self, api: Any, repo: str, *, revision: str | None = None, **_: Any) -> Any:
        self.asked.append(revision)
        if not self.answers:
            raise ConnectionError("no route to the hub")
        commit = {None: self.main, "main": self.main, "v1": OLD}.get(revision, revision)
        if commit in self.gone:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RevisionNotFoundError("404", response=response)
        return type("Info", (), {"sha": commit})

    def load(self, path: str, name: str | None, *, split: str, revision: str | None = None, **options: Any) -> Any:
        self.loaded.append({"path": path, "revision": revision, **options})
        text = {OLD: "old", NEW: "new"}.get(revision or "", "none")
        return datasets.Dataset.from_list([{**row, "completion": f"{text} {i}"} for i, row in enumerate(ROWS)])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **options: made.info(*args, **options))
    monkeypatch.setattr(datasets, "load_dataset", made.load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return made


def cache(tmp_path: Path, commit: str, config: str = "default") -> Path:
    """What `datasets` leaves of a data set that it has loaded."""
    folder = tmp_path / "cache" / "owner___my_rows" / config / "0.0.0" / commit
    folder.mkdir(parents=True)
    return folder


def test_the_commit_is_noted_and_read_again(hub: Hub) -> None:
    cfg = DataConfig(path="owner/rows", eval_split="test")
    first = load_data(cfg)
    assert first.commits == {"owner/rows": OLD}
    assert hub.asked == [None], "asked once for both splits"
    hub.main = NEW
    again = load_data(cfg, commits=first.commits)
    assert again.commits == first.commits
    assert [e.answer for e in again.train] == [e.answer for e in first.train]
    assert load_data(cfg).commits == {"owner/rows": NEW}
    assert [one["revision"] for one in hub.loaded] == [OLD, OLD, OLD, OLD, NEW, NEW]


def test_each_revision_of_each_source_has_its_commit(hub: Hub) -> None:
    hub.main = NEW
    sources = [{"path": "owner/rows"}, {"path": "owner/rows", "revision": "v1"}]
    found = load_data(DataConfig(sources=sources, eval_size=0))
    assert found.commits == {"owner/rows": NEW, "owner/rows@v1": OLD}
    assert "revision" in OF_SOURCE
    pinned = origin.pinned({"sources": sources, "path": None}, found.commits)
    assert [source["revision"] for source in pinned["sources"]] == [NEW, OLD]


def test_a_commit_that_is_gone_is_an_error_that_says_what_is_there(hub: Hub) -> None:
    hub.main, hub.gone = NEW, {OLD}
    with pytest.raises(DataError, match=rf"'owner/rows' has no revision '{OLD}'.*branch is at {NEW}.*--overwrite"):
        load_data(DataConfig(path="owner/rows"), commits={"owner/rows": OLD})
    with pytest.raises(DataError, match="has no revision 'v1'"):
        load_data(DataConfig(path="owner/rows", revision="v1"))


def test_without_a_connection_the_cache_says_which_commit_it_holds(hub: Hub, tmp_path: Path) -> None:
    hub.answers = False
    cfg = DataConfig(path="owner/MyRows")
    assert load_data(cfg).commits == {}, "nobody knows"
    cache(tmp_path, OLD)
    found = load_data(cfg)
    assert found.commits == {"owner/MyRows": OLD}
    os.utime(cache(tmp_path, NEW), (2e9, 2e9))  # the newest is what `datasets` would take
    with pytest.raises(DataError, match=rf"Revision {OLD} .*'owner/MyRows'.*as when the run began.*holds commit {NEW}"):
        load_data(cfg, commits=found.commits)
    with pytest.raises(DataError, match=rf"Revision v1 of .*holds commit {NEW}"):
        load_data(cfg.model_copy(update={"revision": "v1"}))
    assert load_data(cfg.model_copy(update={"name": "default"})).commits == {"owner/MyRows": NEW}


def test_what_datasets_loads_in_place_of_a_commit_is_found_out() -> None:
    file = {"filename": f"/cache/owner___rows/default/0.0.0/{NEW}/rows-train.arrow"}
    origin.check_loaded("owner/rows", [file], NEW)
    origin.check_loaded("owner/rows", [{"filename": "/tmp/rows.arrow"}], OLD)
    with pytest.raises(DataError, match=rf"Revision {OLD} .*the hub did not give it.*holds commit {NEW}"):
        origin.check_loaded("owner/rows", [file], OLD)


def test_a_revision_is_for_hub_data_sets(write_rows: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"data\.revision='v1' is for hub data sets"):
        load_data(DataConfig(path=write_rows(ROWS), revision="v1"))
    with pytest.raises(ValueError, match="revision cannot be used with task"):
        DataConfig(task="chain_sum", revision="v1")


def test_an_evaluation_reads_the_commit_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "method.json").write_text("{}")
    config = {"model": "m", "data": {"path": "owner/rows", "revision": None}}
    facts = {"config": config, "data": {"commits": {"owner/rows": OLD}}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert opening._run(tmp_path, None, "best").data == {"path": "owner/rows", "revision": OLD}


# ---------------------------------------------------------------------- files of streams


def stream(path: str, **settings: Any) -> Any:
    found = load_data(DataConfig(path=path, streaming=True, eval_size=2, window=7, **settings))
    found.train.total = 60  # type: ignore[attr-defined]
    return found


def rewritten(path: str) -> None:
    """Another row far behind the first ones, in as many bytes."""
    file, text = Path(path), Path(path).read_text()
    file.write_text(text.replace('"30"', '"03"'))
    assert file.stat().st_size == len(text.encode())


def appended(path: str) -> None:
    with Path(path).open("a") as file:
        file.write('{"prompt": "q", "completion": "a"}\n')


def cut(path: str) -> None:
    os.truncate(path, Path(path).stat().st_size // 2)


def removed(path: str) -> None:
    Path(path).unlink()


@pytest.mark.parametrize("change", [rewritten, appended, cut, removed])
def test_a_file_that_changes_while_it_is_streamed_is_named(
    write_rows: Callable[..., str], change: Callable[[str], None]
) -> None:
    path = write_rows(ROWS)
    rows = stream(path).train
    assert rows[0].messages
    change(path)
    with pytest.raises(DataError, match=r"changed while their rows are streamed(.|\n)*rows\.jsonl: [\d,]+ bytes.* now"):
        rows[8]


def test_a_file_that_joins_a_streamed_folder_is_named(write_rows: Callable[..., str], tmp_path: Path) -> None:
    write_rows(ROWS, "a.jsonl")
    rows = stream(str(tmp_path)).train
    write_rows(ROWS, "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: not there at the beginning"):
        rows[0]


def test_a_touched_or_copied_file_is_the_same(write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(ROWS)
    before = stream(path)
    text = Path(path).read_text()
    Path(path).unlink()
    Path(path).write_text(text)
    os.utime(path, (2e9, 2e9))
    assert before.train[8].messages
    assert stream(path).files == before.files
    monkeypatch.setattr(origin, "WHOLE", 10)  # of a large file a sample is hashed, and its time counts
    monkeypatch.setattr(origin, "_BLOCK", 10)
    large = stream(path)
    os.utime(path, (1e9, 1e9))
    assert stream(path).files != large.files
    with pytest.raises(DataError, match=r"bytes of 2033.* at the beginning.*bytes of 2001.* now"):
        large.train[8]


def test_a_saved_data_set_that_changes_is_noticed(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    before = stream(str(tmp_path / "saved")).files
    assert any(name.endswith(".arrow") for name in before)
    datasets.Dataset.from_list(ROWS[::-1]).save_to_disk(str(tmp_path / "saved"))
    assert stream(str(tmp_path / "saved")).files != before
