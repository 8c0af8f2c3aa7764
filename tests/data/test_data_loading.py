from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from adapterlab.data import DataConfig, fingerprint, load_data
from adapterlab.errors import ConfigError, DataError

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
USER = {"role": "user", "content": "Q"}
BOT = {"role": "assistant", "content": "A"}
PAIR = [("user", "Q"), ("assistant", "A")]


def turns(example):
    return [(m["role"], m["content"]) for m in example.messages]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"messages": [USER, BOT]}, "messages", PAIR),
        ({"messages": [USER, BOT], "text": "Q A"}, "messages", PAIR),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": 3},
            "sharegpt",
            PAIR,
        ),
        ({"conversations": [USER, BOT], "system": "S"}, "sharegpt", [("system", "S"), *PAIR]),
        ({"instruction": "Q", "output": "A"}, "alpaca", PAIR),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", PAIR),
        ({"instruction": "Q", "input": "X", "output": "A"}, "alpaca", [("user", "Q\n\nX"), ("assistant", "A")]),
        ({"prompt": "Q", "completion": "A"}, "prompt-completion", PAIR),
        ({"prompt": [USER], "completion": [BOT]}, "prompt-completion", PAIR),
        ({"question": "Q", "answer": "A", "source": None}, "question-answer", PAIR),
        ({"question": "Q", "answer": 7}, "question-answer", [("user", "Q"), ("assistant", "7")]),
        ({"messages": [USER, BOT, USER]}, "messages", PAIR),
    ],
)
def test_formats_are_told_from_columns(write_rows, row, name, expected):
    splits = load_data(DataConfig(path=write_rows([row])))
    assert splits.format == name
    assert turns(splits.train[0]) == expected


def test_plain_text_rows(write_rows):
    splits = load_data(DataConfig(path=write_rows([{"text": "one"}, {"text": "two"}])))
    assert splits.format == "text"
    assert [(e.text, e.messages, e.answer) for e in splits.train] == [("one", None, None), ("two", None, None)]


def test_columns_rename_and_decide_the_format(write_rows):
    path = write_rows([{"question": "Q", "answer": "A"}])
    splits = load_data(DataConfig(path=path, columns={"prompt": "question", "completion": "answer"}, system="S"))
    assert splits.format == "prompt-completion"
    assert turns(splits.train[0]) == [("system", "S"), *PAIR]


def test_a_row_keeps_its_own_system_message(write_rows):
    rows = [{"messages": [{"role": "system", "content": "own"}, USER, BOT]}]
    assert turns(load_data(DataConfig(path=write_rows(rows), system="S")).train[0])[0] == ("system", "own")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"foo": "Q", "bar": "A"}, ["fits no known format", "foo, bar", "instruction, output", "data.columns"]),
        (
            {"prompt": "Q", "completion": "A", "question": "Q", "answer": "A"},
            ["more than one format (prompt-completion, question-answer)", "data.format"],
        ),
        ({"messages": "not a list"}, ["fits no known format", "Columns found: messages"]),
    ],
)
def test_unclear_layouts_name_columns_and_formats(write_rows, row, said):
    with pytest.raises(DataError) as error:
        load_data(DataConfig(path=write_rows([row])))
    assert all(words in str(error.value) for words in said), error.value


def test_bad_rows_are_counted_and_numbered(write_rows):
    good = {"prompt": "Q", "completion": "A"}
    rows = [good, {"prompt": "Q"}, {"prompt": "Q", "completion": None}, {"prompt": " ", "completion": "A"}, {}, good]
    rows += [{"prompt": "Q", "completion": ""}] * 3 + [{"completion": "A"}]
    with pytest.raises(DataError) as error:
        load_data(DataConfig(path=write_rows(rows)))
    message = str(error.value)
    assert message.startswith("8 of 10 rows cannot be used as 'prompt-completion'")
    assert "row 2 of rows.jsonl: column 'completion' is missing" in message
    assert "row 3 of rows.jsonl: column 'completion' is null" in message
    assert "row 4 of rows.jsonl: column 'prompt' is empty" in message
    assert "row 5 of rows.jsonl: the row is empty" in message
    assert "and 3 more" in message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER], "no assistant turn"),
        ([BOT], "no assistant turn"),
        ([USER, {"role": "robot", "content": "A"}], "role 'robot'"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 (assistant) has no text"),
        ([USER, "A"], "turn 2 is str"),
        ([], "is empty"),
    ],
)
def test_bad_conversations_are_named(write_rows, messages, said):
    with pytest.raises(DataError, match=re.escape(said)):
        load_data(DataConfig(path=write_rows([{"messages": messages}])))


def test_malformed_jsonl_names_file_and_row(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(DataError, match=r"Row 3 of .*broken\.jsonl is not valid JSON.*Received: '\{\"text\": \"b\"'"):
        load_data(DataConfig(path=str(path)))
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"Row 2 of .*utf-8"):
        load_data(DataConfig(path=str(path)))
    path.write_text('{"text": "a"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"Row 2 of .* is a list"):
        load_data(DataConfig(path=str(path)))


def test_all_file_kinds_give_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f'Wie, "viel"\n{i}?', "completion": f"ä{i}, €"} for i in range(12)]
    (tmp_path / "r.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "w.json").write_text(json.dumps({"version": 1, "data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"r.{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    expected = [[("user", r["prompt"]), ("assistant", r["completion"])] for r in rows]
    for name in ("r.jsonl", "r.json", "w.json", "r.parquet", "r.csv", "r.tsv"):
        got = load_data(DataConfig(path=str(tmp_path / name), eval_size=0)).train
        assert [turns(e) for e in got] == expected, name


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "prompt,completion\nQ,A\nQ,A,B\n", "Row 2 of .* has more values"),
        ("a.csv", "prompt,completion\nQ\n", "Row 1 of .* has fewer values"),
        ("a.json", '{"a": 1}', "one object with 0 lists"),
        ("a.json", '{"prompt": "Q"}\n{"prompt": "Q"}', r"name it a\.jsonl"),
        ("a.parquet", "nonsense", "cannot be read as Parquet"),
        ("a.xlsx", "nonsense", r"suffix '\.xlsx'.*\.jsonl"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "prompt,completion\n", "holds no rows"),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_data(DataConfig(path=str(tmp_path / name)))


def test_missing_file_names_its_neighbours(write_rows):
    path = write_rows([{"text": "a"}], "training.jsonl")
    with pytest.raises(DataError, match=r"no file or folder '.*trainnig\.jsonl'.*Nearest: training\.jsonl"):
        load_data(DataConfig(path=path.replace("training", "trainnig")))


def test_folders_hold_splits(tmp_path, write_rows):
    write_rows([{"text": "a"}, {"text": "b"}], "train-0.jsonl")
    write_rows([{"text": "c"}], "train-1.jsonl")
    write_rows([{"text": "z"}], "test.jsonl")
    splits = load_data(DataConfig(path=str(tmp_path), eval_split="test"))
    assert [e.text for e in splits.train] == ["a", "b", "c"]
    assert [e.text for e in splits.eval] == ["z"]
    with pytest.raises(DataError, match=r"split's name 'tets'.*Nearest: test"):
        load_data(DataConfig(path=str(tmp_path), eval_split="tets"))
    with pytest.raises(DataError, match="one file and has no split 'test'"):
        load_data(DataConfig(path=str(tmp_path / "test.jsonl"), eval_split="test"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Neither the hub nor the cache knows anything of a data set."""
    import datasets
    from huggingface_hub import HfApi

    def fail(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'owner/rows' on the Hub")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return fail


def test_hub_failure_points_to_local_files(monkeypatch, offline):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'owner/rows' \(split 'train'\).*Couldn't reach.*set data\.path to the local"):
        load_data(DataConfig(path="owner/rows"))


@pytest.mark.usefixtures("offline")
def test_hub_rows_and_splits(monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"question": f"{split} {i}", "answer": str(i)} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_data(DataConfig(path="openai/gsm8k", name="main", eval_split="test", limit=3, eval_limit=2))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [e.prompt for e in splits.train] == ["train 0", "train 1", "train 2"]
    assert [e.prompt for e in splits.eval] == ["test 0", "test 1"]


def test_held_out_rows_are_a_deterministic_partition(write_rows):
    path = write_rows([{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(60)])
    first, again, other = (load_data(DataConfig(path=path, seed=s)) for s in (1, 1, 2))
    assert (first.train, first.eval) == (again.train, again.eval)
    assert first.eval != other.eval
    assert len(first.eval) == 6
    assert sorted(e.row for e in first.train + first.eval) == list(range(1, 61))
    assert [e.row for e in first.train] == sorted(e.row for e in first.train)
    for size, count in ((0, 0), (7, 7), (0.25, 15)):
        assert len(load_data(DataConfig(path=path, eval_size=size)).eval) == count
    assert len(load_data(DataConfig(path=path, eval_size=7, eval_limit=3)).eval) == 3
    assert [e.row for e in load_data(DataConfig(path=path, limit=5)).train] == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="eval_size=60 leaves none of the 60 rows"):
        load_data(DataConfig(path=path, eval_size=60))


def test_default_held_out_size_has_a_ceiling(write_rows):
    path = write_rows([{"text": str(i)} for i in range(2500)])
    assert len(load_data(DataConfig(path=path)).eval) == 200


def test_overlap_is_counted_by_prompt(write_rows):
    train = write_rows([{"prompt": p, "completion": "x"} for p in ("a  b", "c", "d")])
    other = write_rows([{"prompt": p, "completion": "y"} for p in ("a b", "d", "d", "e")], "eval.jsonl")
    splits = load_data(DataConfig(path=train, eval_path=other))
    assert (splits.overlap, len(splits.train), len(splits.eval)) == (3, 3, 4)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K rows are not here")
def test_gsm8k_references_are_the_final_numbers():
    splits = load_data(DataConfig(path=str(GSM8K / "train.jsonl"), eval_path=str(GSM8K / "test.jsonl")))
    assert (len(splits.train), len(splits.eval), splits.format) == (7473, 1319, "question-answer")
    for line, example in zip((GSM8K / "train.jsonl").open(encoding="utf-8"), splits.train, strict=True):
        row = json.loads(line)
        assert example.messages[-1]["content"] == row["answer"]
        assert example.answer == row["answer"].split("#### ")[1].strip().replace(",", "")


def test_a_heading_with_four_hashes_is_no_final_number(write_rows):
    rows = [{"prompt": "Q", "completion": "Notes\n#### Summary of 3"}]
    assert load_data(DataConfig(path=write_rows(rows))).train[0].answer == "Notes\n#### Summary of 3"


SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def test_generated_questions_are_disjoint_and_deterministic():
    cfg = DataConfig(task="chain_sum", task_args=SUM, limit=1500, eval_size=150, system="S")
    splits = load_data(cfg)
    questions = {e.prompt for e in splits.train}
    assert (len(splits.train), len(splits.eval), len({e.prompt for e in splits.eval})) == (1500, 150, 150)
    assert not questions & {e.prompt for e in splits.eval}
    assert splits.replaced > 0, "with so few questions some have to be replaced"
    assert splits.train[0].messages[0] == {"role": "system", "content": "S"}
    for example in splits.train[:50]:
        expression = example.messages[1]["content"].split(":")[1].removesuffix("=")
        assert eval(expression) == int(example.answer)
    again = load_data(cfg)
    assert fingerprint(again.train) == fingerprint(splits.train)
    assert fingerprint(again.eval) == fingerprint(splits.eval)
    other = load_data(cfg.model_copy(update={"seed": 1}))
    assert sum(a.prompt == b.prompt for a, b in zip(other.train[1:], splits.train, strict=False)) < 100


def test_a_task_with_few_questions_leaves_most_of_them_for_training():
    args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 questions exist
    splits = load_data(DataConfig(task="chain_sum", task_args=args))
    held = {e.prompt for e in splits.eval}
    assert len(splits.train) == 2000
    assert 30 <= len(held) == len(splits.eval) <= 40
    assert not held & {e.prompt for e in splits.train}


@pytest.mark.parametrize(
    ("task", "args", "said"),
    [
        ("chain_smu", {}, "no reasoning-gym task. Nearest: chain_sum"),
        ("chain_sum", {"min_term": 2}, "no argument 'min_term' (data.task_args). Nearest: min_terms"),
        ("chain_sum", {"min_terms": 0}, "data.task_args={'min_terms': 0} is not valid"),
        ("chain_sum", {"min_terms": "two"}, "'two'"),
        ("chain_sum", {"seed": 1}, "set data.seed instead"),
    ],
)
def test_task_errors_name_the_valid_choices(task, args, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_data(DataConfig(task=task, task_args=args))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly one of path"),
        ({"path": "a.jsonl", "task": "chain_sum"}, "path='a.jsonl' and task='chain_sum'"),
        ({"path": "a.jsonl", "task_args": {"x": 1}}, "needs a task"),
        ({"task": "chain_sum", "columns": {"prompt": "q"}}, "columns cannot be used with task"),
        ({"path": "a.jsonl", "columns": {"promt": "q"}}, "Nearest: prompt"),
        ({"path": "a.jsonl", "eval_size": 1.5}, "less than 1"),
        ({"path": "a.jsonl", "eval_size": -1}, "greater than or equal to 0"),
        ({"path": "a.jsonl", "eval_size": 5, "eval_path": "b.jsonl"}, "use eval_limit"),
        ({"path": "a.jsonl", "max_lenght": 5}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        DataConfig(**fields)


def test_every_setting_is_described():
    assert all(field.description for field in DataConfig.model_fields.values())


def test_wrong_renaming_names_the_columns(write_rows):
    path = write_rows([{"query": "Q", "reply": "A"}])
    with pytest.raises(DataError, match=r"names 'qurey' for 'prompt'.*Nearest: query"):
        load_data(DataConfig(path=path, columns={"prompt": "qurey", "completion": "reply"}))


def test_fingerprint_sees_every_change(write_rows):
    rows = [{"messages": [USER, BOT]}, {"messages": [{**USER, "content": "Q2"}, BOT]}]
    variants = [
        rows,
        rows[::-1],
        rows[:1],
        [rows[0], {"messages": [USER, {**BOT, "content": "A "}]}],
        [rows[0], {"messages": [{"role": "system", "content": "S"}, USER, BOT]}],
    ]
    prints = [fingerprint(load_data(DataConfig(path=write_rows(v))).train) for v in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint(load_data(DataConfig(path=write_rows(rows, "other-name.jsonl"))).train) == prints[0]


def test_settings_load_without_heavy_imports():
    code = "import sys; from adapterlab.data import DataConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
