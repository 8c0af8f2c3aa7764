"""QLoRA's claim: NF4 loses less of normal weights than other codes of 4 bits, and LoRA trains through it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
from adapterlab.errors import AttachError, MissingDependencyError
from adapterlab.methods.low_rank import _normal_float
from adapterlab.methods.low_rank._normal_float import quantized
from adapterlab.optim import adamw

bnb = pytest.importorskip("bitsandbytes")


def error(restored: torch.Tensor, weight: torch.Tensor) -> float:
    return float((restored - weight).norm() / weight.norm())


def measure() -> tuple[float, float, float, float]:
    """Relative errors on normal weights: NF4, integers, 4-bit floats, and NF4 of bitsandbytes with double scales."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    integers = (blocks / scale).round().clamp(-7, 7) * scale
    restored = []
    for kind, double in (("fp4", False), ("nf4", True)):
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
        restored.append(bnb.functional.dequantize_4bit(packed, state))
    found = (quantized(weight, 4, 64), integers.view_as(weight), *restored)
    return tuple(error(r, weight) for r in found)  # type: ignore[return-value]


def holds() -> bool:
    nf4, integers, floats, double = measure()
    return nf4 < 0.095 and nf4 < integers < floats and abs(double / nf4 - 1) < 5e-3


def test_nf4_loses_least_and_double_scales_lose_nothing_more() -> None:
    assert holds()


def test_the_claim_fails_with_evenly_spaced_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_normal_float, "codes", lambda bits: torch.linspace(-1, 1, 2**bits))
    assert not holds()


def packed(double: bool = True, kind: str = "nf4") -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    made = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type=kind, compress_statistics=double)
    made.load_state_dict(linear.state_dict())
    return nn.Sequential(made.to("cpu"), nn.Linear(64, 64))


def optimizer(host: Any, lr: float = 1e-2) -> Any:
    return host.methods["default"].optimizer(host, "default", lambda p: adamw(p, lr=lr, weight_decay=0.1, eps=1e-7))


def test_it_trains_on_nf4_with_moments_in_8_bits() -> None:
    model = packed()
    host = al.attach(model, al.QLoRA(r=32, dropout=0, targets=["0"]))
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    before = model[0].weight.clone()
    made = optimizer(host)
    assert type(made).__name__ == "AdamW8bit"
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-2, 0.1, 1e-7)
    host.adapters("default")["0"].A.data.normal_()
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        made.zero_grad()
        loss.backward()
        made.step()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model[0].weight, before)
    assert host.summary().trainable == 32 * 128


@pytest.mark.parametrize(
    ("model", "target", "said"),
    [
        (packed, "1", "float32"),
        (lambda: packed(double=False), "0", "full precision"),
        (lambda: packed(kind="fp4"), "0", "fp4"),
    ],
)
def test_another_base_is_refused(model: Any, target: str, said: str) -> None:
    made = model()
    with pytest.raises(AttachError, match=rf"stored as .*{said}.*quantize='nf4'"):
        al.attach(made, al.QLoRA(targets=[target]))
    assert al.host(made) is None
    al.attach(made, al.QLoRA(targets=[target], base="any"))


def test_without_bitsandbytes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.QLoRA(r=2, base="any"))
    plain = al.attach(tiny("llama"), al.QLoRA(r=2, base="any", moments="plain"))
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    with pytest.raises(MissingDependencyError, match=r"bitsandbytes.*moments='plain'"):
        optimizer(host)
    assert type(optimizer(plain)).__name__ == "AdamW"
