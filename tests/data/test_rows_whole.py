"""What rows say is rendered, honoured, named or refused; nothing of it is lost or learnt as a word."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from templates_chatml import MARKED_CHATML, PLAIN_CHATML

import adapterlab as al
from adapterlab.compare.preparing import _line
from adapterlab.data import DataConfig, encode, load_data, prompt_of
from adapterlab.errors import DataError
from adapterlab.evaluate import generate
from adapterlab.evaluate.rows import collator_for, rows_for
from adapterlab.train.loop import Loop

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]
TALK = [
    USER,
    {**BOT, "content": "Wait.", "tool_calls": [CALL]},
    {"role": "tool", "content": "9"},
    {**BOT, "content": "Nine."},
]
# Shows tools, calls and reasoning; like published templates it drops reasoning of answers before the last question, and
# writes an empty block of it before the last answer only.
FULL = (
    "{% if tools %}<|im_start|>tools {{ tools|tojson }}<|im_end|>\n{% endif %}{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role if m.role != 'tool' else 'user' }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments|tojson }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(write_rows: Any, *rows: Any, **settings: Any) -> Any:
    return load_data(DataConfig(path=write_rows([*rows]), eval_size=0, **settings))


def encoded(write_rows: Any, tokenizer: Any, *rows: Any, **settings: Any) -> Any:
    cfg = DataConfig(path=write_rows([*rows]), eval_size=0, **settings)
    return encode(load_data(cfg).train, tokenizer, cfg, window=None)


def trained(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([i for i in row["labels"] if i >= 0]))


PART = {"type": "text", "text": "a"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x", "input": NAN, "output": "y"}, "row 1 of rows.jsonl: column 'input' is nan, not text"),
        ({"instruction": "x", "output": NAN}, "column 'output' is nan"),
        ({"instruction": "x", "output": float("inf")}, "column 'output' is inf"),
        ({"instruction": "x", "input": ["a", "b"], "output": "y"}, "column 'input' is list"),
        ({"instruction": "x", "input": True, "output": "y"}, "column 'input' is bool"),
        ({"instruction": "x", "output": ["y"]}, "columns are those of alpaca, but 'output' is list"),
        ({"question": "x", "answer": True}, "column 'answer' is bool"),
        ({"prompt": "x", "completion": "y", "system": ["s"]}, "column 'system' is list"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, USER, BOT]}, "two system messages"),
        ({"instruction": "x", "Input": "ctx", "output": "y"}, "column 'Input' is not read, but 'input' is"),
        ({"messages": [USER, BOT], "prompt": "other"}, "column 'prompt' says what the turns of this format do not"),
        ({"question": "x", "answer": "y", "text": "a passage"}, "column 'text' says"),
        ({"prompt": "x", "completion": "y", "chat_history": [["a", "b"]]}, "column 'chat_history' says"),
        ({"prompt": "x", "completion": "y", "history": ["a"]}, "column 'history' holds str"),
        ({"messages": [USER, BOT], "images": ["a.png"]}, "column 'images' holds more than text"),
        ({"messages": [USER, BOT], "functions": TOOLS}, "data.columns='{tools: functions}'"),
        ({"messages": [USER, BOT], "tools": "get_time"}, "column 'tools' is text that is not JSON"),
        ({"messages": [USER, BOT], "assistant_masks": [0, 1]}, "column 'assistant_masks' speaks of single tokens"),
        ({"messages": [USER, BOT], "weight": 0.5}, "column 'weight' weighs whole rows"),
        ({"prompt": "x", "completion": "y", "label": False}, "column 'label' says that the answer is not wanted"),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, "turn 2 (assistant) has weight=0.5"),
        ({"messages": [USER, {**BOT, "mask": 1}]}, "turn 2 (assistant) has mask=1"),
        ({"messages": [USER, {**BOT, "weight": 0}]}, "no assistant turn that answers something and is to be trained"),
        ({"messages": [USER, {**BOT, "train": True, "weight": 0}]}, "say different things"),
        ({"messages": [{**USER, "train": True}, BOT]}, "only turns of the assistant"),
        ({"messages": [{**USER, "value": "R"}, BOT]}, "'content' and 'value', which say different things"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]},
            "turn 1 (user) has a part of type 'image'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": {"text": "A"}}]}, "no text content, but dict"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_row_and_column(write_rows: Any, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        load(write_rows, row)


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"instruction": "x", "input": 0, "output": 3.0}, ["x\n\n0", "3.0"]),
        ({"instruction": "x", "input": None, "output": 10**400}, ["x", str(10**400)]),
        ({"instruction": "x", "input": "c", "output": "y", "text": "x c y"}, ["x\n\nc", "y"]),
        ({"prompt": "x", "completion": "y", "history": [["a", "b"]], "system": "s"}, ["s", "a", "b", "x", "y"]),
        ({"messages": [USER, BOT], "system": "s"}, ["s", "Q", "A"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, BOT]}, ["Q", "A"]),
        ({"messages": [USER, BOT], "prompt": "Q", "score": 3, "label": True}, ["Q", "A"]),
    ],
)
def test_what_is_understood_becomes_turns(write_rows: Any, row: Any, contents: list[str]) -> None:
    assert [m["content"] for m in load(write_rows, row).train[0].messages] == contents


def test_numbers_are_learnt_as_they_are_written(tmp_path: Any) -> None:
    (tmp_path / "r.jsonl").write_text('{"question": "x", "answer": 3.10}\n{"question": "y", "answer": 1e3}\n')
    found = load_data(DataConfig(path=str(tmp_path / "r.jsonl"), eval_size=0)).train
    assert [e.messages[-1]["content"] for e in found] == ["3.10", "1e3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", '{"prompt": "x", "completion": "y", "completion": "z"}\n', "Row 1 .*'completion' stands twice"),
        ("r.json", '[{"messages": [{"role": "user", "role": "assistant"}]}]', "'role' stands twice"),
        ("r.jsonl", '{"prompt": "x", "completion": "\\ud83d"}', "Row 1 .*half a character"),
        ("r.jsonl", '{"prompt": "x", "completion": ' + "9" * 5000 + "}", "Row 1 .*is not valid JSON"),
        ("r.csv", "prompt,completion,completion\nx,y,z\n", "'completion' stands twice"),
    ],
)
def test_names_that_stand_twice_and_half_characters_are_refused(
    tmp_path: Any, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_data(DataConfig(path=str(tmp_path / name)))


def test_tables_do_not_fill_turns_with_nulls(tmp_path: Any, make_tokenizer: Any) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": TALK, "tools": json.dumps(TOOLS)}]), path)
    cfg = DataConfig(path=str(path), eval_size=0)
    example = load_data(cfg).train[0]
    assert [*example.messages] == TALK
    assert example.context == {"tools": TOOLS}
    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "completion": datetime.date(2020, 1, 1)}]), path)
    with pytest.raises(DataError, match="'completion' is date"):
        load_data(cfg)


def test_columns_that_are_not_used_are_named(write_rows: Any) -> None:
    rows = [{"question": "Q", "answer": "A", "id": 1, "empty": None}, {"question": "Q", "answer": "A", "source": "web"}]
    columns = load(write_rows, *rows).columns
    assert (columns.used, columns.unused) == (("question", "answer"), ("id", "source"))
    assert "not used: id, source" in str(columns)
    left_out = load(write_rows, {"messages": [{**USER, "mask": 1}, BOT], "images": ["a"]}, ignore=["images", "mask"])
    assert [*left_out.train[0].messages] == [USER, BOT]


def test_the_template_sees_all_that_rows_say(write_rows: Any, make_tokenizer: Any) -> None:
    """Tools, calls, reasoning: the tokens are those of the template, and the whole answers are trained."""
    tokenizer = make_tokenizer(FULL)
    thought = [*TALK[:3], {**TALK[3], "reasoning_content": "easy"}]
    plain = {"messages": [USER, BOT]}
    found = encoded(
        write_rows, tokenizer, {"tools": TOOLS, "messages": thought}, plain, {"tools": TOOLS, "messages": TALK}
    )
    for row, (messages, tools) in zip(
        found.rows, [(thought, TOOLS), (plain["messages"], None), (TALK, TOOLS)], strict=True
    ):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    call = '[get_time {"zone": "UTC"}]'
    assert trained(tokenizer, found.rows[0]) == f"Wait.{call}<|im_end|><think>easy</think>Nine.<|im_end|>"
    assert trained(tokenizer, found.rows[2]) == f"Wait.{call}<|im_end|><think></think>Nine.<|im_end|>"


def test_arguments_given_as_text_are_not_quoted_twice(write_rows: Any, make_tokenizer: Any) -> None:
    text = {**CALL, "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    row = {"tools": TOOLS, "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [text]}]}
    tokenizer = make_tokenizer(FULL)
    found = encoded(write_rows, tokenizer, row)
    assert trained(tokenizer, found.rows[0]) == '<think></think>[get_time {"zone": "UTC"}]<|im_end|>'
    as_it_is = make_tokenizer(FULL.replace("arguments|tojson", "arguments"))
    found = encoded(write_rows, as_it_is, {"tools": TOOLS, "messages": TALK})
    assert '[get_time {"zone": "UTC"}]' in trained(as_it_is, found.rows[0])


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (PLAIN_CHATML, {"messages": [USER, BOT], "tools": TOOLS}, "row 1: column 'tools' is left out"),
        (PLAIN_CHATML, {"messages": TALK}, "row 1: call 1 of turn 2 is left out"),
        (None, {"messages": TALK}, "row 1: call 1 of turn 2 is left out"),
        (MARKED_CHATML, {"messages": [USER, {**BOT, "reasoning_content": "r"}]}, "reasoning_content of turn 2 is left"),
        (FULL, {"messages": [USER, {**BOT, "function_call": {"name": "f"}}]}, "function_call of turn 2 is left out"),
        (FULL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
         {"messages": [USER, {**BOT, "tool_calls": [CALL, CALL]}]}, "of turn 2 is left out"),
        (PLAIN_CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
         {"messages": [{"role": "system", "content": "S"}, USER, BOT]}, "turn 1 (system) is left out"),
        (PLAIN_CHATML, {"messages": [{**USER, "content": [PART, PART]}, BOT]}, "2 parts, which are written as code"),
    ],
)  # fmt: skip
def test_what_the_template_would_drop_is_refused(
    write_rows: Any, make_tokenizer: Any, template: str | None, row: Any, said: str
) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        encoded(write_rows, make_tokenizer(template), row)
    if "tools" in row:
        assert len(encoded(write_rows, make_tokenizer(template), row, ignore=["tools"]).rows) == 1


def test_what_may_be_missing_is_named(write_rows: Any, make_tokenizer: Any) -> None:
    early = [USER, {**BOT, "reasoning_content": "r"}, USER, {**BOT, "reasoning_content": "s", "lang": "en"}]
    report = encoded(write_rows, make_tokenizer(FULL), {"messages": early}).report
    assert report.unshown == ("reasoning_content of some turns", "lang")


@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED_CHATML], ids=["diffed", "marked"])
@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
def test_flags_say_which_turns_are_trained(write_rows: Any, make_tokenizer: Any, template: str, flag: str) -> None:
    tokenizer = make_tokenizer(template)
    turns = [USER, {**BOT, "content": "first", flag: 0}, USER, {**BOT, "content": "second", flag: 1}, USER]
    tail = {**BOT, "content": "third", flag: False}
    found = encoded(write_rows, tokenizer, {"messages": [*turns, tail]})
    assert trained(tokenizer, found.rows[0]) == "second<|im_end|>"
    with pytest.raises(DataError, match=f"{flag}=false, but data.train_on=all"):
        encoded(write_rows, tokenizer, {"messages": turns}, train_on="all")


def test_answers_within_a_prompt_are_not_the_completion(write_rows: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": [USER, {**BOT, "content": "given"}, USER], "completion": [BOT]}
    assert trained(tokenizer, encoded(write_rows, tokenizer, row).rows[0]) == "A<|im_end|>"


def test_a_comparison_writes_rows_down_whole(write_rows: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(FULL)
    row = {"tools": TOOLS, "messages": [USER, {**BOT, "train": False}, *TALK]}
    first = load(write_rows, row).train[0]
    again = load(write_rows, json.loads(_line(first))).train[0]
    assert (again.messages, again.context, again.trained) == (first.messages, first.context, first.trained)
    assert prompt_of(again, tokenizer, DataConfig(path="x")) == prompt_of(first, tokenizer, DataConfig(path="x"))


def test_answers_that_call_tools_are_not_scored(write_rows: Any) -> None:
    assert load(write_rows, {"messages": TALK[:2]}).train[0].answer is None


@pytest.mark.parametrize("added", ["prompt", "completion"])
def test_tokens_beyond_the_tables_are_found_before_the_first_step(
    write_rows: Any, make_tokenizer: Any, tiny: Any, added: str
) -> None:
    model, tokenizer = tiny("llama"), make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.add_tokens(["<new>"])
    cfg = DataConfig(
        path=write_rows([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y", added: "<new>"}])
    )
    with pytest.raises(
        DataError, match=rf"Row 2 has the token {len(tokenizer) - 1}, '<new>', but the model's embedding"
    ):
        rows_for(model, tokenizer, load_data(cfg).train, cfg)
    with pytest.raises(DataError, match="Row 1 has the token"):
        generate(model, tokenizer, ["<new>"], max_new_tokens=2)
    host = al.attach(model, al.LoRA(r=2, targets=["q"]))
    with pytest.raises(DataError, match="Row 1 has the token"):
        Loop(host, "default", [{"input_ids": [1, len(tokenizer) - 1], "labels": [-100, 1]}])


def test_a_padding_token_that_the_model_does_not_have_is_not_used(make_tokenizer: Any, tiny: Any) -> None:
    model, tokenizer = tiny("llama"), make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    plain = generate(model, tokenizer, ["How many", "x"], max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "<other>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert generate(model, tokenizer, ["How many", "x"], max_new_tokens=4) == plain
    assert collator_for(model, tokenizer).pad_token_id == 0
