"""Packed rows have the loss and the gradients of padded ones, and what cannot be packed is padded, with the reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama

from adapterlab.core.method import Method
from adapterlab.data import Collator, PackingCollator
from adapterlab.data.batching import joined
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.engine.packing import choose, obstacle
from adapterlab.errors import ConfigError
from adapterlab.evaluate.loss import evaluate_loss
from adapterlab.hosts import Host, attach
from adapterlab.methods.bottleneck.adapter_houlsby import AdapterHoulsby
from adapterlab.methods.bottleneck.adapter_parallel import AdapterParallel
from adapterlab.methods.composite.longlora import LongLoRA
from adapterlab.methods.in_place.full import Full
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.multiplicative.ia3 import IA3
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.prompt.prompt_tuning import PromptTuning
from adapterlab.methods.side_network.lst import LST
from adapterlab.train import Loop, Training

Rows = list[dict[str, list[int]]]
METHODS: dict[str, Method] = {
    "lora": LoRA(r=2),
    "prefix": PrefixTuning(length=3),
    "ia3": IA3(),
    "houlsby": AdapterHoulsby(m=4),
    "parallel": AdapterParallel(m=4),
    "full": Full(),
}


def make_rows(count: int = 5, seed: int = 0) -> Rows:
    """Rows of 1 to 12 tokens, some without labels at their start."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        ids = [draw.randrange(3, 128) for _ in range(1 if i == 2 else draw.randrange(3, 13))]
        rows.append({"input_ids": ids, "labels": [-100 if j < i % 3 else token for j, token in enumerate(ids)]})
    return rows


def result(host: Host, batch: dict[str, Any], *, fast: bool = True) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch and the gradients of the adapter."""
    parameters = host.named_parameters("default")
    for p in parameters.values():
        p.grad = None
    loss = Loss(host.model)
    if fast:
        with fast_attention(host.model):
            value = loss(batch)
            value.backward()
    else:
        value = loss(batch)
        value.backward()
    return value.item(), {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}


def check_same(left: tuple[float, dict[str, Tensor]], right: tuple[float, dict[str, Tensor]], size: float) -> None:
    assert left[0] == pytest.approx(right[0], rel=size)
    assert left[1].keys() == right[1].keys()
    for key in left[1]:
        scale = float(right[1][key].abs().max())
        torch.testing.assert_close(left[1][key], right[1][key], rtol=1e3 * size, atol=size * (1 + scale), msg=key)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_padding(
    tiny: Callable[..., Any], randomise: Callable[..., None], kind: str, method: str
) -> None:
    single = kind == "mixtral"  # its grouped products know no float64
    model, size = (tiny(kind), 1e-5) if single else (tiny(kind).double(), 1e-10)
    host = attach(model, METHODS[method])
    if method != "full":
        randomise(host)
    rows = make_rows()
    padded = result(host, Collator(0)(rows), fast=False)
    packed = PackingCollator()(rows)
    check_same(result(host, packed), padded, size)
    check_same(result(host, packed, fast=False), padded, size)  # transformers builds the mask
    assert obstacle(model, Collator(0), 12) == ""


def test_eager_attention_and_attention_dropout(tiny: Callable[..., Any], randomise: Callable[..., None]) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    host = attach(model, PrefixTuning(length=3))
    randomise(host)
    rows = make_rows()
    check_same(result(host, PackingCollator()(rows)), result(host, Collator(0)(rows)), 1e-5)
    dropping = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0.5, embd_pdrop=0.0,
                   resid_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    ).train()  # fmt: skip
    with fast_attention(dropping):  # more tokens than positions
        first, second = (dropping(**PackingCollator()(rows)).loss for _ in range(2))
        dropping.eval()
        packed = dropping(**PackingCollator()(rows)).loss
    assert first != second
    torch.testing.assert_close(packed, dropping(**Collator(0)(rows)).loss)


def test_a_sample_is_a_batch_of_one_to_an_adapter_inside_attention(tiny: Callable[..., Any]) -> None:
    """LongLoRA's groups are a share of the sample, so that only batches of one tell what is right."""
    host = attach(tiny("llama").double(), LongLoRA(ratio=0.5))
    host.model.train()
    rows = [row for row in make_rows(6) if len(row["input_ids"]) > 1]
    total = Loss(host.model).tokens(PackingCollator()(rows))
    with fast_attention(host.model):
        packed = Loss(host.model)(PackingCollator()(rows))
    alone = sum(Loss(host.model)(Collator(0)([row]), total) for row in rows)
    torch.testing.assert_close(packed, alone)


def test_the_mask_of_all_pairs_is_not_built(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    seen: list[Tensor | None] = []
    build = modeling_llama.create_causal_mask

    def spy(**kwargs: Any) -> Any:
        seen.append(build(**kwargs))
        return seen[-1]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", spy)
    batch = PackingCollator()(make_rows())
    with fast_attention(model):
        model(**batch)
    model(**batch, use_cache=False)
    assert seen[0].numel() == 1
    assert seen[1].shape[-1] == batch["input_ids"].shape[1]


def test_only_this_model_and_only_inside(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab.engine import attention as bridge

    calls: list[int] = []
    compute = bridge.attention
    monkeypatch.setattr(bridge, "pays", lambda *_: True)
    monkeypatch.setattr(bridge, "attention", lambda *args, **kw: calls.append(1) or compute(*args, **kw))
    model, other = tiny("llama"), tiny("llama")
    ids = torch.arange(3, 12)[None]
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with fast_attention(model), fast_attention(model):
        fast = model(input_ids=ids).logits
        assert len(calls) == 2, "one for each layer"
        plain = other(input_ids=ids).logits
    again = model(input_ids=ids).logits
    assert len(calls) == 2
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(again, plain)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert not model.base_model._forward_pre_hooks


def test_what_cannot_be_packed_says_why(tiny: Callable[..., Any]) -> None:
    def why(model: nn.Module, collate: Any = None, longest: int = 12) -> str:
        chosen, reason = choose(model, collate or Collator(0), longest)
        assert not isinstance(chosen, PackingCollator)
        return reason

    llama = tiny("llama")
    attach(llama, PromptTuning(length=2))
    assert "mix positions" in why(llama)
    side = tiny("llama")
    attach(side, LST())
    assert "mix positions" in why(side)
    assert "encoder-decoder" in why(tiny("t5"), Collator(0, seq2seq=True))
    assert "function" in why(tiny("llama"), lambda rows: Collator(0)(rows))
    windowed = MistralForCausalLM(
        MistralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=1, sliding_window=20)
    )  # fmt: skip
    assert "sliding_window of 20" in why(windowed, longest=21)
    assert obstacle(windowed, Collator(0), 20) == ""
    with pytest.raises(ConfigError, match=r"packing=true.*mix positions.*null or false"):
        choose(llama, Collator(0), 12, wanted=True)


def test_a_model_that_does_not_separate_samples_is_found_out(tiny: Callable[..., Any]) -> None:
    class Leaky(nn.Module):
        """Adds to each position what stood before it."""

        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.1 * x.cumsum(1)

    model = tiny("llama")
    model.model.layers[0].mlp = Leaky(model.model.layers[0].mlp)
    assert "another loss" in obstacle(model, Collator(0), 12)


def test_a_run_packs_by_itself_and_a_step_is_the_same(tiny: Callable[..., Any]) -> None:
    rows, records = make_rows(16), []
    for packing in (None, False):
        torch.manual_seed(0)
        host = attach(tiny("llama"), LoRA(r=2))
        training = Training(steps=3, batch_size=4, accumulation=2, lr=1e-2, packing=packing, warmup=0)
        loop = Loop(host, "default", rows, training, eval_rows=rows[:6])
        assert isinstance(loop.collate, PackingCollator) == (packing is None)
        records.append([loop.step() for _ in range(3)] + [{"eval": loop.evaluate()}])
    for packed, padded in zip(*records, strict=True):
        for key in packed.keys() - {"seconds", "memory"}:
            assert packed[key] == pytest.approx(padded[key], rel=1e-4), key


def test_packed_batches_behind_each_other_are_one_batch_of_all_rows() -> None:
    rows, pack = make_rows(7), PackingCollator()
    found, wanted = joined([pack(rows[:3]), pack(rows[3:4]), pack(rows[4:])]), pack(rows)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
        assert torch.as_tensor(found[key]).dtype == torch.as_tensor(value).dtype


def test_evaluation_packs_by_itself(tiny: Callable[..., Any]) -> None:
    model, rows = tiny("gpt2"), make_rows(9)
    packed, tokens = evaluate_loss(model, rows, Collator(0), 4)
    padded, same = evaluate_loss(model, rows, Collator(0), 4, packing=False)
    assert tokens == same
    assert packed == pytest.approx(padded, rel=1e-5)
    with pytest.raises(ConfigError, match=r"packing=true.*function makes the batches"):
        evaluate_loss(model, rows, lambda rows: Collator(0)(rows), packing=True)
