"""Prompt tuning: a prompt of words is the same as reading them, and a tuned one replaces a task token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.prompt import _input_prompt
from adapterlab.methods.prompt.prompt_tuning import PromptTuning
from adapterlab.testing import CHECKS, Case, outcome

WORDS = (17, 4, 99, 31, 8)
QUIET: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DECODERS = ["llama", "qwen2", "gpt2", "mixtral", "gemma2"]


def words_prompt() -> PromptTuning:
    return PromptTuning(length=len(WORDS), init="words", words=WORDS)


def ids(rows: int = 2, length: int = 7, seed: int = 5) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


SYMBOLS, TASKS = 8, 4


def task_batch(task: int, seed: int) -> tuple[Tensor, Tensor]:
    """A symbol, and the symbol that the task maps it to: a rotation."""
    x = torch.randint(0, SYMBOLS, (32,), generator=torch.Generator().manual_seed(seed))
    return x, (x + task + 1) % SYMBOLS


@pytest.fixture(scope="module")
def multitask() -> LlamaForCausalLM:
    """A small model that knows several tasks by a task token in front of the symbol."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=SYMBOLS + TASKS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):  # all tasks in each: one after the other, the last one is known best, and how well is chance
        x, y = zip(*(task_batch(task, step) for task in range(TASKS)), strict=True)
        tokens = [torch.stack([torch.full_like(each, SYMBOLS + task), each], 1) for task, each in enumerate(x)]
        loss = F.cross_entropy(model(torch.cat(tokens)).logits[:, -1], torch.cat(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def measure(model: LlamaForCausalLM, length: int, steps: int = 150) -> float:
    """Accuracy on one task without its token, after tuning a prompt in its place."""
    torch.manual_seed(1)
    host = al.attach(model, PromptTuning(length=length))
    try:
        optimizer = torch.optim.Adam(host.parameters("default"), lr=0.1)
        for step in range(steps):
            x, y = task_batch(2, step)
            loss = F.cross_entropy(model(x[:, None]).logits[:, -1], y)
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        x, y = task_batch(2, 999)
        with torch.no_grad():
            return float((model(x[:, None]).logits[:, -1].argmax(-1) == y).float().mean())
    finally:
        host.detach("default")


def test_a_tuned_prompt_replaces_the_task_token(multitask: LlamaForCausalLM) -> None:
    before = {key: value.clone() for key, value in multitask.state_dict().items()}
    x, y = task_batch(2, 999)
    with torch.no_grad():
        with_token = multitask(torch.stack([torch.full_like(x, SYMBOLS + 2), x], 1)).logits[:, -1].argmax(-1)
    reached = float((with_token == y).float().mean())
    assert reached > 0.9
    assert measure(multitask, 8) >= 0.9 * reached
    assert all(torch.equal(value, before[key]) for key, value in multitask.state_dict().items())


def test_the_claim_fails_for_a_prompt_that_does_not_learn(
    multitask: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptTuning.Layer, "vectors", lambda self: self.prompt.detach())
    assert measure(multitask, 8) < 0.5


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_of_words_equals_reading_them(family: str, tiny: Any) -> None:
    model, x = tiny(family), ids()
    read = torch.cat([torch.tensor([WORDS, WORDS]), x], 1)
    with torch.no_grad():
        expected = model(read).logits[:, len(WORDS) :]
    greedy, beams = (model.generate(read, num_beams=n, **QUIET)[:, len(WORDS) :] for n in (1, 3))
    host = al.attach(model, words_prompt())
    assert host.summary().trainable == len(WORDS) * 32
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
        assert (out.logits - expected).abs().max() < 1e-5
        assert {h.shape[1] for h in out.hidden_states} == {7}
        assert (model(padded, attention_mask=mask).logits[:, 3:] - expected).abs().max() < 1e-5
        as_tuple = model(x, return_dict=False)
        assert torch.equal(as_tuple[0], out.logits)
    for cache in (True, False):
        assert torch.equal(model.generate(x, use_cache=cache, **QUIET), greedy)
        assert torch.equal(model.generate(x, use_cache=cache, num_beams=3, **QUIET), beams)
        answer = model.generate(padded, attention_mask=mask, use_cache=cache, **QUIET)
        assert torch.equal(answer[:, 3:], greedy)


def test_losses_and_labels_need_no_change(tiny: Any, batch_for: Any) -> None:
    for family in ("llama", "gpt2", "bert-classes", "bert-tokens", "bert-masked", "t5"):
        model = tiny(family)
        batch = batch_for(model)
        host = al.attach(model, PromptTuning(length=3))
        host.verify(batch)
        if family != "bert-classes":
            assert model(**batch).logits.shape[1] == batch["labels"].shape[1]


def test_the_pooler_reads_the_first_real_token(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    batch = batch_for(model)
    words = torch.tensor([WORDS, WORDS])
    read = {"input_ids": torch.cat([words, batch["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(words), batch["attention_mask"]], 1)}  # fmt: skip
    with torch.no_grad():
        virtual = model(**read).logits
        hidden = model.bert(**read).last_hidden_state[:, len(WORDS) :]
        real = model.classifier(model.bert.pooler(hidden))
    for pool, expected in (("real", real), ("virtual", virtual)):
        host = al.attach(model, words_prompt().replace(pool=pool))
        with torch.no_grad():
            assert (model(**batch).logits - expected).abs().max() < 1e-5
        host.detach("default")
    assert (real - virtual).abs().max() > 0.01


def test_an_encoder_has_the_prompt_and_cross_attention_sees_it(tiny: Any, batch_for: Any) -> None:
    model = tiny("t5")
    batch = batch_for(model)
    words = torch.tensor([WORDS, WORDS])
    read = {**batch, "input_ids": torch.cat([words, batch["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(words), batch["attention_mask"]], 1)}  # fmt: skip
    inputs, longer = ({k: v for k, v in b.items() if k != "labels"} for b in (batch, read))
    with torch.no_grad():
        expected = model(**read).logits
        answer = model.generate(**longer, num_beams=2, **QUIET)
        al.attach(model, words_prompt())
        assert (model(**batch).logits - expected).abs().max() < 1e-5
        assert torch.equal(model.generate(**inputs, num_beams=2, **QUIET), answer)


def test_rows_have_their_own_prompts(tiny: Any) -> None:
    model, x = tiny("llama"), ids(3)
    host = al.attach(model, words_prompt(), "a")
    host.attach(PromptTuning(length=2), "b")
    apart = []
    for row, names in enumerate((("a",), ("b",), ())):
        with host.using(*names), torch.no_grad():
            apart.append(model(x).logits[row])
    with host.rows(["a", "b", None]), torch.no_grad():
        together = model(x)
        with pytest.raises(AttachError, match="use_cache=False"):
            model.generate(x, **QUIET)
    assert (together.logits - torch.stack(apart)).abs().max() < 1e-5
    assert together.past_key_values is None


def test_it_starts_as_asked(tiny: Any) -> None:
    model = tiny("llama")
    table = model.get_input_embeddings().weight.detach()
    starts = {
        "words": (PromptTuning(length=4, init="words", words=(9, 7, 5)), table[[9, 7, 5, 9]]),
        "labels": (
            PromptTuning(length=2, init="labels", labels=((3, 4), (5,))),
            torch.stack([table[3:5].mean(0), table[5]]),
        ),
    }
    for name, (method, expected) in starts.items():
        host = al.attach(model, method, name)
        assert torch.allclose(host.parameters(name)[0], expected)
        host.detach(name)
    host = al.attach(model, PromptTuning(length=40, init="uniform"))
    values = host.parameters("default")[0]
    assert 0.45 < values.abs().max() <= 0.5
    assert torch.equal(table, model.get_input_embeddings().weight)


def test_bad_settings_say_what_to_do(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="init='vocab' and words"):
        PromptTuning(words=(1,))
    with pytest.raises(ConfigError, match="2 labels need"):
        PromptTuning(length=1, init="labels", labels=((1,), (2,)))
    with pytest.raises(ConfigError, match="128 is not in the vocabulary of 128"):
        al.attach(tiny("llama"), PromptTuning(init="words", words=(128,)))
    with pytest.raises(AttachError, match="PrefixTuning"):
        al.attach(tiny("vit"), PromptTuning())
    model = tiny("gpt2")
    al.attach(model, PromptTuning(length=60))
    with pytest.raises(AttachError, match="64 learned"):
        model(ids())


def test_a_prompt_put_in_front_at_every_step_fails_the_suites_check_of_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_input_prompt, "companion", lambda cache, key: None)
    for family in ("llama", "mistral-window"):
        assert outcome(CHECKS["generate"], Case(PromptTuning, family)).status == "failed"
