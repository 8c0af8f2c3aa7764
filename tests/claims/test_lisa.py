"""LISA: a few drawn blocks move in each interval, all of them over the run, with Adam state for the drawn ones only."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
import everywhere
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.methods.schedule.lisa import LISA
from adapterlab.optim import adamw

BLOCKS, GAMMA, K, INTERVALS = 8, 2, 2, 12
MAKE = functools.partial(adamw, lr=1e-3, weight_decay=0.1)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _step(host: Any, optimizer: Any, batch: Any, step: int) -> float:
    method = host.methods["default"]
    method.before_step(host, "default", step, optimizer)
    loss = host.model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _copy_of(block: Any) -> list[Tensor]:
    return [p.detach().clone() for p in block.parameters()]


def measure(model: Any, batch: Any, **fields: Any) -> dict[str, Any]:
    """Train and note, for each interval, which blocks changed, and the largest number of state scalars."""
    host = al.attach(model, al.LISA(layers=GAMMA, interval=K, **fields))
    optimizer = host.methods["default"].optimizer(host, "default", MAKE)
    blocks, start = model.model.layers, [_copy_of(b) for b in model.model.layers]
    moved, most, losses = [], 0, []
    for interval in range(INTERVALS):
        before = [_copy_of(b) for b in blocks]
        for step in range(interval * K, (interval + 1) * K):
            losses.append(_step(host, optimizer, batch, step))
            held = [v for state in optimizer.state.values() for v in state.values()]
            most = max(most, sum(v.numel() for v in held if isinstance(v, Tensor) and v.dim()))
        changed = [
            [not torch.equal(a, b) for a, b in zip(block.parameters(), old, strict=True)]
            for block, old in zip(blocks, before, strict=True)
        ]
        moved.append({i for i in range(BLOCKS) if any(changed[i])})
        assert all(all(c) for c in changed if any(c)), "a drawn block moves as a whole"
    deltas = [b.self_attn.q_proj.weight.detach() - old[0] for b, old in zip(blocks, start, strict=True)]
    ranks = [int(torch.linalg.matrix_rank(delta)) for delta in deltas]
    return {"moved": moved, "state": most, "losses": losses, "ranks": ranks, "host": host}


def budget(model: Any) -> int:
    """Scalars that train at a time, by arithmetic on the model."""
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    return sum(p.numel() for p in model.parameters()) - (BLOCKS - GAMMA) * one


def claim(found: dict[str, Any], model: Any) -> bool:
    moved = found["moved"]
    return (
        all(len(blocks) == GAMMA for blocks in moved)
        and set().union(*moved) == set(range(BLOCKS))
        and found["state"] == 2 * budget(model)
        and min(found["ranks"]) > 16
        and found["losses"][-1] < 0.8 * found["losses"][0]
    )


def test_claim(model: Any, batch_for: Any) -> None:
    found = measure(model, batch_for(model, rows=4))
    assert claim(found, model)
    assert found["host"].summary().trainable == budget(model)
    assert found["host"].summary().total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("broken", ["state kept", "zero gradients", "draws once", "one block less"])
def test_a_broken_implementation_fails_the_claim(
    broken: str, model: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "draws once":
        plain = LISA.draw
        monkeypatch.setattr(LISA, "draw", lambda self, count, step: plain(self, count, 0))
    if broken == "one block less":
        every = LISA.draw
        monkeypatch.setattr(LISA, "draw", lambda self, count, step: set(list(every(self, count, step))[1:]))
    if broken == "zero gradients":  # frozen by a gradient of zero: decay and momentum go on

        def switch(self: Any, host: Any, name: str, step: int) -> None:
            for p in self._owned(host, name):
                p.requires_grad_(True)
                p.grad = torch.zeros_like(p)

        monkeypatch.setattr(LISA, "_switch", switch)
    found = measure(model, batch_for(model, rows=4), **({"on_switch": "keep"} if broken == "state kept" else {}))
    assert not claim(found, model)


def test_draws_are_uniform_reproducible_and_depend_on_seed_and_interval_alone() -> None:
    method = al.LISA(layers=2, interval=5)
    assert [method.draw(8, s) for s in range(5)] == [method.draw(8, 0)] * 5
    draws = [frozenset(method.draw(8, 5 * i)) for i in range(400)]
    counts = [sum(i in d for d in draws) for i in range(8)]
    assert len(set(draws)) > 20
    assert all(60 < count < 140 for count in counts), counts  # 100 expected, standard deviation 8.7
    assert draws != [frozenset(al.LISA(layers=2, interval=5, seed=1).draw(8, 5 * i)) for i in range(400)]


@pytest.mark.parametrize("on_switch", ["drop", "restart", "keep", "offload"])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_resume_in_the_middle_is_equal_to_the_bit(on_switch: Any, stop: int, model: Any, batch_for: Any) -> None:
    batch, twin = batch_for(model, rows=4), copy.deepcopy(model)
    host = al.attach(model, al.LISA(layers=2, interval=3, on_switch=on_switch))
    optimizer = host.methods["default"].optimizer(host, "default", MAKE)
    for step in range(stop):
        _step(host, optimizer, batch, step)
    other = al.attach(twin, al.LISA(layers=2, interval=3, on_switch=on_switch))
    resumed = other.methods["default"].optimizer(other, "default", MAKE)
    other.load_state_dict("default", host.state_dict("default"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(stop, 11):
        assert _step(host, optimizer, batch, step) == _step(other, resumed, batch, step)
    theirs = dict(twin.named_parameters())
    assert all(torch.equal(p, theirs[path]) for path, p in model.named_parameters())


@pytest.mark.parametrize(("on_switch", "outside"), [("drop", 6), ("restart", 2)])
def test_what_a_switch_forgets(on_switch: Any, outside: int, model: Any, batch_for: Any) -> None:
    """The step count that Adam has after three intervals of two steps, outside the blocks and inside those drawn."""
    host = al.attach(model, al.LISA(layers=2, interval=2, seed=3, on_switch=on_switch))
    optimizer = host.methods["default"].optimizer(host, "default", functools.partial(torch.optim.AdamW, lr=1e-3))
    for step in range(6):
        _step(host, optimizer, batch_for(model), step)
    always = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    assert {int(optimizer.state[p]["step"]) for p in always} == {outside}
    method = host.methods["default"]
    fresh = method.draw(BLOCKS, 4) - method.draw(BLOCKS, 2)
    inside = [p for i in fresh for p in model.model.layers[i].parameters()]
    assert {int(optimizer.state[p]["step"]) for p in inside} == {2}


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_it_trains_everywhere_and_is_undone_to_the_bit(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    batch, before = batch_for(model), {key: value.clone() for key, value in model.state_dict().items()}
    host = al.attach(model, al.LISA(layers=1, interval=2))
    optimizer = host.methods["default"].optimizer(host, "default", MAKE)
    losses = [_step(host, optimizer, batch, step) for step in range(8)]
    assert losses[-1] < losses[0]
    with host.using():
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(p.requires_grad for p in host.tensors("default").values()) < len(before)
    host.detach("default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_foreign_optimizer_without_the_waiting_layers_is_refused(model: Any) -> None:
    host = al.attach(model, al.LISA(layers=1, interval=1))
    foreign = MAKE([p for p in model.parameters() if p.requires_grad])
    method = host.methods["default"]
    step = next(s for s in range(99) if method.draw(BLOCKS, s) != method.draw(BLOCKS, 0))
    with pytest.raises(NotTrainingError, match=r"does not know all parameters.*\.optimizer\(host"):
        method.before_step(host, "default", step, foreign)


def test_too_many_layers_are_refused(model: Any) -> None:
    with pytest.raises(AttachError, match=r"layers=9, but the model has 8 blocks\. Choose 1 to 8"):
        al.attach(model, al.LISA(layers=9))
    assert al.host(model) is None


@pytest.mark.parametrize(
    "method", [al.LISA(layers=1, interval=1, on_switch=mode) for mode in ("restart", "keep", "offload")]
)
def test_other_settings_are_alike_in_every_loop(method: al.Method, tmp_path: Path) -> None:
    everywhere.check(method, tmp_path)
