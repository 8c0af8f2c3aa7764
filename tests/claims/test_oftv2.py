"""OFTv2: the input is rotated by a short series, near a rotation while Q is small, for t in b products; QOFT too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adapterlab as al
from adapterlab.errors import ConfigError
from adapterlab.foreign.quantized import dense
from adapterlab.methods.multiplicative import _block_rotations, _rotations, oftv2
from adapterlab.methods.multiplicative._block_rotations import BlockRotation
from adapterlab.methods.multiplicative.oftv2 import OFTv2
from adapterlab.testing import models

IN_PLACE: Any = {torch.ops.aten.baddbmm_: lambda _, a, b, **more: 2 * math.prod(a) * b[-1]}

# What the powers of Q are multiplied by, from the first on.
TERMS: dict[tuple[int, str], list[float]] = {
    (2, "half"): [2], (3, "half"): [2, 2, 1], (4, "half"): [2, 2, 1], (5, "half"): [2, 2, 2, 1],
    (6, "half"): [2, 2, 2, 2, 1],
    (2, "whole"): [2], (3, "whole"): [2, 2], (4, "whole"): [2, 2, 2], (5, "whole"): [2, 2, 2, 2],
}  # fmt: skip


def matrices(size: float, b: int = 4, n: int = 3) -> tuple[Tensor, Tensor]:
    """v `[n, b (b − 1) / 2]` and Q of it, written out, with ‖Q‖₂ = size."""
    torch.manual_seed(0)
    q = torch.zeros(n, b, b, dtype=torch.float64)
    v = torch.randn(n, b * (b - 1) // 2, dtype=torch.float64)
    for p in range(n):
        values = iter(v[p])
        for i in range(b):
            for j in range(i + 1, b):
                q[p, i, j] = next(values)
                q[p, j, i] = -q[p, i, j]
    scale = size / torch.linalg.matrix_norm(q, 2)
    return v * scale[:, None], q * scale[:, None, None]


def rotation(v: Tensor, out: int = 5, **fields: Any) -> tuple[Tensor, Any]:
    """R of an adapted layer, read from its answers, and the layer."""
    n, b = len(v), 4
    model = nn.Sequential(nn.Linear(n * b, n * b, bias=False)).double()
    nn.init.eye_(model[0].weight)
    host = al.attach(model, OFTv2(block_size=b, targets=["0"], **fields))
    layer: Any = host.adapters("default")["0"]
    with torch.no_grad():
        layer.v.copy_(v)
        return model(torch.eye(n * b, dtype=torch.float64)), layer


def measure() -> dict[str, float]:
    """Distances from the series as written, from a rotation, from the exact one, and what a token costs."""
    v, q = matrices(0.1)
    eye, found = torch.eye(4, dtype=torch.float64), {"series": 0.0}
    for (terms, last), factors in TERMS.items():
        written = eye + sum(c * torch.linalg.matrix_power(q, i + 1) for i, c in enumerate(factors))
        r, _ = rotation(v, terms=terms, last=last)
        found["series"] = max(found["series"], float((r - torch.block_diag(*written)).abs().max()))
    r, layer = rotation(v)
    exact = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)))
    found["exact"] = float((r - exact).abs().max())
    error = float((r.T @ r - torch.eye(12, dtype=torch.float64)).abs().max())
    found |= {"orthogonal": error, "told": abs(layer.error() / error - 1)}
    model = nn.Sequential(nn.Linear(256, 512, bias=False))
    x = torch.randn(100, 256)
    with torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as base:
            model(x)
        host = al.attach(model, OFTv2(block_size=32, targets=["0"]))
        model.eval()(x)  # makes the blocks, which are kept
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as both:
            model(x)
    cost = (both.get_total_flops() - base.get_total_flops()) / (2 * 100 * 256 * 32)
    found["cost"] = max(cost, 1 / cost)
    assert host.summary().trainable == 256 * 31 // 2
    return found


LIMITS = {"series": 1e-12, "exact": 1e-3, "orthogonal": 3e-4, "told": 1e-3, "cost": 1.001}


def holds() -> bool:
    return all(value < LIMITS[key] for key, value in measure().items())


def test_a_short_series_is_nearly_a_rotation_and_costs_little() -> None:
    assert holds()


@pytest.mark.parametrize(
    ("terms", "size", "error"),
    [(5, 0.02, 3.3e-7), (5, 0.1, 2.1e-4), (5, 0.3, 0.017), (5, 0.5, 0.13), (4, 0.1, 1.1e-6), (6, 0.1, 1.1e-10)],
)
def test_how_near_to_a_rotation_it_is(terms: int, size: float, error: float) -> None:
    r, _ = rotation(matrices(size)[0], terms=terms)
    found = torch.linalg.matrix_norm(r.T @ r - torch.eye(12, dtype=torch.float64), 2)
    assert 0.8 * error < found <= error


def _horner_begun_late(q: Tensor, factors: Any) -> Tensor:
    return _rotations.series(q, factors[:-1]) if len(factors) > 1 else 2 * q


SERIES = _rotations.series
BROKEN: dict[str, tuple[Any, str, Any]] = {
    "Q symmetric": (_block_rotations, "skew", lambda v, b: _rotations.skew(v, b).abs()),
    "R transposed": (_block_rotations, "skew", lambda v, b: -_rotations.skew(v, b)),
    "the last term left out": (oftv2, "series", _horner_begun_late),
    "each term counted once": (oftv2, "series", lambda q, factors: _rotations.series(q, [c / 2 for c in factors])),
    "even powers left out": (oftv2, "series", lambda q, f: SERIES(q, [c * (i % 2 == 0) for i, c in enumerate(f)])),
    "the last term whole": (OFTv2, "factors", property(lambda self: (2.0,) * (self.terms - 1))),
    "the last term half": (OFTv2, "factors", property(lambda self: (*(2.0,) * (self.terms - 2), 1.0))),
    "the identity twice": (oftv2, "series", lambda q, factors: SERIES(q, factors) + torch.eye(q.shape[-1])),
    "a dense rotation": (
        BlockRotation.Layer, "rotated", lambda self, x: x + x @ torch.block_diag(*self.turns()[0].blocks).to(x.dtype)
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not holds()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_packed_base_is_rotated_around(precision: str, randomise: Any) -> None:
    """QOFT: the base answers for rotated inputs as it is; merged, its plain numbers are rotated."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    model = nn.Sequential(models.packed(linear, precision))
    packed, x = model[0].weight.detach().clone(), torch.randn(7, 64)
    host = al.attach(model, OFTv2(block_size=16, targets=["0"]))
    model(x).square().mean().backward()
    layer: Any = host.adapters("default")["0"]
    assert layer.v.dtype == torch.float32
    assert bool((layer.v.grad != 0).all())
    randomise(host, size=0.05)
    with torch.no_grad():
        rotated = layer.eval().rotated(torch.eye(64))
        live, base = model(x), models.packed(linear, precision)(x @ rotated)
    assert (live - base).abs().max() < (1e-5 if precision == "nf4" else 0.02)
    wanted = x @ (dense(model[0]) @ rotated.T).T + linear.bias
    assert torch.equal(model[0].weight, packed)
    host.merge(quantized="dequantize")
    assert (model(x) - wanted).abs().max() < 1e-4
    host.restore("default")
    assert torch.equal(model[0].weight, packed)


def test_rotated_weights_lose_no_more_when_packed_again() -> None:
    """A rotation keeps the range of the entries, so that packing the merged weight loses what packing W lost."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    r = torch.block_diag(*(torch.linalg.qr(torch.randn(4, 32, 32))[0]))

    def lost(w: Tensor) -> float:
        codes, state = bnb.functional.quantize_4bit(w.contiguous(), quant_type="nf4")
        return float((bnb.functional.dequantize_4bit(codes, state) - w).norm() / w.norm())

    assert abs(lost(weight @ r.T) / lost(weight) - 1) < 0.02


def test_a_series_of_one_term_is_refused() -> None:
    with pytest.raises(ConfigError, match="terms"):
        OFTv2(terms=1)
