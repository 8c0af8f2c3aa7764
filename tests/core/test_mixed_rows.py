"""Rows of one batch with adapters of different methods, beams included, and models that share an attention function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import adapterlab as al
from adapterlab.core.adapter import Adapter
from adapterlab.errors import AttachError, MergeError
from adapterlab.foreign.cache import NAMES
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
    config = MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2)
    model = MptForCausalLM(config)
    with pytest.raises(AttachError, match=r"MptAttention(.|\n)*attention interface(.|\n)*Choose a method"):
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


class Custom(al.Method):
    """Stands for a method of its own."""

    def attach(self, host: Any, name: str) -> None:
        return None


class Louder(Adapter):
    """Changes what a block is given."""

    shares_base = True

    def around(self, run: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(1.5 * x, *args, **kwargs)


class Reading(Adapter):
    """Looks into the cache that a block is given."""

    shares_base = True

    def around(self, run: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for cache in (kwargs[name] for name in NAMES if kwargs.get(name) is not None):
            cache.get_seq_length()
        return run(x, *args, **kwargs)


@pytest.mark.parametrize("adapter", [Louder, Reading])
def test_a_cache_that_a_part_cannot_use_is_refused_with_both_ways_out(tiny: Any, adapter: type[Adapter]) -> None:
    model = tiny("llama")
    host = al.attach(model, Custom(), "loud")
    for layer in host.layers:
        host.wrap("loud", layer, adapter(host.site(layer)))
    host.attach(MIX["lora"](), "lora")
    ids = torch.arange(3, 13).view(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    said = r"An adapter changes what a block .* key-value cache .*cannot be split by rows.*host\.using.*use_cache=False"
    with host.rows(["loud", "lora"]):
        with pytest.raises(AttachError, match=said):
            model.generate(ids, **options)
        together = model.generate(ids, use_cache=False, **options)
    for row, name in enumerate(("loud", "lora")):
        with host.using(name):
            assert torch.equal(model.generate(ids[row : row + 1], **options)[0], together[row])


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
ROUTED = {**DECODER, "num_experts_per_tok": 2}
T5ISH: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**ROUTED, num_local_experts=4, head_dim=8, layer_types=["full_attention"])
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**ROUTED, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**ROUTED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5ISH)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**T5ISH, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    ),
    "xlnet": lambda: XLNetForSequenceClassification(
        XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48, num_labels=3)
    ),
}


def attached(family: str, methods: list[Any], randomise: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    host = al.attach(model, methods[0], "0")
    for i, method in enumerate(methods[1:], 1):
        host.attach(method, str(i))
    randomise(host, size=0.2)
    return model, host


@pytest.mark.parametrize("rows", [2, 4], ids=["fewer rows than heads", "as many rows as heads and tokens"])
@pytest.mark.parametrize(
    ("family", "methods"),
    [
        ("gpt_oss", [al.LoRA(r=2, targets=["q"]), al.PrefixTuning(length=2)]),
        ("gpt2", [al.LoRA(r=2, targets=[r".*\.wpe"]), al.LoRA(r=2, targets=[r".*\.wte"])]),
        ("gpt2", [al.DoRA(r=2, targets=[r".*\.wpe"]), al.LoRA(r=2, targets=[r".*\.wte"])]),
        ("bert", [al.LoRA(r=2, targets=[r".*\.position_embeddings", r".*pooler\.dense"]), al.DoRA(r=2, targets=["v"])]),
        ("mixtral", [al.AdapterParallel(m=4), al.LoRA(r=2, targets=["q"], modules_to_save=["gate"])]),
        ("qwen2_moe", [al.LoRA(r=2, targets=[r".*shared_expert\..*"]), al.DoRA(r=2, targets=[r".*shared_expert\..*"])]),
    ],
    ids=["sinks", "positions added", "positions", "pooled", "router", "flattened tokens"],
)
def test_rows_are_what_the_batch_has_and_nothing_else_of_that_size(
    family: str, methods: list[Any], rows: int, randomise: Any, logits: Any
) -> None:
    model, host = attached(family, methods, randomise)
    ids = torch.randint(3, 60, (rows, 4), generator=torch.Generator().manual_seed(0))
    names = ["1", "0", None, "1"][:rows]
    with host.rows(names):
        mixed = logits(model, {"input_ids": ids})
    for row, name in enumerate(names):
        with host.using(*([name] if name else [])):
            alone = logits(model, {"input_ids": ids})[row]
        assert torch.allclose(mixed[row], alone, atol=1e-5), name
    assert not any(module._forward_pre_hooks for module in model.modules()), "nothing is left behind"


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("t5", [r".*relative_attention_bias"], "numbers .* that were made inside the model"),
        ("switch", ["wi", "wo"], "one of several modules that tokens may be chosen for"),
        ("xlnet", [r".*layer_1"], "the model goes by time first"),
    ],
)
def test_what_cannot_be_told_apart_by_rows_is_refused(
    family: str, targets: list[str], said: str, randomise: Any
) -> None:
    model, host = attached(family, [al.LoRA(r=2, targets=targets)], randomise)
    ids = torch.arange(3, 19).view(4, 4)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if family in ("t5", "switch") else {})}
    with pytest.raises(AttachError, match=f"cannot be told apart at .*{said}"), host.rows(["0", None, "0", None]):
        model(**batch)
    model(**batch)


def test_stacked_slots_follow_flattened_tokens(randomise: Any, logits: Any) -> None:
    low = [al.LoRA(r=2, targets=["q", r".*shared_expert\..*"]), al.LoRA(r=3, targets=["v"])]
    model, host = attached("qwen2_moe", low, randomise)
    ids = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(0))
    with host.rows(["0", None, "1"]):
        expected = logits(model, {"input_ids": ids})
    with host.stack("0", "1") as stack:
        stack.rows(["0", None, "1"])
        assert torch.allclose(logits(model, {"input_ids": ids}), expected, atol=1e-5)
