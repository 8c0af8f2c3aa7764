"""Rows of one batch with adapters of different methods, beams included, and models that share an attention function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import adapterlab as al
from adapterlab.errors import AttachError, MergeError
from adapterlab.testing import models

MIX = {
    "lora": lambda: al.LoRA(r=4, targets=["q", "v", "down"]),
    "dora": lambda: al.DoRA(r=4, targets=["q", "up"]),
    "ia3": lambda: al.IA3(),
    "hra": lambda: al.HRA(r=4, targets=["v", "down"]),
    "parallel": lambda: al.AdapterParallel(m=4),
    "prefix": lambda: al.PrefixTuning(length=3),
    "mixture": lambda: al.MoLoRA(r=2, targets=["q"]),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_any_mix_of_methods_equal_separate_runs(family: str, tiny: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    chosen = [name for name in MIX if family == "llama" or name not in ("lora", "dora", "hra", "mixture")]
    host = al.attach(model, MIX[chosen[0]](), chosen[0])
    for name in chosen[1:]:
        host.attach(MIX[name](), name)
    randomise(host, size=0.2)
    names = [*chosen[::-1], None, *chosen[:2]]
    ids = torch.randint(3, 100, (len(names), 7), generator=torch.Generator().manual_seed(0))
    with host.rows(names):
        mixed = logits(model, {"input_ids": ids})
    answers = []
    for row, name in enumerate(names):
        with host.using(*([name] if name else [])):
            alone = logits(model, {"input_ids": ids})[row]
        assert torch.allclose(mixed[row], alone, atol=1e-4), name
        answers.append(alone)
    assert min(float((a - b).abs().max()) for i, a in enumerate(answers) for b in answers[:i]) > 1e-3


def test_beams_keep_the_adapter_of_their_row(tiny: Any, randomise: Any) -> None:
    model, ids = tiny("llama"), torch.arange(3, 18).view(3, 5)
    options: dict[str, Any] = {
        "num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    host = al.attach(model, MIX["lora"](), "lora")
    host.attach(MIX["prefix"](), "prefix")
    randomise(host, size=0.3)
    names = ["prefix", None, "lora"]
    with host.rows(names):
        together = model.generate(ids, **options)
    alone = []
    for row, name in enumerate(names):
        with host.using(*([name] if name else [])):
            alone.append(model.generate(ids[row : row + 1], **options)[0])
    assert torch.equal(together, torch.stack(alone))
    with host.using():
        base = model.generate(ids, **options)
    assert not torch.equal(base, together), "the adapters must change the answers for this to mean something"


def test_two_models_of_one_class_have_their_own_attention(tiny: Any, randomise: Any, logits: Any) -> None:
    """The attention function belongs to a class of models; whose adapters are used is told by the module."""
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    untouched, one, two = tiny("llama"), tiny("llama"), tiny("llama")
    base = logits(untouched, batch)
    first = al.attach(one, al.PrefixTuning(length=3))
    randomise(first)
    alone = logits(one, batch)
    second = al.attach(two, al.PrefixTuning(length=5))
    randomise(second)
    other = logits(two, batch)
    assert torch.equal(logits(one, batch), alone)
    assert torch.equal(logits(untouched, batch), base)
    assert len({float(values.sum()) for values in (base, alone, other)}) == 3
    first.detach("default")
    assert torch.equal(logits(one, batch), base)
    assert torch.equal(logits(two, batch), other)


def test_merging_needs_to_know_what_becomes_of_tied_and_packed_weights(tiny: Any) -> None:
    tied = al.attach(tiny("llama-tied"), al.LoRA(r=2, targets=["embed"]))
    with pytest.raises(MergeError, match=r"model\.embed_tokens is tied(.|\n)*tied='untie'"):
        tied.merge()
    tied.merge(tied="untie")
    tied.restore()
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
    pytest.importorskip("bitsandbytes")
    packed = al.attach(models.tiny("llama", "nf4"), al.LoRA(r=2, targets=["q"]))
    with pytest.raises(MergeError, match=r"stored packed(.|\n)*quantized='dequantize'"):
        packed.merge()


def test_a_model_outside_the_attention_interface_is_refused_and_left_alone() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = BloomForCausalLM(config)
    with pytest.raises(AttachError, match=r"BloomAttention(.|\n)*attention interface(.|\n)*Choose a method"):
        al.attach(model, al.PrefixTuning(length=2))
    assert al.host(model) is None


def test_rows_need_one_entry_each_and_known_names(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=2, targets=["q"]), "north")
    ids = torch.arange(3, 18).view(3, 5)
    with pytest.raises(AttachError, match="2 rows and the batch has 3"), host.rows(["north", None]):
        model(ids)
    with pytest.raises(AttachError, match=r"'nort'(.|\n)*north"), host.rows(["nort"]):
        model(ids[:1])


def test_beams_around_a_block_and_inside_it(tiny: Any, randomise: Any, logits: Any) -> None:
    """Groups of a block keep their rows for the modules inside, also when beams repeat every row."""
    model = tiny("llama")
    host = al.attach(model, MIX["parallel"](), "block")
    for name in ("lora", "ia3"):
        host.attach(MIX[name](), name)
    randomise(host, size=0.3)
    names = ["lora", "block", "ia3"]
    ids = torch.arange(3, 18).view(3, 5).repeat_interleave(3, 0)
    with host.rows(names):
        mixed = logits(model, {"input_ids": ids})
    for row, name in enumerate(names):
        with host.using(name):
            alone = logits(model, {"input_ids": ids})[3 * row : 3 * row + 3]
        assert torch.allclose(mixed[3 * row : 3 * row + 3], alone, atol=1e-4), name
