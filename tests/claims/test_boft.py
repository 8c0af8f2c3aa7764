"""BOFT: butterfly factors mix more inputs than blocks of as many parameters do, and R stays a rotation."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.multiplicative import _rotations, boft
from adapterlab.methods.multiplicative._rotations import Rotation, Turn
from adapterlab.methods.multiplicative.boft import BOFT

D = 64
IN_PLACE: Any = {torch.ops.aten.baddbmm_: lambda _, a, b, **more: 2 * math.prod(a) * b[-1]}


def butterfly(v: Tensor, b: int, d: int) -> Tensor:
    """What `_butterfly` gives, once for the same numbers."""
    return _butterfly(tuple(v.flatten().tolist()), v.shape, b, d)


@functools.lru_cache
def _butterfly(numbers: tuple[float, ...], shape: torch.Size, b: int, d: int) -> Tensor:
    """R = F_{m−1} ⋯ F_0 in float64, entry by entry: F_i joins half-blocks 2ⁱ apart inside groups of 2ⁱ⁺¹."""
    v = torch.tensor(numbers, dtype=torch.float64).view(shape)
    m, n, _ = shape
    half, product = b // 2, torch.eye(d, dtype=torch.float64)
    for i in range(m):
        factor = torch.zeros(d, d, dtype=torch.float64)
        for k in range(n):
            q, values = torch.zeros(b, b, dtype=torch.float64), iter(v[i, k].tolist())
            for row in range(b):
                for column in range(row + 1, b):
                    q[row, column] = next(values)
            q = q - q.T
            eye = torch.eye(b, dtype=torch.float64)
            group, place = divmod(k, 2**i)
            first = group * 2 ** (i + 1) + place
            pair = [first, first + 2**i]
            at = torch.tensor([h * half + t for h in pair for t in range(half)]) if m > 1 else torch.arange(b) + k * b
            factor[at[:, None], at] = (eye + q) @ torch.linalg.inv(eye - q)
        product = factor @ product
    return product


def adapted(d: int = D, **fields: Any) -> tuple[Any, Any, Tensor]:
    """(host, layer, R as the answers show it) of a layer with random values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, 5)).double()
    host = al.attach(model, BOFT(targets=["0"], **fields))
    layer: Any = host.adapters("default")["0"]
    with torch.no_grad():
        layer.v.normal_(std=0.4)
        layer.s.uniform_(0.5, 2)
        return host, layer, layer.rotated(torch.eye(d, dtype=torch.float64))


CASES = [(4, 1, D), (4, 3, D), (4, 5, D), (8, 2, 48), (3, 1, 48), (64, 3, 256), (128, 2, 256)]


def measure() -> dict[str, float]:
    """What must be small: distances from the written product, from a rotation, and from the share of entries it has."""
    found = dict.fromkeys(("written", "orthogonal", "live", "merged"), 0.0)
    for b, m, d in CASES:
        host, layer, r = adapted(d, block_size=b, factors=m)
        written, x, linear = butterfly(layer.v, b, d), torch.randn(3, d, dtype=torch.float64), host.model[0]
        wanted = layer.s * (x @ written @ linear.weight.T) + linear.bias
        found["written"] = max(found["written"], float((r - written).abs().max()))
        found["orthogonal"] = max(found["orthogonal"], float((r.T @ r - torch.eye(d)).abs().max()))
        found["live"] = max(found["live"], float((host.model(x) - wanted).detach().abs().max()))
        host.merge()
        found["merged"] = max(found["merged"], float((host.model(x) - wanted).detach().abs().max()))
    for m, share in ((1, 1 / 16), (3, 1 / 4), (5, 1.0)):
        _, _, r = adapted(block_size=4, factors=m)
        found[f"share of {m}"] = abs(float((r.abs() > 1e-9).double().mean()) - share)
    return found


def holds() -> bool:
    return all(value < 1e-6 for value in measure().values())


def test_few_parameters_mix_all_inputs() -> None:
    assert holds()
    # As many parameters as five factors of blocks of 4, in one factor of blocks of 16, mix a quarter.
    wide, deep = (adapted(block_size=b, factors=m) for b, m in ((16, 1), (4, 5)))
    assert wide[1].v.numel() == deep[1].v.numel() == 480
    assert (wide[2].abs() > 1e-9).double().mean() == 1 / 4


def _side_by_side(self: Any) -> list[Turn]:
    """All factors without their wiring."""
    return [Turn(blocks) for blocks in _rotations.cayley(_rotations.skew(self.v, self.size)).flip(0)]


PLAIN = boft.multiplied_out
BROKEN: dict[str, tuple[Any, str, Any]] = {
    "Q symmetric": (boft, "skew", lambda v, b: _rotations.skew(v, b).abs()),
    "R transposed": (boft, "cayley", lambda q: _rotations.cayley(-q)),
    "no inverse": (boft, "cayley", lambda q: 2 * q),
    "no wiring": (BOFT.Layer, "turns", _side_by_side),
    "factors in the other order": (boft, "multiplied_out", lambda factors, first: PLAIN(factors.flip(0), first)),
    "every step begins at the first factor": (boft, "multiplied_out", lambda factors, first: PLAIN(factors, 0)),
    "steps in the other order": (Rotation, "_turns", lambda self: self.turns()[::-1]),
    "pieces not gathered": (Turn, "__call__", lambda self, x: _rotations.turned(x, self.blocks)),
    "s left out": (Rotation, "around", lambda self, run, x: run(self.rotated(x))),
    "the bias scaled": (Rotation, "around", lambda self, run, x: run(self.rotated(x)) * self.s),
    "merged the wrong way": (Turn, "back", Turn.__call__),
    "the last factor alone": (boft, "multiplied_out", lambda factors, first: PLAIN(factors[-1:], first)),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not holds()


def fitted(**fields: Any) -> float:
    """Share of the loss that is left after fitting a random dense rotation."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(D, D))[0]
    turn[0] *= torch.linalg.det(turn).sign()
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    nn.init.eye_(model[0].weight)
    host = al.attach(model, BOFT(targets=["0"], **fields))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (model(torch.eye(D)) - turn).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0]


def test_deep_factors_fit_a_dense_rotation_better_than_one_of_as_many_parameters() -> None:
    assert fitted(block_size=4, factors=5) < 0.95 * fitted(block_size=16, factors=1)


def test_a_step_costs_no_product_with_a_dense_rotation() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 512)), torch.randn(100, 256)
    with torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as base:
            model(x)
        al.attach(model, BOFT(block_size=8, factors=3, targets=["0"]))
        model.eval()(x)  # makes the blocks, which are kept
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as both:
            model(x)
    assert both.get_total_flops() - base.get_total_flops() == 2 * 100 * 256 * 32


def test_dropout_leaves_blocks_of_one_factor_out() -> None:
    _, layer, _ = adapted(block_size=4, factors=3, dropout=0.5)
    torch.manual_seed(0)
    drawn = torch.stack([layer.left(torch.empty(3, 16, 4, 4)) for _ in range(200)])[..., 0, 0]
    touched = (~drawn).any(2)
    assert (touched.sum(1) <= 1).all()
    assert (touched.sum(0) > 40).all()
    assert 0.45 < drawn.double()[touched].mean() < 0.55


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
def test_start_count_and_merge(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, BOFT(block_size=4, factors=2))
    assert (logits(model, batch) - base).abs().max() < 1e-6
    shapes = [layer.site.shape for layer in host.adapters("default").values()]
    assert host.summary().trainable == sum(2 * in_ * 3 // 2 + out for out, in_ in shapes)
    host.verify(batch)
    randomise(host, size=0.1)
    live = logits(model, batch)
    assert (live - base).abs().max() > 0.01
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-4
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_factors_of_outputs_are_not_decayed(tiny: Any) -> None:
    host = al.attach(tiny("llama"), BOFT(block_size=4, targets=["q"]))
    groups: list[dict[str, Any]] = []
    host.methods["default"].optimizer(host, "default", groups.extend)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]


def test_sizes_that_do_not_divide_name_those_that_do(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"block_size=8 with factors=3 does not divide the 48 .*block_size=2, 4 fit"):
        al.attach(tiny("llama"), BOFT(factors=3))
    with pytest.raises(AttachError, match=r"blocks=6 with factors=2 does not divide the 32 .*blocks=2, 4, 8 fit"):
        al.attach(tiny("llama"), BOFT(blocks=6))
    with pytest.raises(AttachError, match=r"No block_size fits every target"):
        al.attach(tiny("llama"), BOFT(factors=9))
    with pytest.raises(ConfigError, match=r"block_size = 3 cannot be halved.*use 4 or factors = 1"):
        BOFT(block_size=3)
    with pytest.raises(ConfigError, match="set one of them"):
        BOFT(block_size=0)
