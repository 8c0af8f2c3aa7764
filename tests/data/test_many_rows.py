"""Rows that stay on the disk are the rows that memory would hold: the same examples, tokens, reports and refusals."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterlab.data import DataConfig, fingerprint, load_data
from adapterlab.data.formats import Examples
from adapterlab.data.tables import Table
from adapterlab.data.views import Joined, Picked
from adapterlab.errors import DataError, OutputError
from adapterlab.evaluate import filling, prepared, shards
from adapterlab.evaluate.lengths import by_length, lengths_of, longest_of
from adapterlab.evaluate.prepared import Prepared, Recipe, Store, key_of
from adapterlab.evaluate.rows import rows_for

datasets = pytest.importorskip("datasets")
ROWS = [
    {"prompt": f"How many, {i}?\n2020-01-{i % 28 + 1:02d}", "completion": f"There are {i}, €", "n": i % 3}
    for i in range(60)
]


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def many(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From here on ten rows are many; with `held`, files of any size stay on the disk."""

    def begin(*, on_disk: bool = True) -> None:
        monkeypatch.setattr("adapterlab.data.sources.HELD", 0 if on_disk else 1 << 20)
        for module in ("data.sources", "data.splits", "evaluate.rows"):
            monkeypatch.setattr(f"adapterlab.{module}.FEW", 10)
        monkeypatch.setattr(prepared, "SIZE", 8)
        monkeypatch.setattr(prepared, "SAMPLE", 5)
        monkeypatch.setattr(filling, "helpers", lambda: 0)
        monkeypatch.setattr(prepared, "helpers", lambda: 0)

    return begin


def written(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), "utf-8")
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows))
    elif kind == "saved":
        file = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    else:
        file = folder / "*part.jsonl"
        for i in range(3):
            (folder / f"{i}-part.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[20 * i : 20 * i + 20]))
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "saved", "pattern"])
def test_what_stays_on_the_disk_is_what_memory_would_hold(tmp_path: Path, many: Any, kind: str) -> None:
    cfg = DataConfig(path=written(tmp_path, kind), limit=None if kind != "csv" else 50)
    held = load_data(cfg)
    many()
    kept = load_data(cfg)
    assert isinstance(kept.train, Picked)
    assert isinstance(kept.train.whole, Examples)
    assert [*kept.train] == [*held.train]
    assert [*kept.eval] == [*held.eval]
    assert (kept.format, kept.columns) == (held.format, held.columns)
    assert kept.overlap == held.overlap == 0
    assert isinstance(kept.train.whole.rows, Table), "nothing was read into a list"
    again = load_data(cfg)
    assert fingerprint(Joined([again.train, again.eval])) == fingerprint(Joined([kept.train, kept.eval]))


def test_texts_are_kept_as_they_are_written(tmp_path: Path, many: Any) -> None:
    """What readers of tables change: numbers, dates, objects with other fields, columns with other types."""
    lines = [
        '{"question": "x", "answer": 3.10}',
        '{"question": "2020-01-01T00:00:00", "answer": "y", "more": [1, "a"]}',
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines * 10))
    many()
    found = load_data(DataConfig(path=str(tmp_path / "r.jsonl"), eval_size=0)).train
    assert [m["content"] for e in found[:2] for m in e.messages or ()] == ["x", "3.10", "2020-01-01T00:00:00", "y"]


def test_another_file_under_the_same_name_is_read_anew(tmp_path: Path, many: Any) -> None:
    many()
    cfg = DataConfig(path=written(tmp_path, "jsonl"))
    before = load_data(cfg)
    written(tmp_path, "jsonl", [{**row, "completion": "other"} for row in ROWS])
    after = load_data(cfg)
    assert {e.answer for e in after.train} == {"other"}
    assert fingerprint(before.train) != fingerprint(after.train)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n' * 30 + '{"text": \n', r"Row 31 of .*rows\.jsonl is not valid JSON.*Received: '\{\"text\":'"),
        ('{"text": "a"}\n' * 30 + "[1]\n", "Row 31 of .* is a list"),
        ('{"text": "a"}\n' * 30 + '{"text": null}\n', r"row 31 of rows\.jsonl: column 'text' is null"),
        ('{"text": "a"}\n' * 30 + '{"text": "\\ud83d"}\n', "Row 31 .*half a character"),
    ],
)
def test_a_bad_row_is_named_when_its_turn_comes(
    tmp_path: Path, many: Any, content: str, said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("adapterlab.data.formats._LOOKED_AT", 20)
    monkeypatch.setattr("adapterlab.data.formats._DECIDING", 20)
    many()
    (tmp_path / "rows.jsonl").write_text(content)
    found = load_data(DataConfig(path=str(tmp_path / "rows.jsonl"), eval_size=0)).train
    assert found[29].text == "a"
    with pytest.raises(DataError, match=said):
        found[30]


def test_two_runs_that_keep_the_same_rows_wait_for_each_other(tmp_path: Path, many: Any) -> None:
    many()
    cfg = DataConfig(path=written(tmp_path, "jsonl"))
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: [*load_data(cfg).train], range(4))]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_damaged_table_is_made_anew(tmp_path: Path, many: Any) -> None:
    many()
    cfg = DataConfig(path=written(tmp_path, "jsonl"))
    before = [*load_data(cfg).train]
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert [*load_data(cfg).train] == before


def test_a_file_that_is_no_text_is_refused_at_once(tmp_path: Path, many: Any) -> None:
    many()
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' * 20 + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"Row 21 of .*utf-8"):
        load_data(DataConfig(path=str(tmp_path / "rows.jsonl")))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, many: Any, monkeypatch: Any) -> None:
    import errno

    many()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(OutputError, match=r"No space left on device(.|\n)*HF_DATASETS_CACHE(.|\n)*data\.streaming"):
        load_data(DataConfig(path=written(tmp_path, "jsonl")))


# ---------------------------------------------------------------------- token rows


def both(tmp_path: Path, many: Any, model: Any, tokenizer: Any, **settings: Any) -> tuple[Any, Any]:
    """Encoded at once, and when asked for."""
    cfg = DataConfig(path=written(tmp_path, "jsonl"), **settings)
    once = rows_for(model, tokenizer, load_data(cfg).train, cfg)
    many()
    return once, rows_for(model, tokenizer, load_data(cfg).train, cfg)


@pytest.fixture
def model(tiny: Any, make_tokenizer: Any) -> Any:
    found = tiny("llama")
    found.resize_token_embeddings(len(make_tokenizer()))
    return found


def test_rows_made_when_asked_for_are_those_made_at_once(
    tmp_path: Path, many: Any, model: Any, make_tokenizer: Any, monkeypatch: Any
) -> None:
    once, later = both(tmp_path, many, model, make_tokenizer())
    rows = later.rows
    assert isinstance(rows, Prepared)
    assert later.report.pending == len(rows) - 5
    assert [*rows[7:9], rows[0], rows[-1]] == [*once.rows[7:9], once.rows[0], once.rows[-1]]
    assert not [*rows.store.shards.folder.parent.rglob("*.rows")], "no file was made for them"
    assert [*lengths_of(rows)] == [*lengths_of(rows, now=True)] == lengths_of(once.rows)
    assert by_length(rows) == by_length(once.rows)
    assert longest_of(rows) >= longest_of(once.rows)
    assert [*rows] == [*once.rows]
    assert rows.report() == once.report
    # Whoever comes later encodes nothing.
    monkeypatch.setattr(Recipe, "made", None)
    store = Store(rows.store.examples, rows.store.recipe)
    assert [*Prepared(store, rows.places)] == [*once.rows]


@pytest.mark.parametrize("length", [64, 70])
def test_dropped_rows_are_left_out_everywhere(
    tmp_path: Path, many: Any, model: Any, make_tokenizer: Any, length: int
) -> None:
    rows = [{**row, "prompt": row["prompt"] + "?" * (60 if i % 4 else 0)} for i, row in enumerate(ROWS)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(path=str(tmp_path / "x.jsonl"), max_length=length, too_long="drop")
    once = rows_for(model, make_tokenizer(), load_data(cfg).train, cfg)
    many()
    later = rows_for(model, make_tokenizer(), load_data(cfg).train, cfg)
    assert once.report.dropped > 30
    assert [*later.rows] == [*once.rows]
    assert [*later.kept] == [*once.kept]
    assert later.report == once.report


def test_the_key_is_of_rows_tokenizer_template_and_settings(
    tmp_path: Path, many: Any, model: Any, make_tokenizer: Any
) -> None:
    many()

    def key(tokenizer: Any, rows: list[dict[str, Any]] = ROWS, name: str = "a", **settings: Any) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        cfg = DataConfig(path=written(tmp_path / name, "jsonl", rows), **settings)
        found = rows_for(model, tokenizer, load_data(cfg).train, cfg).rows
        return key_of(found.store.examples, found.store.recipe)

    first = key(make_tokenizer())
    assert key(make_tokenizer(), name="b", seed=3, eval_size=4) == first, "where they are, and who is held out"
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|im_end|> ")
    added = make_tokenizer()
    added.add_tokens(["many"])
    keys = [
        key(other), key(make_tokenizer(bos=True)), key(make_tokenizer(), ROWS[1:]), key(make_tokenizer(), system="S"),
        key(make_tokenizer(), max_length=900), key(make_tokenizer(), train_on="all"),
    ]  # fmt: skip
    assert len({first, *keys, prepared.tokenizer_key(added), prepared.tokenizer_key(make_tokenizer())}) == 9


def test_damaged_files_are_made_anew_and_a_full_disk_loses_nothing(
    tmp_path: Path, many: Any, model: Any, make_tokenizer: Any, monkeypatch: Any, capsys: Any
) -> None:
    once, later = both(tmp_path, many, model, make_tokenizer())
    later.rows.all_lengths()
    folder = later.rows.store.shards.folder
    files = sorted(folder.glob("*.rows"))
    files[1].write_bytes(files[1].read_bytes()[:-9] + b"x" * 9)
    files[2].write_bytes(b"")
    fresh = Prepared(Store(later.rows.store.examples, later.rows.store.recipe), later.rows.places)
    assert [*fresh] == [*once.rows]
    assert capsys.readouterr().err.count("is made anew") == 2

    def full(*args: Any) -> None:
        raise OutputError("The disk is full.")

    monkeypatch.setattr(shards, "new_file", full)
    fresh.all_lengths()
    assert "not kept for other runs. The disk is full" in capsys.readouterr().err.replace("\n", " ")
    assert [*fresh] == [*once.rows]
    assert fresh.report() == once.report


def test_tokens_beyond_the_tables_are_found_before_the_first_step(
    tmp_path: Path, many: Any, model: Any, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    many()
    cfg = DataConfig(path=written(tmp_path, "jsonl", [*ROWS, {"prompt": "x", "completion": "<new>"}]), eval_size=0)
    with pytest.raises(DataError, match=r"Row 121 has the token .*'<new>'"):  # each second line is blank
        rows_for(model, tokenizer, load_data(cfg).train, cfg)


def test_processes_beside_fill_the_files_and_tell_what_is_wrong(
    tmp_path: Path, caches: Path, model: Any, make_tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(filling, "helpers", lambda: 1)
    monkeypatch.setattr(prepared, "helpers", lambda: 1)
    for module in ("data.splits", "evaluate.rows"):
        monkeypatch.setattr(f"adapterlab.{module}.FEW", 10)
    monkeypatch.setattr(prepared, "SIZE", 8)
    monkeypatch.setattr(prepared, "SAMPLE", 5)
    monkeypatch.setattr("adapterlab.data.formats._LOOKED_AT", 20)
    cfg = DataConfig(path=written(tmp_path, "jsonl", [*ROWS, {"prompt": "x"}]), eval_size=0)
    rows = rows_for(model, make_tokenizer(), load_data(cfg).train, cfg).rows
    with prepared.beside(rows):
        end = time.monotonic() + 200  # a process takes long to start where others compute
        with pytest.raises(DataError, match="column 'completion' is missing"):  # noqa: PT012
            while time.monotonic() < end:
                rows[0]
                time.sleep(0.05)
    assert [rows.store.shards.has(number) for number in range(8)] == [True] * 7 + [False]
    assert sorted(file.name for file in rows.store.shards.folder.iterdir()) == [f"{i:06d}.rows" for i in range(7)]
