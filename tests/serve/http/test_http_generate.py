"""TGI's and LoRAX's way of asking, with Hugging Face's own client where it has a word for it."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from http_servers import Server, ask, post
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import ValidationError

ALL = {
    "adapter_id": "sums", "adapter_source": "local", "best_of": 2, "do_sample": True, "temperature": 0.5, "top_k": 3,
    "top_p": 0.9, "repetition_penalty": 1.5, "seed": 7, "max_new_tokens": 3, "stop": ["x"], "return_full_text": True,
    "details": True, "decoder_input_details": False, "watermark": False, "top_n_tokens": 2, "truncate": 2,
    "ignore_eos_token": True, "apply_chat_template": False,
}  # fmt: skip


def streamed(server: Server, body: Any) -> list[Any]:
    """The events of `/generate_stream`."""
    request = urllib.request.Request(
        f"{server.url}/generate_stream", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return [json.loads(line.removeprefix(b"data: ")) for line in response if line.startswith(b"data: ")]


def sampling(server: Server) -> dict[str, Any]:
    return server.engine.handles[-1].request.sampling.model_dump(exclude_defaults=True)


def test_hugging_faces_client_is_answered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)  # this machine alone is asked
    client = InferenceClient(server.url, timeout=60)
    assert client.text_generation("1+1", max_new_tokens=40) == "base 3 0"
    whole = client.text_generation("1+1", adapter_id="sums", details=True, top_n_tokens=2, max_new_tokens=40)
    assert (whole.generated_text, whole.details.finish_reason) == ("sums 3 0", "eos_token")
    assert [token.text for token in whole.details.tokens] == list("sums 3 0")
    assert {(token.logprob, token.special) for token in whole.details.tokens} == {(-0.5, False)}
    assert [len(tops) for tops in whole.details.top_tokens] == [2] * 8
    events = list(client.text_generation("1+1", adapter_id="sums", details=True, stream=True, max_new_tokens=4))
    assert [event.token.text for event in events] == list("sums")
    assert [event.index for event in events] == [1, 2, 3, 4]
    assert [event.generated_text for event in events] == [None, None, None, "sums"]
    end = events[-1].details
    assert (end.finish_reason, end.generated_tokens, end.input_length) == ("length", 4, 3)
    with pytest.raises(ValidationError, match="nowhere"):
        list(client.text_generation("1", adapter_id="nowhere", stream=True))


def test_all_parameters_reach_the_engine(server: Server) -> None:
    status, found, _ = post(server, "/generate", {"inputs": "1+1", "parameters": ALL})
    assert status == 200
    assert sampling(server) == {
        "max_tokens": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "n": 2, "stop": ("x",),
        "ignore_end": True, "logprobs": 2, "repetition_penalty": 1.5,
    }  # fmt: skip
    assert len(server.engine.handles[-1].request.prompt) == 2, "the last two tokens"
    assert found["generated_text"] == "1+1sum"
    assert [one["generated_text"] for one in found["details"]["best_of_sequences"]] == ["1+1sum"]
    assert (found["details"]["prompt_tokens"], found["details"]["seed"]) == (2, 7)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 63}),
        ({"temperature": 1.0}, {"temperature": 0.0, "max_tokens": 63}),
        ({"do_sample": True}, {"max_tokens": 63}),
        ({"top_p": 0.5}, {"top_p": 0.5, "max_tokens": 63}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0, "max_tokens": 63}),
        ({"return_k_alternatives": 2, "details": True}, {"temperature": 0.0, "max_tokens": 63, "logprobs": 2}),
    ],
)
def test_tokens_are_drawn_only_if_that_is_asked_for(server: Server, parameters: Any, expected: Any) -> None:
    assert post(server, "/generate", {"inputs": "1", "parameters": parameters})[0] == 200
    assert sampling(server) == expected


def test_a_stream_says_the_same_as_a_whole_answer(server: Server) -> None:
    body = {"inputs": "1+1", "parameters": {"adapter_id": "team/words", "return_k_alternatives": 1, "details": True}}
    whole, events = post(server, "/generate", body)[1], streamed(server, body)
    assert events[-1]["generated_text"] == whole["generated_text"] == "team+words 3 0"
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert events[0]["token"]["alternative_tokens"][0].keys() == {"id", "text", "logprob"}
    either = {**body, "stream": False}
    assert post(server, "/", either)[1] == whole


def test_a_conversation_goes_through_the_template_of_the_adapter(server: Server) -> None:
    parameters = {"adapter_id": "sums", "apply_chat_template": True}
    assert post(server, "/generate", {"inputs": "1+1", "parameters": parameters})[1]["generated_text"] == "sums 4 0"


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/generate", {"inputs": "1", "parameters": {"max_tokens": 3}}, 400, "'max_tokens' is not known here"),
        ("/generate", {"inputs": "1", "parameters": {"typical_p": 0.5}}, 400, "'typical_p' is not known here"),
        ("/generate", {"inputs": "1", "parameters": {"merged_adapters": {}}}, 400, "'merged_adapters'"),
        ("/generate", {"inputs": "1", "parameters": {"watermark": True}}, 400, "parameters.watermark = True"),
        ("/generate", {"inputs": "1", "parameters": {"adapter_source": "hub"}}, 400, "'local'"),
        ("/generate", {"inputs": "1", "parameters": {"best_of": 2}}, 400, "do_sample"),
        ("/generate", {"inputs": "1", "model": "sums"}, 400, "'model' is not known here"),
        ("/generate", {"inputs": "", "parameters": {}}, 400, "inputs"),
        ("/generate", {"inputs": "1", "parameters": {"max_new_tokens": 10**7}}, 400, "limits.answer_tokens"),
        ("/generate", {"inputs": "1", "parameters": {"grammar": {"type": "regex", "value": "a"}}}, 400, "'json'"),
        ("/generate_stream", {"inputs": "1", "parameters": {"best_of": 2, "do_sample": True}}, 400, "/generate"),
        ("/generate", {"inputs": "1", "parameters": {"adapter_id": "nowhere"}}, 404, "nowhere"),
        ("/", {"inputs": "1", "stream": "yes"}, 400, "stream"),
    ],
)
def test_what_is_not_understood_is_refused_in_their_form(
    server: Server, path: str, body: Any, status: int, part: str
) -> None:
    found = post(server, path, body)
    assert (found[0], found[1]["error_type"]) == (status, "validation")
    assert part in found[1]["error"]
    assert ask(server, "GET", "/generate")[0] == 405
