"""Trainable parameters on Llama shapes, by formulas written out here and by published figures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import adapterlab as al
from adapterlab.hosts import Host
from adapterlab.registry import method

Shape = tuple[int, int]

# (hidden, intermediate, key and value rows, layers); the vocabulary plays no part here.
SIZES = {
    "llama-3.2-1b": (2048, 8192, 512, 16),
    "llama-2-7b": (4096, 11008, 4096, 32),
    "smollm2-135m": (576, 1536, 192, 30),
}
QV = ["q", "v"]
ALL = ["all-linear"]


def shapes(size: str, targets: list[str]) -> list[Shape]:
    """(out, in) of every adapted module."""
    h, i, kv, layers = SIZES[size]
    each = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}
    return [shape for name, shape in each.items() if targets == ALL or name in targets] * layers


def llama(size: str, layers: int | None = None, device: str = "meta") -> Any:
    """A Llama of these shapes; on the meta device it has no values and takes no memory."""
    h, i, kv, count = SIZES[size]
    heads = 64 if size != "llama-2-7b" else 128
    config = LlamaConfig(
        vocab_size=64, hidden_size=h, intermediate_size=i, num_hidden_layers=layers or count,
        num_attention_heads=h // heads, num_key_value_heads=kv // heads, head_dim=heads, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


def trained(model: Any, id: str, **fields: Any) -> int:
    host = al.attach(model, method(id).model_validate(fields))
    return sum(p.numel() for p in host.parameters("default"))


def lora(out: int, in_: int, r: int = 8) -> int:
    return r * (in_ + out)


# Divisor pairs nearest to the square root.
NEAR = {192: (12, 16), 512: (16, 32), 576: (24, 24), 1536: (32, 48), 2048: (32, 64), 8192: (64, 128)}


def krona(out: int, in_: int) -> int:
    (a1, b1), (a2, b2) = NEAR[out], NEAR[in_]
    return a1 * a2 + b1 * b2


def lokr(out: int, in_: int, r: int) -> int:
    (a1, b1), (a2, b2) = NEAR[out], NEAR[in_]
    return a1 * a2 + (r * (b1 + b2) if r < max(b1, b2) / 2 else b1 * b2)


def randlora(out: int, in_: int, r: int) -> int:
    low = min(out, in_)
    return math.ceil(low / r) * (r + low)


PLAIN = [
    "lora", "rslora", "lora_plus", "lora_dropout", "lora_drop", "dylora", "delta_lora", "pissa", "olora", "milora",
    "eva", "corda", "lora_ga", "relora", "chain_of_lora", "periodic_lora",
]  # fmt: skip
ROWS: list[tuple[str, dict[str, Any], Callable[..., int], int]] = [
    *((id, {"r": 8}, lora, 0) for id in PLAIN),
    ("qlora", {"base": "any", "r": 16}, functools.partial(lora, r=16), 0),
    ("adalora", {"init_r": 12}, lambda out, in_: 12 * (in_ + out + 1), 0),
    ("dora", {"r": 8}, lambda out, in_: 8 * (in_ + out) + out, 0),
    ("vera", {"r": 256}, lambda out, in_: out + 256, 0),
    ("krona", {}, krona, 0),
    ("lokr", {"r": 8}, functools.partial(lokr, r=8), 0),
    ("lokr", {"r": 30}, functools.partial(lokr, r=30), 0),
    ("loha", {"r": 4}, lambda out, in_: 2 * 4 * (in_ + out), 0),
    ("lora_xs", {"r": 16}, lambda out, in_: 256, 0),
    ("randlora", {"r": 32}, functools.partial(randlora, r=32), 0),
    ("randlora", {"r": 50}, functools.partial(randlora, r=50), 0),
    ("vblora", {"r": 4, "num_vectors": 256, "vector_length": 64}, lambda o, i: 4 * 256 * (i + o) // 64, 256 * 64),
    ("fourierft", {"n": 1000}, lambda out, in_: 1000, 0),
    ("miss", {"r": 64}, lambda out, in_: 64 * out, 0),
    ("oft", {}, lambda out, in_: in_ * 31 // 2, 0),
    ("oft", {"blocks": 4}, lambda out, in_: in_ * (in_ // 4 - 1) // 2, 0),
    ("oftv2", {}, lambda out, in_: in_ * 31 // 2, 0),
    ("oftv2", {"share": True}, lambda out, in_: 32 * 31 // 2, 0),
    ("oftv2", {"rescale": True}, lambda out, in_: in_ * 31 // 2 + out, 0),
    ("boft", {}, lambda out, in_: 2 * in_ * 7 // 2 + out, 0),
    ("boft", {"block_size": 4, "factors": 4}, lambda out, in_: 4 * in_ * 3 // 2 + out, 0),
    ("shira", {"r": 8}, lora, 0),
    ("delora", {"r": 8}, lambda out, in_: lora(out, in_) + 1, 0),
    ("intrinsic_said", {"d": 20000, "keep_projections": False}, lambda out, in_: 0, 20000),
]


@pytest.mark.parametrize("targets", [QV, ALL], ids=["q,v", "all-linear"])
@pytest.mark.parametrize("size", ["llama-3.2-1b", "smollm2-135m"])
@pytest.mark.parametrize(("id", "fields", "each", "once"), ROWS, ids=[f"{id}-{i}" for i, (id, *_) in enumerate(ROWS)])
def test_count_is_the_formula(
    id: str, fields: dict[str, Any], each: Callable[..., int], once: int, size: str, targets: list[str]
) -> None:
    layers = 1 if size == "llama-3.2-1b" else 2  # all are alike; large ones take seconds to draw
    part = shapes(size, targets)[: len(shapes(size, targets)) // SIZES[size][3] * layers]
    found = trained(llama(size, layers), id, targets=targets, **fields)
    assert found == once + sum(each(out, in_) for out, in_ in part)


@pytest.mark.parametrize(("id", "each"), [("lora_fa", lambda out, in_: 4 * out), ("loftq", lambda o, i: 4 * (o + i))])
def test_count_where_the_start_reads_the_weights(id: str, each: Callable[..., int]) -> None:
    found = trained(llama("smollm2-135m", 1, "cpu"), id, r=4, targets=QV)
    assert found == each(576, 576) + each(192, 576)


@pytest.mark.parametrize(("size", "id", "fields", "count"), [
    # Figures that are widely printed for these models: r=8 on q and v, and r=16 or 64 on all linear layers.
    ("llama-2-7b", "lora", {"r": 8, "targets": QV}, 4_194_304),
    ("llama-2-7b", "lora", {"r": 64, "targets": ALL}, 159_907_840),
    ("llama-3.2-1b", "lora", {"r": 8, "targets": QV}, 851_968),
    ("llama-3.2-1b", "lora", {"r": 16, "targets": ALL}, 11_272_192),
    ("llama-2-7b", "vera", {"r": 1024, "targets": ALL}, 1_589_248),
    ("llama-2-7b", "lora_xs", {"r": 64, "targets": ALL}, 224 * 4096),
    ("llama-2-7b", "oftv2", {"targets": ALL}, 17_649_664),
])  # fmt: skip
def test_whole_models(size: str, id: str, fields: dict[str, Any], count: int) -> None:
    assert trained(llama(size), id, **fields) == count


def test_fused_projections_with_fewer_keys_than_queries() -> None:
    config = Phi3Config(
        vocab_size=64, hidden_size=2048, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, pad_token_id=0,
    )  # fmt: skip
    blocks = (2048, 512, 512)
    with torch.device("meta"):
        whole, part = Phi3ForCausalLM(config), Phi3ForCausalLM(config)
    assert trained(whole, "lora", r=8, targets=["qkv"], blocks=blocks) == 2 * 8 * (3 * 2048 + 3072)
    enable = (True, False, True)
    assert trained(part, "lora", r=8, targets=["qkv"], blocks=blocks, enable=enable) == 2 * 8 * (2 * 2048 + 2560)


def test_sharing_after_the_choice_counts_once() -> None:
    """lora_drop: one of four layers keeps its own factors, the other three of each kind share a pair."""
    host = Host(llama("llama-3.2-1b", 4))
    kept = {f"adapter.model.layers.2.self_attn.{leaf}_proj.A": torch.empty(0) for leaf in "qv"}
    host.attach(
        method("lora_drop").model_validate({"r": 8, "targets": QV}), like={**kept, "shared.pair.A": torch.empty(0)}
    )
    assert sum(p.numel() for p in host.parameters("default")) == 2 * (lora(2048, 2048) + lora(512, 2048))
