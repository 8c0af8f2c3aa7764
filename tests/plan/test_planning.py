"""Plans, limits, remedies, serving, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from adapterlab.cli import main
from adapterlab.errors import AttachError, ConfigError
from adapterlab.plan import Device, Plan, plan, plan_all
from adapterlab.plan.advice import changes, largest_batch, largest_length
from adapterlab.plan.report import save, shares, size
from adapterlab.train import Training

SIZES: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 4096, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL: dict[str, Any] = {"batch": 1, "length": 32, "device": "cuda:24GB"}


def config(kind: str = "llama", **changed: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **{**SIZES, **changed})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_plan_adds_up_and_survives_json() -> None:
    found = plan(config(), "lora", **SMALL)
    assert sum(found.parts.values()) == found.peak
    assert sum(found.layers) == found.parts["activations"]
    assert sum(shares(found).values()) == found.process
    assert found.verdict == "fits"
    assert found.seconds is None
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert not found.fits(found.peak // 2)
    assert found.fits(found.process)


def test_time_comes_from_the_speed() -> None:
    found = plan(config(), "lora", **SMALL, speed=2e12)
    assert found.seconds == pytest.approx(found.flops / 2e12)


def test_gradient_accumulation_and_shorter_labels_change_what_they_should() -> None:
    whole, half = (plan(config(), "lora", **{**SMALL, "length": 256}, labelled=share) for share in (1.0, 0.25))
    assert half.peak < whole.peak
    assert half.base == whole.base


@pytest.mark.parametrize(
    ("text", "kind", "memory"),
    [("cuda:24GB", "cuda", 24 * 2**30), ("cpu:512MB", "cpu", 2**29), ("RTX 4090", "cuda", 24 * 2**30)],
)
def test_devices(text: str, kind: str, memory: int) -> None:
    found = Device.parse(text)
    assert (found.kind, found.memory) == (kind, memory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:lots", r"'cuda:lots' has the size 'lots'.*24GB"),
        ("rtx4091", r"rtx4091.*rtx4090"),
        ("cuda:0GB", r"'0gb', which is none"),
        ("cuda:7", r"not on this machine.*cuda:24GB"),
    ],
)
def test_unknown_devices_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Device.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, r"batch=0 is too small.*1"),
        ({"length": 1}, r"length=1 is too small.*8"),
        ({"precision": "bf8"}, r"bf8.*bf16"),
        ({"quantize": "nf3"}, r"nf3.*nf4"),
        ({"labelled": 2.0}, r"labelled=2.0.*at most 1"),
        ({"method": "lorra"}, r"lorra.*lora"),
        ({"method": {"r": 8}}, r"needs a name.*lora"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"method": "lora", **SMALL, **options}
    with pytest.raises(ConfigError, match=message):
        plan(config(), given.pop("method"), **given)


def test_what_cannot_be_attached_is_said_as_in_a_run() -> None:
    with pytest.raises(AttachError, match="bitfit would train nothing"):
        plan(config(), "bitfit", **SMALL)


@pytest.mark.parametrize("method", ["relora", "chain_of_lora", "delta_lora", "adalora"])
def test_schedules_find_the_room_of_a_run(method: str) -> None:
    planned = plan(config(), method, **SMALL, training=Training(warmup=20))
    assert planned.method == method
    with pytest.raises(ConfigError, match="warmup=20 steps are more than the 10"):
        plan(config(), method, **SMALL, training=Training(warmup=20, steps=10))


def test_packed_bases_come_with_methods_that_ask_for_them() -> None:
    pytest.importorskip("bitsandbytes")
    found = plan(config(), "qlora", **SMALL)
    assert found.quantize == "nf4"
    assert found.base < plan(config(), "lora", **SMALL).base


def _needs(model: Any, **options: Any) -> int:
    return plan(model, "lora", **{**SMALL, **options}).process


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    model = config()
    limit = _needs(model, batch=37) + 1000
    place = Device("cuda", limit, None, "small")
    found = largest_batch(model, "lora", batch=1, length=32, device=place)
    assert found is not None
    assert found >= 37
    assert _needs(model, batch=found) <= limit < _needs(model, batch=found + 1)


def test_the_largest_length_fits() -> None:
    model = config()
    limit = _needs(model, length=640) + 1000
    found = largest_length(model, "lora", batch=1, length=64, device=Device("cuda", limit, None, "small"))
    assert found == 640


def test_nothing_fits_where_the_weights_do_not() -> None:
    assert largest_batch(config(), "lora", length=32, device=Device("cuda", 2**20, None, "tiny")) == 0


def test_remedies_are_sorted_by_what_they_save() -> None:
    found = changes(config(), {"name": "lora", "r": 8}, **{**SMALL, "batch": 8, "length": 256})
    possible = [change for change in found if change.plan is not None]
    assert [c.saving for c in possible] == sorted((c.saving for c in possible), reverse=True)
    by_name = {change.what.partition(":")[0]: change for change in possible}
    assert by_name["batch_size"].saving > 0
    full = next(change for change in possible if change.what == "recompute: full")
    assert full.saving > 0
    assert full.slower > 1
    assert any(change.what == "r: 4" for change in possible)


def test_all_methods_are_sorted_and_failures_keep_their_reason() -> None:
    plans, reasons = plan_all(config(), methods=["full", "lora", "bitfit", "ia3"], processes=1, **SMALL)
    assert [found.method for found in plans][-1] == "full"
    assert [found.process for found in plans] == sorted(found.process for found in plans)
    assert "no bias" in reasons["bitfit"]


def test_pictures(tmp_path: Path) -> None:
    found = plan(config(), "lora", **SMALL)
    page = save([found], tmp_path / "plan.html").read_text()
    assert size(found.process) in page
    assert "logits and loss" in page
    pytest.importorskip("matplotlib")
    assert save([found], tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png or \.html.*plan\.gif"):
        save([found], tmp_path / "plan.gif")


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["plan", "--model", str(folder), "--length", "32", "--device", "cuda:24GB"]
    with pytest.raises(SystemExit) as ended:
        main([*common, "--method", "lora", "--r", "4", "--batch", "2", "--no-limits", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["settings"]["r"], found["verdict"]) == (2, 4, "fits")
    with pytest.raises(SystemExit):
        main([*common, "--no-limits"])
    shown = capsys.readouterr().out
    assert "At the peak" in shown
    assert "base weights" in shown
    with pytest.raises(SystemExit):
        main([*common, "--serve", "--sequences", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["sequences"] == 3


def test_command_line_needs_a_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan"])
    assert ended.value.code == 2
    assert "--model" in capsys.readouterr().err
