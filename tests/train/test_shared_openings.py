"""Rows that begin alike compute their beginning once: same loss, same gradients, and where that is not so, not done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from adapterlab.core.method import Method
from adapterlab.data import Collator, PackingCollator
from adapterlab.data.batching import count_tokens, joined
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.engine.packing import choose
from adapterlab.errors import ConfigError
from adapterlab.hosts import attach
from adapterlab.methods.bottleneck.adapter_houlsby import AdapterHoulsby
from adapterlab.methods.in_place.full import Full
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.structured.vera import VeRA
from adapterlab.train import Loop, Training
from everywhere import Emitting

Rows = list[dict[str, list[int]]]
OPENING, OTHER = list(range(20, 34)), list(range(50, 61))
METHODS: dict[str, Method] = {
    "lora": LoRA(r=2), "vera": VeRA(r=4), "houlsby": AdapterHoulsby(m=4), "full": Full(),
}  # fmt: skip


def make_rows() -> Rows:
    """Rows of two openings and of none; each row's labels begin somewhere behind, some cover all the rest."""
    ends = [[3, 4, 5], [3, 4, 9, 9], [7], [8, 2, 2, 2, 2, 6], [1, 5], [5, 1, 1]]
    rows = [{"input_ids": [*OPENING, *end], "labels": [-100] * (len(OPENING) + 1) + end[1:]} for end in ends]
    rows += [{"input_ids": [*OTHER, *end], "labels": [-100] * len(OTHER) + end} for end in ends[2:4]]
    rows.insert(2, {"input_ids": list(range(90, 100)), "labels": [-100, *range(91, 100)]})
    return rows


def result(host: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The loss of a batch and the gradients of what trains."""
    host.model.zero_grad()
    with fast_attention(host.model):
        loss = Loss(host.model)(batch)
        loss.backward()
    gradients = [p.grad for p in host.named_parameters("default").values() if p.grad is not None]
    return [loss.detach(), *(grad.clone() for grad in gradients)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_whole_rows(
    tiny: Callable[..., Any], randomise: Callable[..., None], kind: str, method: str
) -> None:
    single = kind == "mixtral"  # its grouped products know no float64
    model, size = (tiny(kind), 1e-5) if single else (tiny(kind).double(), 1e-6)  # norms compute in float32
    host = attach(model, METHODS[method])
    if method != "full":
        randomise(host)
    rows = make_rows()
    shared, whole = PackingCollator(share=True)(rows), PackingCollator()(rows)
    assert shared["input_ids"].numel() < 0.7 * whole["input_ids"].numel()
    for found, expected in zip(result(host, shared), result(host, whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * size, atol=size * (1 + float(expected.abs().max())))
    collate, why = choose(model, Collator(0), 20)
    assert isinstance(collate, PackingCollator)
    assert collate.share, why


@pytest.mark.parametrize("kind", ["eager", "flash by hand", "bf16"])
def test_other_ways_to_compute_attention(
    tiny: Callable[..., Any], randomise: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = tiny("llama")
    if kind == "eager":
        model.set_attn_implementation("eager")
    elif kind == "bf16":
        model.bfloat16()
    else:  # sample by sample, with a mask
        monkeypatch.setattr("adapterlab.engine.attention.pays", lambda *_: False)
    host = attach(model, LoRA(r=2))
    randomise(host)
    tolerance = 3e-2 if kind == "bf16" else 1e-4
    shared, whole = (PackingCollator(share=share)(make_rows()) for share in (True, False))
    for found, expected in zip(result(host, shared), result(host, whole), strict=True):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_what_stands_in_a_batch() -> None:
    rows = make_rows()
    batch = PackingCollator(share=True)(rows)
    ids, places = batch["input_ids"][0], batch["key_places"]
    seen = [ids[part].tolist() for part in places.split(batch["cu_seq_lens_k"].diff().tolist())]
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    first = [ids[part].tolist() for part in torch.arange(len(ids)).split(lengths)]
    # Each opening stands before its first row, up to the token that predicts the first label.
    assert first[0] == OPENING
    assert first[first.index(OTHER[:-1])] == seen[first.index(OTHER[:-1])]
    openings = (OPENING, OTHER[:-1])
    assert [row for row in seen if row not in openings] == [row["input_ids"] for row in rows]
    assert count_tokens(batch) == sum(len(row["input_ids"]) for row in rows) == count_tokens(PackingCollator()(rows))
    positions = batch["position_ids"][0].split(lengths)
    assert all(part.tolist() == list(range(len(row)))[-len(part) :] for part, row in zip(positions, seen, strict=True))
    trained = batch["labels"][0] != -100
    assert int(trained.sum()) == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert torch.equal(batch["labels"][0][trained], ids[trained])


def test_what_is_not_worth_it_stays_as_it_is() -> None:
    everything = [{"input_ids": [*OPENING, i], "labels": [*OPENING, i]} for i in range(3)]
    different = [{"input_ids": [i, *OPENING], "labels": [-100] * len(OPENING) + [5]} for i in range(3)]
    brief = [{"input_ids": [1, 2, 3, i], "labels": [-100, -100, -100, i]} for i in range(3)]
    long = [{"input_ids": [*OPENING, *range(i, 400)], "labels": [-100] * 50 + [1] * (364 - i)} for i in range(2)]
    for rows in (everything, different, brief, long, make_rows()[:1]):
        assert "key_places" not in PackingCollator(share=True)(rows)
    assert "key_places" not in PackingCollator()(make_rows())


def test_batches_behind_each_other(tiny: Callable[..., Any], randomise: Callable[..., None]) -> None:
    host = attach(tiny("llama").double(), LoRA(r=2))
    randomise(host)
    parts = [make_rows(), make_rows()[2:5], make_rows()[1:]]
    shared = joined([PackingCollator(share=i != 1)(rows) for i, rows in enumerate(parts)])
    for found, expected in zip(
        result(host, shared), result(host, PackingCollator()([row for rows in parts for row in rows])), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_where_rows_would_differ_they_share_nothing(tiny: Callable[..., Any]) -> None:
    def reason(model: Any, **options: Any) -> str:
        collate, why = choose(model.train(), Collator(0), 20, **options)
        assert not getattr(collate, "share", False)
        return why

    assert "random numbers" in reason(attach(tiny("llama"), LoRA(r=2, dropout=0.5)).model)
    dropping = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.5)
    assert "random numbers" in reason(GPT2LMHeadModel(dropping))
    assert "inside the attention" in reason(attach(tiny("llama"), PrefixTuning(length=2)).model)
    assert reason(attach(tiny("llama"), LoRA(r=2)).model, shared=False).endswith("it is switched off")
    assert "weighs" in reason(attach(tiny("llama"), Emitting(r=4)).model)
    host = attach(tiny("llama"), LoRA(r=2))
    host.model.model.register_forward_hook(lambda *_: host.state.emit(torch.zeros(())))
    assert "emit" in reason(host.model)
    seeing = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=False,
    )  # fmt: skip
    assert "later ones" in reason(BertLMHeadModel(seeing))
    with pytest.raises(ConfigError, match=r"shared_openings=true is not possible here: .*inside the attention"):
        choose(attach(tiny("llama"), PrefixTuning(length=2)).model, Collator(0), 20, shared=True)
    with pytest.raises(ConfigError, match=r"padded, as asked for"):
        choose(tiny("llama"), Collator(0), 20, wanted=False, shared=True)


def test_a_model_that_loses_the_places_is_found_out(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, key_places=None, **kwargs: forward(*args, **kwargs)
    collate, why = choose(model, Collator(0), 20)
    assert isinstance(collate, PackingCollator)
    assert not collate.share
    assert "openings are not shared" in why


def test_outside_of_fast_attention_it_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    batch = PackingCollator(share=True)(make_rows())
    with fast_attention(model):
        model(**batch)
    with pytest.raises(ConfigError, match="key_places"):
        model(**batch, use_cache=False)


def test_a_run_is_the_same_and_counts_the_tokens_of_rows(tiny: Callable[..., Any]) -> None:
    ends: dict[bool | None, Any] = {}
    for shared in (None, False):
        torch.manual_seed(3)
        host = attach(tiny("llama"), LoRA(r=2))
        training = Training(steps=3, batch_size=4, lr=1e-2, shared_openings=shared)
        loop = Loop(host, "default", make_rows(), training, eval_rows=make_rows()[:3])
        status = loop.run()
        ends[shared] = status, [p.detach().clone() for p in host.parameters("default")]
        assert loop.collate.share is (shared is None)
    (one, weights), (other, expected) = ends[None], ends[False]
    assert one.tokens == other.tokens
    assert one.best_loss == pytest.approx(other.best_loss, rel=1e-5)
    for found, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_recomputation_finds_the_places(tiny: Callable[..., Any], randomise: Callable[..., None]) -> None:
    expected: list[torch.Tensor] | None = None
    for recompute in ("none", "cheap", "full"):
        torch.manual_seed(3)
        host = attach(tiny("llama"), LoRA(r=2))
        randomise(host)
        if recompute != "none":
            host.recompute(recompute)
        host.model.train()
        found = result(host, PackingCollator(share=True)(make_rows()))
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
