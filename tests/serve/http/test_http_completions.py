"""OpenAI's own client against the server: what it sends is understood, and what comes back is what it expects."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from http_servers import ASK, Server, post  # noqa: E402

from adapterlab.errors import FormatError  # noqa: E402
from adapterlab.serve.http.prompts import template_in  # noqa: E402

FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def test_models_are_the_base_and_its_adapters(server: Server) -> None:
    found = list(server.openai().models.list())
    assert [model.id for model in found] == ["base", "sums", "team/words"]
    assert server.openai().models.retrieve("team/words").parent == "base"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["base", "sums", "team/words"])
def test_the_model_that_is_named_answers(server: Server, name: str) -> None:
    answer = server.openai().chat.completions.create(model=name, messages=ASK, temperature=0)
    length = 5  # four characters, and the mark behind a turn, in both templates
    assert answer.choices[0].message.content == f"{name.replace('/', '+')} {length} 0"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == name
    assert answer.usage.prompt_tokens == length
    assert answer.usage.completion_tokens == len(f"{name} {length} 0")


@pytest.mark.parametrize("body", [{"model": "base", "adapter_id": "sums"}, {"adapter_id": "sums"}, {"model": "sums"}])
def test_an_adapter_is_named_as_other_servers_do(server: Server, body: dict[str, Any]) -> None:
    status, found, _ = post(server, "/v1/completions", {**body, "prompt": "1"})
    assert (status, found["choices"][0]["text"]) == (200, "sums 1 0")


def test_streams_say_the_same_in_pieces(server: Server) -> None:
    options = {"include_usage": True}
    stream = server.openai().chat.completions.create(
        model="sums", messages=ASK, n=2, stream=True, stream_options=options
    )
    texts, ends, used = ["", ""], {}, None
    for chunk in stream:
        used = chunk.usage or used
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == ["sums 5 0", "sums 5 1"]
    assert ends == {0: "stop", 1: "stop"}
    assert (used.prompt_tokens, used.completion_tokens) == (5, 16)


def test_many_prompts_and_answers_keep_their_order(server: Server) -> None:
    found = server.openai().completions.create(model="base", prompt=["1", "1+1"], n=2)
    assert [choice.text for choice in found.choices] == ["base 1 0", "base 1 1", "base 3 0", "base 3 1"]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 4


def test_prompts_may_be_tokens_and_answers_are_as_short_as_asked(server: Server) -> None:
    found = server.openai().completions.create(model="base", prompt=[[5, 6, 7]], max_tokens=4)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("base", "length")


def test_log_probabilities_in_both_shapes(server: Server) -> None:
    chat = server.openai().chat.completions.create(
        model="base", messages=ASK, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    entries = chat.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["b", "a", "s"]
    assert (entries[0].logprob, len(entries[0].top_logprobs), entries[0].bytes) == (-0.5, 2, [98])
    text = server.openai().completions.create(model="base", prompt="1", logprobs=1, max_tokens=3).choices[0].logprobs
    assert (text.tokens, text.text_offset, text.token_logprobs) == (["b", "a", "s"], [0, 1, 2], [-0.5] * 3)


def test_all_settings_reach_the_engine(server: Server) -> None:
    body = {
        "model": "base", "prompt": "1", "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "min_p": 0.1, "seed": -1, "stop": ["x"], "stop_token_ids": [4], "ignore_eos": True, "presence_penalty": 1,
        "frequency_penalty": 2, "repetition_penalty": 1.5, "logit_bias": {"7": -100}, "logprobs": 1,
    }  # fmt: skip
    assert post(server, "/v1/completions", body)[0] == 200
    assert server.engine.handles[-1].request.sampling.model_dump() == {
        "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 2**32 - 1,
        "stop": ("x",), "stop_ids": (4,), "ignore_end": True, "presence_penalty": 1.0, "frequency_penalty": 2.0,
        "repetition_penalty": 1.5, "bias": {7: -100.0}, "logprobs": 1,
    }  # fmt: skip


def test_nothing_but_an_error_comes_for_what_is_not_there(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="nowhere"):
        server.openai().chat.completions.create(model="nowhere", messages=ASK)
    server.engine.broken["sums"] = "its tensors are not finite"
    try:
        with pytest.raises(openai.BadRequestError, match="not finite"):
            server.openai().chat.completions.create(model="sums", messages=ASK)
    finally:
        server.engine.broken.clear()


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({"prompt": "1", "max_token": 3}, ["'max_token' is not known here", "max_tokens"]),
        ({"prompt": "1", "temperature": "warm"}, ["temperature = 'warm' is not valid"]),
        ({"prompt": "1", "temperature": 1000}, ["temperature", "less than or equal to 100"]),
        ({"prompt": "1", "max_tokens": 10**9}, ["limits.answer_tokens"]),
        ({"prompt": "1", "n": 64}, ["limits.answers"]),
        ({"prompt": "1", "model": "sums", "adapter_id": "team/words"}, ["name two adapters"]),
        ({"prompt": "1", "stream_options": {"include_usage": True}}, ["set stream to true"]),
        ({"prompt": "1", "response_format": {"type": "json_schema"}}, ["json_schema exactly where"]),
        ({}, ["prompt"]),
        (b'{"prompt": ', ["JSON"]),
        (b"[" * 100_000, []),
    ],
)
def test_what_is_not_understood_is_named(server: Server, body: Any, parts: list[str]) -> None:
    status, found, _ = post(server, "/v1/completions", body)
    assert status == 400
    assert found["error"]["type"] == "invalid_request_error"
    for part in parts:
        assert part in found["error"]["message"]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "type"),
        ({"tools": [{"type": "function", "function": {"name": "find"}}]}, "'tools' is left out"),
        ({"tool_choice": "required"}, "none are given"),
        ({"tool_choice": "sometimes"}, "tool_choice = 'sometimes' is not valid"),
        ({"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "fnd"}}}, "Nearest: find"),
        ({"tools": [FIND], "tool_choice": "required", "response_format": {"type": "json_object"}}, "give one of them"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]}, "JSON schema"),
    ],
)
def test_what_a_conversation_cannot_say_is_refused(server: Server, more: dict[str, Any], part: str) -> None:
    status, found, _ = post(server, "/v1/chat/completions", {"model": "base", "messages": ASK, **more})
    assert status == 400
    assert part in found["error"]["message"]


def test_fields_without_effect_are_named(server: Server) -> None:
    status, _, headers = post(server, "/v1/completions", {"prompt": "1", "user": "me", "metadata": {"a": "b"}})
    assert (status, headers["X-Without-Effect"]) == (200, "user, metadata")


def test_an_adapter_brings_its_own_template_with_tools(server: Server) -> None:
    tools = [FIND]
    server.openai().chat.completions.create(model="team/words", messages=ASK, tools=tools)
    plain = len("1+1=>")
    assert len(server.engine.handles[-1].request.prompt) > plain + len("find")
    server.openai().chat.completions.create(model="team/words", messages=ASK, tools=tools, tool_choice="none")
    assert len(server.engine.handles[-1].request.prompt) == plain


def test_templates_are_found_wherever_folders_have_them(tmp_path: Path) -> None:
    assert template_in(tmp_path) is None
    file = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for value, found in (("x", "x"), (named, "d"), (named[:1], None), (None, None)):
        file.write_text(json.dumps({"chat_template": value}))
        assert template_in(tmp_path) == found
    file.write_text(json.dumps({"chat_template": {"default": 1}}))
    with pytest.raises(FormatError, match="is no text"):
        template_in(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("j")
    assert template_in(tmp_path) == "j"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_call_cannot_be_required_without_what_keeps_answers_to_it(
    server: Server, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'adapterlab\[structured\]'"):
        server.openai().chat.completions.create(model="team/words", messages=ASK, tools=[FIND], tool_choice=choice)
