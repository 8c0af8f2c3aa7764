"""The whole way, with a model: what the API answers is what the adapter says alone, and strangers break nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from http_servers import ASK, Server, ask, post
from test_http_faults import FIELDS, PLACES, VALUES

import adapterlab as al
from adapterlab.serve import Engine, EngineSettings

PROMPTS = ["1+1=", "abc", "9 0 9 0 9"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_folder import write_model

    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def expected(model_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapters in a folder, and the greedy tokens of each by `generate`."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for name, method in (
        ("base", None),
        ("low", al.LoRA(r=4)),
        ("scaled", al.IA3()),
        ("front", al.PrefixTuning(length=3)),
    ):
        model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        if method is not None:
            host = al.attach(model, method)
            draw = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for value in host.tensors("default").values():
                    value.add_(torch.randn(value.shape, generator=draw))
            host.save(root / name)
        found[name] = [said(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    return {"root": root, "tokens": found}


def said(model: Any, tokenizer: Any, prompt: str) -> list[str]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    return [tokenizer.decode([id]) for id in new.tolist()]


@pytest.fixture(scope="module")
def real(
    make_server: Callable[..., Server], model_folder: Path, tokenizer: Any, expected: dict[str, Any]
) -> Iterator[Server]:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    settings = EngineSettings(memory_gb=0.05, max_running=16, step_tokens=64)
    made = make_server(engine=lambda: Engine(model, tokenizer, settings), root=expected["root"])
    yield made
    made.stop()


def test_each_adapter_answers_as_it_does_alone(real: Server, expected: dict[str, Any]) -> None:
    client = real.openai()
    for name, tokens in expected["tokens"].items():
        found = client.completions.create(
            model=name, prompt=PROMPTS, max_tokens=8, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )
        assert [choice.logprobs.tokens for choice in found.choices] == tokens, name
        assert {choice.finish_reason for choice in found.choices} == {"length"}


def test_streams_and_whole_answers_agree(real: Server) -> None:
    wish: dict[str, Any] = {"model": "low", "messages": ASK, "max_tokens": 12, "seed": 3, "n": 2, "temperature": 1.0}
    whole = real.openai().chat.completions.create(**wish)
    texts = ["", ""]
    for chunk in real.openai().chat.completions.create(**wish, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_strangers_break_nothing(real: Server, expected: dict[str, Any]) -> None:
    draw = random.Random(1)
    for _ in range(100):
        method, path = draw.choice(PLACES)
        start = draw.choice(({}, {"messages": ASK, "max_tokens": 2}, {"prompt": "1", "max_tokens": 2}))
        body = {**start, **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 4))}}
        status, found, _ = ask(real, method, path, None if method == "GET" else body)
        assert status < 500, (method, path, body, found)
    body = {"model": "low", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    answer = post(real, "/v1/completions", body)[1]
    assert answer["choices"][0]["logprobs"]["tokens"] == expected["tokens"]["low"][0]
    assert real.service.engine.failure is None


def test_answers_keep_to_a_schema(real: Server) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"enum": [12, 345]}}}
    wish = {"model": "low", "messages": ASK, "n": 8, "seed": 1, "max_tokens": 8, "response_format": form}
    status, found, _ = post(real, "/v1/chat/completions", wish)
    assert status == 200
    said = {choice["message"]["content"].replace(" ", "") for choice in found["choices"]}  # between all tokens here
    assert said <= {"12", "345"}
    assert {choice["finish_reason"] for choice in found["choices"]} == {"stop"}
    form["json_schema"]["schema"] = {"type": "no-such-type"}  # type: ignore[index]
    assert post(real, "/v1/chat/completions", {**wish, "response_format": form})[0] == 400
