"""The list of fast paths: it says what a run really does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import adapterlab as al
from adapterlab.registry import method
from adapterlab.testing import models
from adapterlab.train import Training
from adapterlab.train.fast_paths import FastPath, fast_paths
from adapterlab.train.loop import Loop
from adapterlab.train.run import fit

Rows = list[dict[str, list[int]]]


def paths(host: Any, rows: Rows, **training: Any) -> dict[str, FastPath]:
    loop = Loop(host, "default", rows, Training(steps=1, batch_size=2, **training))
    return {path.name: path for path in fast_paths(loop)}


def kernels(host: Any) -> int:
    """Calls of this package's operators in one forward pass in training."""
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name.startswith("adapterlab::"):
                calls.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    host.model.train()
    with Watch():
        host.model(**models.batch(host.model))
    return len(calls)


@pytest.mark.parametrize(
    ("name", "settings", "precision", "fused"),
    [
        ("lora", {}, "fp32", 14),
        ("lora", {"dropout": 0.1, "lora_bias": True}, "bf16", 14),
        ("lora", {}, "nf4", 14),
        ("lora", {}, "int8", 0),
        ("dora", {}, "fp32", 14),
        ("dora", {"dropout": 0.1}, "fp32", 0),
        ("adapter_pfeiffer", {}, "fp32", 0),
        ("lora_dropout", {}, "fp32", 14),
        ("molora", {}, "fp32", 14),
    ],
)
def test_what_is_called_fused_is_fused(
    name: str, settings: dict[str, Any], precision: str, fused: int, rows: Rows
) -> None:
    if "lora" in name or name == "dora":
        settings = {"targets": ["q", "k", "v", "o", "gate", "up", "down"], **settings}
    host = al.attach(models.tiny("llama", precision), method(name)(**settings))
    found = paths(host, rows)["fused products"]
    assert found.on == (fused > 0)
    assert found.why.startswith(f"{fused} of ")
    assert kernels(host) == fused
    if not fused:
        assert ": " in found.why, "it says why"


def test_what_stands_between_is_named(rows: Rows) -> None:
    host = al.attach(models.tiny("llama"), al.LoRA(r=2, targets=["q", "v"]), "first")
    host.attach(al.LoRA(r=2, targets=["q", "k"]))
    found = paths(host, rows)["fused products"]
    assert not found.on
    assert found.why == "2 of 4 modules; 2: 'first' stands between"


def test_a_trained_base_weight_is_named(rows: Rows) -> None:
    host = al.attach(models.tiny("llama"), al.LoRA(r=2, targets=["q"]))
    host.own("default", "model.layers.1.self_attn.q_proj.weight")
    assert paths(host, rows)["fused products"].why == "1 of 2 modules; 1: the base weight trains"


@pytest.mark.parametrize(
    ("targets", "on", "why"),
    [
        ({"include": ["q"], "layers": [1]}, True, "below layer 1"),
        ({"include": ["q"]}, False, "down to the first layer"),
        ({"include": ["embed_tokens"]}, False, "down to model.embed_tokens"),
        ({"include": ["lm_head"]}, True, "below lm_head"),
    ],
)
def test_where_gradients_stop(targets: dict[str, Any], on: bool, why: str, rows: Rows) -> None:
    host = al.attach(models.tiny("qwen2"), al.LoRA(r=2, targets=al.Targets(**targets)))
    found = paths(host, rows)["gradient stops"]
    assert found.on == on
    assert why in found.why


def test_settings_of_the_run_show(rows: Rows) -> None:
    host = al.attach(models.tiny("llama"), al.LoRA(r=2))
    found = paths(host, rows, recompute="cheap", packing=False)
    assert found["recomputation"].on
    assert found["recomputation"].why.startswith("cheap, products")
    assert not found["offload"].on
    assert not found["packing"].on
    assert found["loss"].on
    assert found["optimizer"].why == "AdamW, fused"
    galore = al.attach(models.tiny("llama"), method("galore")())
    assert not paths(galore, rows)["optimizer"].on


def test_run_json_has_them(config: Callable[..., dict[str, Any]]) -> None:
    fields = config(steps=1, warmup=0)
    fit(fields, quiet=True)
    facts = json.loads((Path(fields["output"]) / "run.json").read_text())
    found = {path["name"]: path for path in facts["fast_paths"]}
    assert found["fused products"]["on"] is True
    assert {"loss", "attention", "packing", "recomputation", "offload", "optimizer"} <= found.keys()
