"""Plans of serving, against what the engine has and against themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planning import config
from transformers import AutoModelForCausalLM

from adapterlab.errors import ConfigError, ModelError
from adapterlab.hosts import attach
from adapterlab.plan import plan_serving
from adapterlab.plan.planning import make_method
from adapterlab.serve import Engine, EngineSettings

METHODS: list[dict[str, Any]] = [
    {"name": "lora", "r": 4},
    {"name": "adapter_houlsby"},
    {"name": "ia3"},
    {"name": "prefix_tuning"},
    {"name": "pissa"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_pages_and_adapters_take_what_the_engine_gives_them(method: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    host = attach(model, make_method(method))
    host.save(tmp_path / "adapter")
    host.detach("default")
    settings = EngineSettings(memory_gb=0.01, page_tokens=8)
    planned = plan_serving(config(), method, length=20, precision="fp32", device="cpu:8GB", settings=settings)
    with Engine(model, settings=settings) as engine:
        state = engine.register("one", tmp_path / "adapter", pin=True)
        worker = engine._worker
        held = sum(t.nbytes for pool in worker.forward.pools.values() for t in (pool.keys, pool.values))
        assert planned.page == worker.forward.page_bytes == held / (worker.pages.count + 1)
        assert planned.adapter == state.bytes
        assert planned.paid_each == worker.pages.paid + worker.pages.held
    assert planned.base == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert planned.cache == 3 * planned.page, "20 tokens take three pages of 8"


def test_what_fits_is_what_a_plan_of_it_says_fits() -> None:
    given: Any = {"precision": "bf16", "length": 256, "device": "cuda:0.6GB"}
    one = plan_serving(config(), {"name": "lora", "r": 4}, **given)
    many = plan_serving(config(), {"name": "lora", "r": 4}, sequences=5, adapters=7, **given)
    added = 4 * one.cache + 6 * one.adapter_each + many.work - one.work
    assert many.total - one.total == added
    assert one.most_sequences is not None
    assert one.limit is not None
    most = plan_serving(config(), {"name": "lora", "r": 4}, sequences=one.most_sequences, **given)
    assert 0.9 * one.limit < most.total <= 1.01 * one.limit
    assert one.most_adapters == 1 + (one.limit - one.total) // one.adapter_each
    assert many.memory_gb == (5 * 16 + 7 * math.ceil(many.adapter / many.page)) * many.page / 1e9
    with pytest.raises(ConfigError, match="sequences=0"):
        plan_serving(config(), sequences=0, device="cuda:24GB")
    with pytest.raises(ModelError, match="cannot be served"):
        plan_serving(config("gemma3_text", head_dim=16, sliding_window=9), device="cuda:24GB")
