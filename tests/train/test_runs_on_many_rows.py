"""Runs on rows that stay on the disk, on streams and on several sources: the same steps, and exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterlab.data import DataConfig, load_data
from adapterlab.data.mixture import Mixture
from adapterlab.errors import ConfigError
from adapterlab.evaluate import filling, prepared
from adapterlab.train.config import TrainConfig, load_config
from adapterlab.train.loop import Listener, Loop, Record
from adapterlab.train.run import fit
from adapterlab.train.sampler import Sampler
from adapterlab.train.signals import Interrupted
from tiny_runs import write_data

datasets = pytest.importorskip("datasets")
Config = Callable[..., dict[str, Any]]


class Stop(Listener):
    def __init__(self, step: int):
        self.step = step

    def settled(self, loop: Loop) -> None:
        if loop.status.step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def losses(folder: Path) -> list[Record]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def begin() -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))
        monkeypatch.setattr("adapterlab.data.sources.HELD", 0)
        for module in ("data.sources", "data.splits", "evaluate.rows"):
            monkeypatch.setattr(f"adapterlab.{module}.FEW", 10)
        monkeypatch.setattr(prepared, "SIZE", 8)
        for module in (filling, prepared):
            monkeypatch.setattr(module, "helpers", lambda: 0)

    return begin


def test_a_run_on_rows_on_the_disk_is_the_run_on_rows_in_memory(config: Config, root: Path, many: Any) -> None:
    held = fit({**config(), "output": str(root / "held")}, quiet=True)
    many()
    with pytest.raises(Interrupted):
        fit(config(), quiet=True, callbacks=[Stop(5)])
    kept = fit(config(), resume=True, quiet=True)
    assert held is not None
    assert kept is not None
    assert losses(kept.folder) == losses(held.folder)
    facts, expected = (json.loads((run.folder / "run.json").read_text())["data"] for run in (kept, held))
    assert facts["columns"] == expected["columns"]
    assert facts["encoding"]["pending"] + facts["encoding"]["rows"] == expected["encoding"]["rows"] == 32


def test_other_rows_on_the_disk_do_not_continue_a_run(config: Config, root: Path, many: Any) -> None:
    many()
    with pytest.raises(Interrupted):
        fit(config(), quiet=True, callbacks=[Stop(3)])
    (root / "rows.jsonl").unlink()
    write_data(root / "rows.jsonl", seed=1)
    with pytest.raises(ConfigError, match="data fingerprint"):
        fit(config(), resume=True, quiet=True)


# ---------------------------------------------------------------------- several sources


def sources(root: Path) -> list[dict[str, Any]]:
    write_data(root / "a.jsonl", 24, seed=1)
    lines = ["q,a,extra", *(f"b{i}=,{i + 1},x" for i in range(12))]
    (root / "b.csv").write_text("\n".join(lines))
    return [
        {"path": str(root / "a.jsonl"), "eval_size": 4},
        {"path": str(root / "b.csv"), "eval_size": 3, "columns": {"prompt": "q", "completion": "a"}},
    ]


def test_sources_are_joined_drawn_by_weight_or_one_after_the_other(root: Path) -> None:
    given = sources(root)
    joined = load_data(DataConfig(sources=given))
    assert isinstance(joined.train, Mixture)
    assert (len(joined.train), len(joined.eval), joined.format) == (29, 7, "prompt-completion")
    assert [e.row for e in joined.train[20:]] == [e.row for e in load_data(DataConfig(**given[1])).train]
    assert joined.columns.unused == ("extra",)
    weighted = [{**one, "weight": weight} for one, weight in zip(given, (3, 1), strict=True)]
    for rule in ("first_exhausted", "all_exhausted"):
        found = load_data(DataConfig(sources=weighted, mixing=rule)).train
        reference = datasets.interleave_datasets(
            [datasets.Dataset.from_dict({"i": [*range(a, b)]}) for a, b in ((0, 20), (20, 29))],
            probabilities=[0.75, 0.25], seed=0, stopping_strategy=rule,
        )["i"]  # fmt: skip
        assert [joined.train[i] for i in reference] == [*found]
    assert load_data(DataConfig(sources=weighted)).source.endswith("(first_exhausted)")
    assert load_data(DataConfig(sources=given, mixing="in_sequence")).train.stages == (20, 9)


def test_in_sequence_one_source_is_over_before_the_next_begins() -> None:
    for group in (False, True):
        sampler = Sampler([*range(1, 30)], seed=0, batch_size=1, batches=1, group=group, stages=(20, 9))
        rows = [row for step in range(58) for batch in sampler.step(step) for row in batch]
        for epoch in (rows[:29], rows[29:58]):
            assert sorted(epoch[:20]) == [*range(20)]
            assert sorted(epoch[20:]) == [*range(20, 29)]
        assert rows[:20] != [*range(20)]


def test_each_source_has_its_own_evaluation_loss(config: Config, root: Path) -> None:
    fields = config(steps=4)
    fields["data"] = sources(root)
    result = fit(fields, quiet=True)
    assert result is not None
    found = [line for line in losses(result.folder) if "eval_loss" in line][-1]
    assert [*found["eval_losses"]] == ["a", "b"]
    alone = fit({**fields, "data": sources(root)[:1], "output": str(root / "one")}, quiet=True)
    assert alone is not None
    first = [line for line in losses(alone.folder) if "eval_loss" in line]
    assert first[-1]["eval_losses"] == {"a": first[-1]["eval_loss"]}
    low, high = sorted(found["eval_losses"].values())
    assert low < found["eval_loss"] < high


def test_a_list_is_short_for_sources(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data:\n  - {{path: {root}/rows.jsonl, weight: 2}}\n  - {{path: {root}/rows.jsonl, weight: 1}}\n")
    config, _ = load_config(file, ["data.mixing=all_exhausted"])
    assert config.data.sources is not None
    assert [one["weight"] for one in config.data.sources] == [2, 1]
    assert load_config(file, ["data.path=x.jsonl"])[0].data.sources is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"path": "a.jsonl", "weigth": 2}], "may not set 'weigth'. Nearest: weight"),
        ([{"weight": 2}], "source 1 has no path"),
        ([{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl"}], "either all sources have a weight"),
        ({"sources": [{"path": "a.jsonl"}], "mixing": "all_exhausted"}, "needs weights"),
        ({"sources": [{"path": "a.jsonl"}], "path": "b.jsonl"}, "path='b.jsonl' and sources="),
        ({"sources": [{"path": "a.jsonl"}], "eval_path": "b.jsonl"}, "eval_path belongs into each of the sources"),
        ({"path": "a.jsonl", "streaming": True}, "needs training.steps"),
        ({"path": "a.jsonl", "window": 5}, "is for streaming"),
        ({"sources": [{"path": "a.jsonl"}], "streaming": True, "mixing": "joined"}, "neither task nor mixing"),
    ],
)
def test_what_cannot_be_is_refused(data: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(data=data)


# ---------------------------------------------------------------------- streams


def stream(root: Path, count: int, **settings: Any) -> Any:
    found = load_data(DataConfig(path=str(root / "rows.jsonl"), streaming=True, eval_size=4, **settings)).train
    found.total = count
    return found


def test_a_stream_is_a_function_of_seed_and_position(root: Path) -> None:
    rows = [e.row for e in stream(root, 100, window=7)]
    for start in range(0, 98, 7):
        expected = [5 + i % 36 for i in range(start, start + 7)]
        assert sorted(rows[start : start + 7]) == sorted(expected)
    assert rows[:7] != sorted(rows[:7])
    other = stream(root, 100, window=7)
    assert [other[i].row for i in (70, 3, 99, 36, 35)] == [rows[i] for i in (70, 3, 99, 36, 35)]
    assert [e.row for e in stream(root, 100, window=7, seed=1)] != rows
    assert np.array_equal(Sampler([1] * 10, 0, 2, 1, stages=None).step(2), [[4, 5]])


def test_streams_are_drawn_by_weight(root: Path) -> None:
    weighted = [{**one, "weight": weight} for one, weight in zip(sources(root), (3, 1), strict=True)]

    def drawn() -> Any:
        found = load_data(DataConfig(sources=weighted, streaming=True, window=5)).train
        found.total = 2000
        return found

    rows = [*drawn()]
    of_b = [example.prompt.startswith("b") for example in rows]
    assert 0.2 < sum(of_b) / 2000 < 0.3
    other = drawn()
    assert [other[i] for i in (1500, 3, 1999)] == [rows[i] for i in (1500, 3, 1999)]
    first = [e for e, b in zip(rows, of_b, strict=True) if b][:10]
    assert {e.row for e in first} == {*range(4, 13)}, "each row of a source before any comes again"


def test_an_interrupted_run_on_a_stream_continues_exactly(config: Config, root: Path) -> None:
    fields = config()
    fields["data"] |= {"streaming": True, "window": 16}
    straight = fit({**fields, "output": str(root / "straight")}, quiet=True)
    with pytest.raises(Interrupted):
        fit(fields, quiet=True, callbacks=[Stop(7)])
    resumed = fit(fields, resume=True, quiet=True)
    assert straight is not None
    assert resumed is not None
    assert losses(resumed.folder) == losses(straight.folder)


def test_rows_of_a_stream_that_are_too_long_leave_their_places_to_others(config: Config, root: Path) -> None:
    with (root / "long.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"prompt": "1" * (80 if i % 3 else 3) + "=", "completion": "2"}) + "\n")
    fields = config(steps=3)
    data = {"path": str(root / "long.jsonl"), "streaming": True, "window": 8, "eval_size": 0}
    fields["data"] = {**data, "max_length": 40, "too_long": "drop"}
    result = fit(fields, quiet=True)
    assert result is not None
    assert result.steps == 3


@pytest.mark.parametrize("place", [3, 35])
def test_a_stream_whose_file_changed_does_not_continue_a_run(
    config: Config, root: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterlab.data.streams.FIRST", 10)
    fields = config()
    fields["data"] |= {"streaming": True, "window": 16}
    with pytest.raises(Interrupted):
        fit(fields, quiet=True, callbacks=[Stop(3)])
    lines = (root / "rows.jsonl").read_text().splitlines()
    lines[place] = '{"prompt": "1+1=", "completion": "3"}'
    (root / "rows.jsonl").unlink()  # a link to what other tests read
    (root / "rows.jsonl").write_text("\n".join(lines))
    said = r"data file .*rows\.jsonl: '[\d,]+ bytes, digest \w+' in the checkpoint, '[\d,]+ bytes, digest \w+' now"
    with pytest.raises(ConfigError, match=said):
        fit(fields, resume=True, quiet=True)


# ---------------------------------------------------------------------- the hub

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, Any]:
    """A hub with one data set, at a commit for each file of rows; `main` says which is the newest."""
    import huggingface_hub

    write_data(root / "new.jsonl", 40, seed=1)
    texts = {commit: (root / file).read_text() for commit, file in ((OLD, "rows.jsonl"), (NEW, "new.jsonl"))}
    state: dict[str, Any] = {"main": OLD, "skipped": []}

    def info(api: Any, repo: str, *, revision: str | None = None, **_: Any) -> Any:
        return type("Info", (), {"sha": revision or state["main"]})

    def rows(text: str) -> Any:
        yield from map(json.loads, text.splitlines())

    def load(path: str, name: Any, *, split: str, revision: str, streaming: bool = False) -> Any:
        given = {"text": texts[revision]}
        if not streaming:
            return datasets.Dataset.from_list([*rows(**given)])
        found = datasets.IterableDataset.from_generator(rows, gen_kwargs=given)
        skip = found.skip
        monkeypatch.setattr(found, "skip", lambda n: state["skipped"].append(n) or skip(n), raising=False)
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return state


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_a_hub_data_set_goes_on_with_the_commit_it_began_with(
    config: Config, root: Path, hub: dict[str, Any], streaming: bool
) -> None:
    fields = config()
    fields["data"] = {"path": "owner/rows", "eval_size": 8, **({"streaming": True, "window": 16} if streaming else {})}
    straight = fit({**fields, "output": str(root / "straight")}, quiet=True)
    with pytest.raises(Interrupted):
        fit(fields, quiet=True, callbacks=[Stop(7)])
    hub["main"] = NEW
    hub["skipped"].clear()
    resumed = fit(fields, resume=True, quiet=True)
    assert straight is not None
    assert resumed is not None
    assert losses(resumed.folder) == losses(straight.folder)
    facts = json.loads((resumed.folder / "run.json").read_text())
    assert facts["data"]["commits"] == {"owner/rows": OLD}
    # Seven steps of 8 rows, of 32 beside the 8 held out: window 3 is the second of the second pass.
    assert (8 + 16 in hub["skipped"]) == streaming
    other = fit({**fields, "output": str(root / "other")}, quiet=True)
    assert other is not None
    assert losses(other.folder) != losses(straight.folder), "the newest commit has other rows"


def test_a_stream_of_the_hub_is_the_stream_of_a_file(root: Path, hub: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"streaming": True, "eval_size": 4, "window": 7}
    mine, theirs = (
        load_data(DataConfig(path=path, **settings)).train for path in (str(root / "rows.jsonl"), "owner/rows")
    )
    mine.total = theirs.total = 100  # type: ignore[attr-defined]
    assert [*theirs] == [*mine]
    hub["skipped"].clear()
    other = load_data(DataConfig(path="owner/rows", **settings)).train
    other.total = 100  # type: ignore[attr-defined]
    assert [other[i] for i in (70, 3, 99, 36, 35)] == [mine[i] for i in (70, 3, 99, 36, 35)]
    assert hub["skipped"], "places in the middle are reached by skipping"
    assert [e.row for e in load_data(DataConfig(path="owner/rows", limit=9, **settings)).train.head(20)] == [
        *range(1, 10)
    ]
