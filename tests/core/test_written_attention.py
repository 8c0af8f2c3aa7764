"""Attention that a model writes out in its own forward (Bloom): adapters inside it do what they do elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

import adapterlab as al
from adapterlab.foreign.model import is_causal

IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(5))
QUIET: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def bloom() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=128, hidden_size=48, n_layer=2, n_head=6, hidden_dropout=0.0, attention_dropout=0.0
    )  # fmt: skip
    model = BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_gradients_are_the_same_when_layers_are_computed_again() -> None:
    found: list[list[Tensor]] = []
    for recompute in ("none", "cheap", "full"):
        model = bloom().train()
        host = al.attach(model, al.PrefixTuning(length=3, words=(1, 2, 3)))
        host.recompute(recompute)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in host.parameters("default") if p.grad is not None])
    assert len(found[0]) == 2
    for again in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], again, strict=True))


@torch.no_grad()
def test_rows_and_beams_have_their_own_prefixes() -> None:
    model = bloom()
    host = al.attach(model, al.PrefixTuning(length=5), "a")
    host.attach(al.PrefixTuning(length=2), "b")
    rows, apart = IDS[:1].repeat(3, 1), []
    for names in (("a",), ("b",), ()):
        with host.using(*names):
            apart.append((model(rows).logits[0], model.generate(rows[:1], num_beams=2, **QUIET)[0]))
    with host.rows(["a", "b", None]):
        together, answers = model(rows).logits, model.generate(rows, num_beams=2, **QUIET)
    for i, (logits, answer) in enumerate(apart):
        assert torch.allclose(together[i], logits, atol=1e-5)
        assert torch.equal(answers[i], answer)


@torch.no_grad()
def test_gates_of_a_causal_model_see_no_later_token() -> None:
    """Nothing in its modules says that it is causal, and a mean over tokens would show the later ones."""
    model = bloom()
    assert is_causal(model)
    host = al.attach(model, al.UniPELT(length=3, r=2, m=4, init="normal"))
    for value in host.tensors("default").values():
        value.normal_(std=0.4)
    other = IDS.clone()
    other[:, 5:] += 1
    a, b = model(IDS).logits, model(other).logits
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)
    assert torch.equal(model.generate(IDS, **QUIET), model.generate(IDS, use_cache=False, **QUIET))
