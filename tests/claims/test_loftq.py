"""LoftQ's claim: factors fitted to the error of quantization bring the start nearer to the base than quantization."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank import loftq
from adapterlab.methods.low_rank._normal_float import codes, quantized
from adapterlab.methods.low_rank.loftq import LoftQStart


def measure(iterations: int, bits: int = 2) -> float:
    """The distance of Q + s · B A from W, over W."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64, bias=False))
    with torch.no_grad():
        model[0].weight.normal_()
    weight = model[0].weight.detach().clone()
    init = {"name": "loftq", "bits": bits, "iterations": iterations}
    host = al.attach(model, al.LoftQ(r=8, alpha=20, targets=["0"], init=init))
    now = model[0].weight + host.adapters("default")["0"].delta()
    return float((weight - now).norm() / weight.norm())


def plain(bits: int = 2) -> float:
    torch.manual_seed(0)
    nn.Linear(48, 64, bias=False)
    weight = torch.empty(64, 48).normal_()
    return float((weight - quantized(weight, bits, 64)).norm() / weight.norm())


def holds() -> bool:
    none, one, five = plain(), measure(1), measure(5)
    return one < 0.8 * none and five < one - 1e-3


def test_the_start_is_nearer_to_the_base() -> None:
    assert holds()


def test_more_iterations_never_hurt() -> None:
    errors = [measure(t) for t in (1, 2, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)


def test_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.allclose(codes(4), functional.get_4bit_type("nf4", device="cpu"), atol=1e-6)
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.allclose(quantized(weight, 4, 64), functional.dequantize_4bit(packed, state), atol=1e-5)
    assert codes(2).tolist() == pytest.approx([-1, 0, 0.3379, 1], abs=0.1)
    assert len(codes(8)) == 256


@pytest.mark.parametrize("shape", [(3, 5), (7, 64), (1, 1)])
def test_blocks_may_end_anywhere(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    found: Tensor = quantized(weight, 8, 64)
    assert found.shape == weight.shape
    assert (found - weight).abs().max() < 0.05 * weight.abs().max()
    assert not quantized(torch.zeros(shape), 4, 64).any()


def test_saved_and_loaded_it_is_the_same(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoftQ(r=4, init={"name": "loftq", "iterations": 3}))
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())
    live = logits(model, batch)
    host.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()  # PEFT would put it on another base
    assert torch.equal(logits(al.load(tiny("gpt2"), tmp_path / "a").model, batch), live)
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-5
    host.restore()
    with host.using():
        assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_written_alternation(iterations: int) -> None:
    """Q = quant(W − s B A), then s · B A = the best approximation of W − Q, from B A = 0; the best of them is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64, bias=False))
    weight, low, tried = model[0].weight.detach().clone(), torch.zeros(64, 48), []
    for _ in range(iterations):
        base = quantized(weight - low, 2, 64)
        u, s, vh = torch.linalg.svd(weight - base, full_matrices=False)
        low = u[:, :4] * s[:4] @ vh[:4]
        tried.append((float((weight - base - low).norm()), base, low, s))
    _, base, low, s = min(tried, key=lambda one: one[0])
    init = {"name": "loftq", "bits": 2, "iterations": iterations}
    host = al.attach(model, al.LoftQ(r=4, alpha=12, targets=["0"], init=init))
    layer: Any = host.adapters("default")["0"]
    assert torch.allclose(model[0].weight, base, atol=1e-5)
    assert torch.allclose(layer.delta(), low, atol=1e-4)
    assert torch.allclose(layer.A.norm(dim=1), (s[:4] / 3).sqrt(), atol=1e-4)


WHOLE, QUANTIZED = loftq.balanced, loftq.quantized
BROKEN: dict[str, Mutation] = {
    "the scale forgotten": (loftq, "balanced", lambda u, s, vh, scale: WHOLE(u, s, vh, 1.0)),
    "singular values in B alone": (loftq, "balanced", lambda u, s, vh, scale: (vh, u * s / scale)),
    "the base not fitted again": (al.LoftQ.Layer, "residual", lambda self, stored: quantized(stored, 2, 64)),
    "the base not quantized": (LoftQStart, "base", lambda self, weight: weight),
    "other bits": (loftq, "quantized", lambda w, bits, block: QUANTIZED(w, 3, block)),
    "other blocks": (loftq, "quantized", lambda w, bits, block: QUANTIZED(w, bits, 2 * block)),
    "blocks along columns": (loftq, "quantized", lambda w, bits, block: QUANTIZED(w.T.contiguous(), bits, block).T),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_start_is_nearer_to_the_base,
    functools.partial(test_it_is_the_written_alternation, 1),
    functools.partial(test_it_is_the_written_alternation, 3),
    lines=BROKEN,
)
