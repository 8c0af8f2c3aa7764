"""The plan before a run: kept, late, refused, forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterlab.errors import ConfigError
from adapterlab.plan import Device, Plan, before_run, plan, planning
from adapterlab.plan.before_run import announced, early_plan, least_weights, remember
from adapterlab.plan.planning import arguments, setup_of
from adapterlab.train.config import TrainConfig

SIZES: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
Make = Callable[[str], TrainConfig]


class Never:
    """A plan in the making that does not come in time."""

    instances: list[Never] = []
    found: Plan | None = None

    def __init__(self, config: TrainConfig, start: before_run.Start):
        self.waited: list[float] = []
        self.stopped = False
        self.instances.append(self)

    def result(self, seconds: float = 0.0) -> Plan | None:
        self.waited.append(seconds)
        return self.found

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(before_run, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(before_run, "Beside", Never)
    monkeypatch.setattr(Never, "instances", [])
    monkeypatch.setattr(Never, "found", None)
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    data = {"path": str(tmp_path / "rows.jsonl"), "max_length": 32}

    def made(device: str) -> TrainConfig:
        return TrainConfig(model=str(tmp_path / "model"), data=data, output=tmp_path / "run", device=device)

    return made


def keep(config: TrainConfig) -> Plan:
    given = arguments(config)
    place = Device.parse(config.device)
    method = given.pop("method")
    found = plan(config.model, method, **given, device=place)
    remember(setup_of(config.model, method, **given, kind=place.kind), place, found)
    return found


def shown(config: TrainConfig, **options: Any) -> list[str]:
    told: list[str] = []
    with announced(config, told.append, **options):
        told.append("loading")
    return told


def test_a_kept_plan_is_told_before_the_weights_load_and_starts_nothing(make: Make) -> None:
    config = make("cpu:10MB")
    wanted = keep(config)
    first, second = shown(config, force=True)
    assert second == "loading"
    assert before_run.size(wanted.process) in first
    assert not Never.instances


def test_a_run_waits_only_where_the_weights_may_not_fit(make: Make) -> None:
    assert shown(make("cpu:10MB")) == ["loading"]
    (beside,) = Never.instances
    assert beside.waited == [0.0]  # it looks, once, when all is loaded
    assert beside.stopped


def test_a_run_waits_for_a_moment_where_they_may_not(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_run, "_STAKE", 0.0)
    assert shown(make("cpu:10MB")) == ["loading"]
    assert Never.instances[0].waited == [before_run.WAIT, 0.0]
    assert before_run.WAIT <= 2


def test_a_late_plan_is_told_when_all_is_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("cpu:10MB")
    monkeypatch.setattr(Never, "found", plan(config.model, "lora", length=32, device="cpu:10MB"))
    first, second = shown(config)
    assert (first, second[:6]) == ("loading", "Plan: ")


def test_a_trifle_needs_no_plan(make: Make) -> None:
    assert shown(make("cpu:64GB")) == ["loading"]
    assert not Never.instances


def test_a_quiet_run_starts_no_child(make: Make) -> None:
    assert shown(make("cpu:10MB"), make=False) == ["loading"]
    assert not Never.instances


def test_weights_that_cannot_fit_are_refused_without_a_plan_unless_forced(make: Make) -> None:
    config = make("cpu:0.1MB")
    with pytest.raises(ConfigError, match=r"lora on .*cannot fit on cpu:0.1MB: its weights alone.*--force"):
        shown(config)
    assert Never.instances[0].stopped
    assert shown(config, force=True) == ["loading"]


def test_a_plan_adds_adapter_and_optimizer_to_what_is_refused(make: Make) -> None:
    config = make("cpu:10MB")
    found = keep(config)
    weights = least_weights(setup_of(config.model, "lora", batch=1, length=32))
    limit = (weights + found.base + found.adapter + found.state) // 2
    tight = make(f"cpu:{limit / 2**20:.6f}MB")
    keep(tight)
    with pytest.raises(ConfigError, match=r"weights, adapter and optimizer alone.*--force"):
        shown(tight)
    assert [line[:5] for line in shown(tight, force=True)] == ["Plan:", "loadi"]


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_weights_are_counted_without_making_them(make: Make, quantize: str | None) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    every = sum(p.numel() for p in model.parameters())
    packed = {None: 2.0, "nf4": 0.5, "int8": 1.0}[quantize]
    setup = setup_of(make("cpu").model, "lora", batch=1, length=32, quantize=quantize)
    assert least_weights(setup) == int(2 * (every - linear) + packed * linear)


def test_no_plan_is_made_without_time(make: Make) -> None:
    assert early_plan(make("cpu:10MB")) is None


# ---------------------------------------------------------------------- several devices


def _gpus(monkeypatch: pytest.MonkeyPatch, *sizes: int, cpu: int = 0) -> None:
    """Let this machine have GPUs of so many bytes, and so much of the CPU's memory left."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=sizes[i]))
    monkeypatch.setattr(before_run, "_left", lambda: cpu)


def test_a_spread_model_is_compared_with_all_devices_together(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("cpu").model_copy(update={"parallel": "device_map", "device": None})
    weights = least_weights(setup_of(config.model, "lora", batch=1, length=32))
    third = weights * 2 // 5  # two of these hold less than the weights, three hold more
    _gpus(monkeypatch, third, third)
    with pytest.raises(ConfigError, match=r"cannot fit on 2 x cuda and in the CPU's memory: its weights alone"):
        shown(config)
    assert shown(config, force=True) == ["loading"]
    _gpus(monkeypatch, third, third, cpu=third)
    assert shown(config) == ["loading"], "what has no room waits in the CPU's memory"
    _gpus(monkeypatch, third, third, third // 2, third)
    assert shown(config) == ["loading"]
    place = planning.place_of(config)
    assert (place.count, place.memory) == (4, 3 * third + third // 2)
    found = early_plan(config, seconds=600)
    assert found is not None
    assert (found.devices, found.parallel, found.limit) == (4, "device_map", place.memory)
    assert "on all 4 devices (device_map)" in before_run.line(found)
    one = planning.plan_config(config, device="cuda:24GB", devices=1)
    assert (found.peak, found.base) == (one.peak, one.base)
    assert found.process - one.process == 3 * Device("cuda").context
    with pytest.raises(ConfigError, match=r"weights, adapter and optimizer alone"):
        before_run.check_fits(config, replace(found, limit=found.base))


def test_each_of_several_processes_is_planned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("cpu")
    weights = least_weights(setup_of(config.model, "lora", batch=1, length=32))
    monkeypatch.setattr(before_run, "_TRIFLE", 0.0)
    monkeypatch.setattr(before_run, "_left", lambda: 3 * weights // 2)  # each of two has three quarters of it
    halves, copies = before_run.Start(2, 2, "fsdp"), before_run.Start(2, 2, "ddp")
    assert shown(config, start=halves) == ["loading"]
    with pytest.raises(ConfigError, match=r"cannot fit on cpu \(for each of 2 processes\): its weights alone"):
        shown(config, start=copies)
    assert shown(config, start=before_run.Start(2, 1, "ddp")) == ["loading"], "another machine has the other one"
    found = early_plan(config, 600, halves)
    assert found is not None
    assert (found.devices, found.parallel, found.limit) == (2, "fsdp", 3 * weights // 2 // 2)
    assert "on each of 2 devices (fsdp)" in before_run.line(found)
    offloaded = config.model_copy(update={"cpu_offload": True})
    assert early_plan(offloaded, 600, halves) is None, "what waits elsewhere is not planned, so it refuses nothing"
