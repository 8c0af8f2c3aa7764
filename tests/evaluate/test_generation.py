from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch

from adapterlab.errors import ConfigError, DataError
from adapterlab.evaluate.generation import chat_ids, generate, stop_ids, stream, window_of
from adapterlab.models import DEFAULT, catalogue, load_model

PROMPTS = ["a", "which way to the harbour?", "b c", "one two three four five six seven", "x"]


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Reference: one row, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start, stops = len(ids), set(stop_ids(model, tokenizer))
    with torch.no_grad():
        while len(ids) < start + tokens and not stops & {ids[-1]}:
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_do_not_depend_on_the_batch(model: Any, tokenizer: Any, batch_size: int) -> None:
    expected = [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_token_ids_are_prompts_too(model: Any, tokenizer: Any) -> None:
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert generate(model, tokenizer, ids) == generate(model, tokenizer, PROMPTS)
    assert generate(model, tokenizer, []) == []


def test_samples_depend_on_seed_and_position_only(model: Any, tokenizer: Any) -> None:
    def sample(batch_size: int, seed: int) -> list[str]:
        return generate(model, tokenizer, PROMPTS, temperature=2.0, seed=seed, batch_size=batch_size, max_new_tokens=8)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = sample(1, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(4, 3) == one
    assert sample(4, 4) != one
    same = generate(model, tokenizer, ["a"] * 4, temperature=2.0, max_new_tokens=8)
    assert len(set(same)) > 1


def test_samples_follow_the_models_distribution(model: Any, tokenizer: Any) -> None:
    n, temperature = 600, 3.0
    answers = generate(model, tokenizer, ["a"] * n, temperature=temperature, max_new_tokens=1, batch_size=200)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("a")["input_ids"]])).logits[0, -1]
    p, token = (logits / temperature).softmax(-1).max(-1)
    share = Counter(answers)[tokenizer.decode([int(token)])] / n
    assert share == pytest.approx(float(p), abs=5 * float(p * (1 - p) / n) ** 0.5)
    least = generate(model, tokenizer, PROMPTS, temperature=temperature, top_p=1e-6, max_new_tokens=5)
    assert least == generate(model, tokenizer, PROMPTS, max_new_tokens=5)


def test_it_stops_at_the_end_of_turn_that_only_the_template_knows(model: Any, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<pad>"
    model.generation_config.eos_token_id = [7]
    assert stop_ids(model, tokenizer) == sorted([7, end, tokenizer.pad_token_id])
    free = generate(model, tokenizer, ["a"], max_new_tokens=6)[0]
    letter = tokenizer.convert_tokens_to_ids(free[2])
    with torch.no_grad():  # where the third letter was likeliest, the end of turn is now
        model.lm_head.weight[end] = model.lm_head.weight[letter] * 1.01
    first = free.index(free[2])
    assert generate(model, tokenizer, ["a"], max_new_tokens=6) == [free[:first]]
    assert generate(model, tokenizer, ["a", "which way?"], max_new_tokens=6)[0] == free[:first]


def test_the_model_is_left_as_it_was_and_nothing_is_warned(
    model: Any, tokenizer: Any, caplog: Any, recwarn: Any
) -> None:
    settings = model.generation_config
    settings.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=5, repetition_penalty=1.5)
    plain = [greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.INFO, "transformers"):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == plain
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is settings
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert [str(w.message) for w in recwarn] == []


def test_streamed_text_is_the_generated_text(model: Any, tokenizer: Any) -> None:
    ids = chat_ids(tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids) == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )
    pieces: list[str] = []
    stream(model, tokenizer, ids, show=pieces.append, max_new_tokens=20)
    assert "".join(pieces) == generate(model, tokenizer, [ids], max_new_tokens=20)[0] != ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -1.0}, "received -1.0"),
        ({"top_p": 0.0}, "received 0.0"),
        ({"max_new_tokens": 0}, "received 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(model: Any, tokenizer: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(model, tokenizer, ["a"], **change)


def test_prompts_that_cannot_be_answered(model: Any, tokenizer: Any) -> None:
    assert window_of(model, tokenizer) == 512
    with pytest.raises(DataError, match=r"Prompt 2 of 2 is empty"):
        generate(model, tokenizer, ["a", ""])
    with pytest.raises(DataError, match=r"has 500 tokens.*max_new_tokens=13.*window of 512.*lower max_new_tokens"):
        generate(model, tokenizer, ["a" * 500], max_new_tokens=13)
    assert len(generate(model, tokenizer, ["a" * 500], max_new_tokens=12)) == 1


@pytest.mark.model
def test_the_default_model_knows_paris() -> None:
    if catalogue()[DEFAULT].where() is None:
        pytest.skip("the default model has not been pulled")
    model, tokenizer = load_model(device="cpu", precision="fp32")
    asked = ["What is the capital of France?", "What is the capital of Italy? Answer in one word."]
    ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    answers = generate(model, tokenizer, ids, max_new_tokens=16)
    assert "Paris" in answers[0]
    assert "Rome" in answers[1]
    assert "<|im_end|>" not in answers[0]
