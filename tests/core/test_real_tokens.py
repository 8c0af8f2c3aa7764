"""Which tokens of a batch are real, as an adapter at any module is told it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

import adapterlab as al
from adapterlab.core.adapter import Adapter
from adapterlab.data import PackingCollator
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.errors import AttachError

NAME = "default"
Told = dict[str, list[Tensor | None]]


class Counting(al.Method):
    """Writes down what it is told, and changes nothing."""

    targets: tuple[str, ...]
    adds: bool = True

    def attach(self, host: Any, name: str) -> None:
        for site in host.sites(al.Targets(include=self.targets), ("linear",)):
            host.wrap(name, site, (Adding if self.adds else Around)(site, host.state))


class Part(Adapter):
    counts_tokens = True

    def __init__(self, site: Any, state: Any):
        super().__init__(site)
        self.state, self.told = state, []

    def ask(self, x: Tensor) -> None:
        real = self.state.real_tokens(x)
        assert real is None or (real.dtype is torch.bool and real.shape == x.shape[:-1])
        self.told.append(real)


class Adding(Part):
    def added(self, x: Tensor) -> Tensor:
        self.ask(x)
        return x.new_zeros(*x.shape[:-1], self.site.shape[0])


class Around(Part):
    def around(self, run: Any, x: Tensor) -> Tensor:
        self.ask(x)
        return run(x)


def counting(model: Any, *targets: str, adds: bool = True, name: str = NAME) -> Any:
    host = al.host(model)
    if host is None:
        return al.attach(model, Counting(targets=targets, adds=adds), name)
    host.attach(Counting(targets=targets, adds=adds), name)
    return host


def told(host: Any, name: str = NAME) -> Told:
    """What the adapters were told since the last time."""
    found = {}
    for path, part in host.adapters(name).items():
        found[path], part.told = part.told, []
    return found


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is wanted if found is None or wanted is None else torch.equal(found, wanted.bool())


def padded(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    mask = mask.flip(1) if left else mask
    ids = torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "mixtral"])
def test_padding_on_either_side(family: str, left: bool, tiny: Any) -> None:
    model = tiny(family)
    host, batch = counting(model, "all-linear"), padded(3, 5, 4, left=left)
    model(**batch)
    for path, (real,) in told(host).items():
        if path.endswith("pooler.dense"):
            assert real is None  # one vector for each row
        else:  # flattened where experts of the base choose
            assert same(real, batch["attention_mask"].view(real.shape)), path  # type: ignore[union-attr]
    model(input_ids=batch["input_ids"])
    assert all(same(real, None) for (real,) in told(host).values())


def test_a_head_is_told_what_it_sees(tiny: Any) -> None:
    model = tiny("qwen2")
    host, batch = counting(model, "head"), padded(3, 5)
    model(**batch)
    model(**batch, logits_to_keep=2)
    model(**batch, logits_to_keep=torch.tensor([0, 3]))
    mask = batch["attention_mask"]
    assert all(map(same, told(host)["lm_head"], (mask, mask[:, -2:], mask[:, [0, 3]])))
    loss = Loss(model)
    told(host)
    loss({**batch, "labels": torch.where(mask == 1, batch["input_ids"], -100)})
    assert loss.path == "chunked"
    assert told(host)["lm_head"] == [None]


def test_packed_rows_have_no_padding(tiny: Any) -> None:
    model = tiny("llama")
    host = counting(model, "q", "down")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    with fast_attention(model):
        model(**PackingCollator()(rows))
    assert {real for found in told(host).values() for real in found} == {None}


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generation_counts_the_tokens_that_a_step_brings(options: dict[str, Any], tiny: Any) -> None:
    model = tiny("llama")
    host, batch = counting(model, "up"), padded(3, 5, left=True)
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, **options)
    mask = batch["attention_mask"].repeat_interleave(options.get("num_beams", 1), 0)
    for first, *more in told(host).values():
        assert same(first, mask) or same(first, batch["attention_mask"])
        assert len(more) == 2
        assert all(same(real, torch.ones(len(mask), 1)) for real in more)


def seq2seq(kind: str, tiny: Any) -> Any:
    if kind == "t5":
        return tiny("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    config = BartConfig(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)  # type: ignore[arg-type]
    return BartForConditionalGeneration(config).eval()


def sides(host: Any) -> tuple[list[str], list[str], list[str]]:
    """Paths of an encoder, of what in the decoder reads the decoder, and of what there reads the encoder."""
    paths = list(host.adapters(NAME))
    inside = [p for p in paths if "decoder" in p]
    memory = [p for p in inside if p.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
    memory += [p for p in inside if p.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))]
    return [p for p in paths if "encoder." in p and p not in inside], [p for p in inside if p not in memory], memory


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_and_decoder_each_have_their_own(kind: str, tiny: Any) -> None:
    """Also where both are equally long."""
    model = seq2seq(kind, tiny)
    host, batch = counting(model, "all-linear"), padded(3, 5)
    labels = torch.tensor([[4, 5, 6, 2, -100], [7, 2, -100, -100, -100]])
    encoder, decoder, memory = sides(host)
    assert all((encoder, decoder, memory))
    ids = torch.tensor([[0, 4, 5, 6, 0], [0, 7, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    cases: Sequence[tuple[dict[str, Tensor], Tensor]] = (
        ({"labels": labels}, labels != -100),
        ({"labels": labels[:, :4].contiguous()}, labels[:, :4] != -100),
        ({"decoder_input_ids": ids, "decoder_attention_mask": real}, real),
        ({"decoder_input_ids": ids}, real),  # filled up
    )
    for given, wanted in cases:
        model(**batch, **given)
        found = told(host)
        for paths, mask in ((encoder, batch["attention_mask"]), (decoder, wanted), (memory, batch["attention_mask"])):
            assert all(same(found[path][0], mask) for path in paths), (given.keys(), paths)


@pytest.mark.parametrize("mode", ["full", "cheap"])
def test_a_block_that_is_computed_again_is_told_the_same(mode: str, tiny: Any) -> None:
    model = tiny("llama").train()
    host, batch = counting(model, "q", "up"), padded(3, 5)  # the end of a block is not needed again
    host.attach(al.LoRA(r=2, targets=["v"]), "lora")
    host.recompute(mode)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for found in told(host).values():
        assert len(found) == 2
        assert all(same(real, batch["attention_mask"]) for real in found)


@pytest.mark.parametrize("adds", [True, False])
def test_rows_with_adapters_of_their_own(adds: bool, tiny: Any) -> None:
    model = tiny("mixtral")
    host = counting(model, "q", "o", adds=adds, name="one")
    counting(model, "q", adds=adds, name="two")
    host.attach(al.AdapterParallel(m=2), "block")
    batch, names = padded(3, 5, 2, 4), ["two", "one", "block", "one"]
    with host.rows(names):
        model(**batch)
    mask = batch["attention_mask"]
    assert all(same(real, mask[[1, 3]]) for (real,) in told(host, "one").values())
    assert all(same(real, mask[:1]) for (real,) in told(host, "two").values())


def test_where_padding_cannot_be_told_is_an_error(tiny: Any) -> None:
    model = tiny("llama")
    host = counting(model, "q")
    host.attach(al.PromptTuning(length=2), "prompt")
    model(**padded(4, 4))
    assert all(same(real, None) for (real,) in told(host).values())
    with pytest.raises(AttachError, match=r"gets \[2, 7, 32\] sees cannot be told"):
        model(**padded(3, 5))
    assert host.state.calls == []
    with host.using(NAME):
        model(**padded(3, 5))


def test_models_without_tokens_have_real_ones(tiny: Any, batch_for: Any) -> None:
    model = tiny("vit")
    host = counting(model, "q", "down")
    model(**batch_for(model))
    assert {real for found in told(host).values() for real in found} == {None}


def hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_only_models_that_are_asked_are_watched(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=2), "lora")
    assert hooks(model) == 0
    with pytest.raises(AttachError, match="counts_tokens = True"):
        host.state.real_tokens(torch.zeros(1, 2, 3))
    counting(model, "q")
    assert hooks(model) == 4
    again = copy.deepcopy(model)
    again(**padded(3, 5))
    assert al.host(again).state.calls == []
    assert all(same(real, padded(3, 5)["attention_mask"]) for (real,) in told(al.host(again)).values())
    assert not any(found for found in told(host).values())
    host.detach(NAME)
    assert hooks(model) == 0
    assert host.state.calls is None


def test_what_parts_are_used_is_summed_over_real_tokens(tiny: Any) -> None:
    model = tiny("llama")
    host, batch = counting(model, "q"), padded(3, 5)
    weights = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    path = next(iter(host.adapters(NAME)))
    module = host.module(path)
    module.register_forward_pre_hook(lambda _, args: host.state.observe(path, args[0], weights))
    with host.state.observing() as seen:
        model(**batch)
        model(**batch)
    wanted = 2 * weights[batch["attention_mask"].bool()].sum(0)
    assert torch.allclose(seen[path], wanted)
    model(**batch)
    assert host.state.observed is None
