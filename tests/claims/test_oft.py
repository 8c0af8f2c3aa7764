"""OFT: whatever is trained, the angles between neurons stay; constrained, the weight stays within a distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.multiplicative import _block_rotations, _rotations, oft
from adapterlab.methods.multiplicative._block_rotations import BlockRotation
from adapterlab.methods.multiplicative._rotations import Rotation, Turn
from adapterlab.methods.multiplicative.oft import OFT

IN, OUT = 24, 32


def energy(weight: Tensor) -> float:
    """Hyperspherical energy of the rows: the sum of their directions' inverse distances."""
    rows = nn.functional.normalize(weight.double(), dim=1)
    distances = torch.cdist(rows, rows)[~torch.eye(len(rows), dtype=torch.bool)]
    return float((1 / distances).sum())


def blocks(layer: Any) -> Tensor:
    """R multiplied out in float64, block by block and entry by entry."""
    b, found = layer.size, []
    for v in layer.v.detach().double():
        q, values = torch.zeros(b, b, dtype=torch.float64), iter(v.tolist())
        for i in range(b):
            for j in range(i + 1, b):
                q[i, j] = next(values)
                q[j, i] = -q[i, j]
        eye = torch.eye(b, dtype=torch.float64)
        found.append((eye + q) @ torch.linalg.inv(eye - q))
    return torch.block_diag(*(found if len(found) > 1 else found * layer.places))


def trained(method: al.Method, steps: int = 60) -> tuple[Any, Tensor, list[float]]:
    """(host of a trained layer, its weight before, losses), on the way to a rotated and scaled layer."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    model, weight = nn.Sequential(layer), layer.weight.detach().clone()
    x, turn = torch.randn(256, IN), torch.linalg.qr(torch.randn(IN, IN))[0]
    with torch.no_grad():
        target = 1.2 * (x @ turn @ weight.T) + layer.bias
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    losses = []
    for step in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        host.methods["default"].after_step(host, "default", step, optimizer)
    return host, weight, losses


def answers(host: Any) -> Tensor:
    """The weight as the adapted layer uses it, read from its answers."""
    model = host.model.eval()
    with torch.no_grad():
        return (model(torch.eye(IN)) - model(torch.zeros(1, IN))).T


def measure(**fields: Any) -> dict[str, float]:
    """What must be small, relative to what it is compared with."""
    host, weight, losses = trained(OFT(block_size=8, targets=["0"], **fields))
    layer, bias = host.adapters("default")["0"], host.model[0].bias.detach().clone()
    if layer.s is not None:
        nn.init.uniform_(layer.s, 0.5, 2.0)
    live, at_zero = answers(host), host.model(torch.zeros(1, IN))[0].detach()
    rotated = (weight.double() @ blocks(layer).T).float() * (1 if layer.s is None else layer.s.detach()[:, None])
    host.merge()
    values = torch.linalg.svdvals
    found = {
        "loss": losses[-1] / losses[0],
        "formula": float((live - rotated).abs().max()),
        "merge": float((answers(host) - live).abs().max()),
        "bias": float((torch.stack([at_zero, host.model(torch.zeros(1, IN))[0]]) - bias).abs().max().detach()),
    }
    if fields.get("rescale"):  # may turn a row around
        return found
    found["spectrum"] = float((values(live) - values(weight)).abs().max())
    return {**found, "energy": abs(energy(live) / energy(weight) - 1)}


LIMITS = {"loss": 0.8, "energy": 1e-5, "formula": 1e-5, "merge": 1e-5, "bias": 1e-6, "spectrum": 1e-5}
VARIANTS: list[dict[str, Any]] = [{}, {"share": True}, {"rescale": True}]


def holds() -> bool:
    return all(value < LIMITS[key] for fields in VARIANTS for key, value in measure(**fields).items())


def distance() -> tuple[float, float]:
    """How far a constrained R gets from the identity, and how far all blocks together may get."""
    host, _, _ = trained(OFT(block_size=8, targets=["0"], eps=0.3))
    layer = host.adapters("default")["0"]
    return float((blocks(layer) - torch.eye(IN)).norm()), 2 * 0.3


def test_the_energy_is_kept() -> None:
    assert holds()
    host, weight, _ = trained(OFT(block_size=8, targets=["0"]))
    size = (answers(host) - weight).norm()
    torch.manual_seed(1)
    update = torch.randn(OUT, 2) @ torch.randn(2, IN)
    assert abs(energy(weight + update * size / update.norm()) / energy(weight) - 1) > 0.01  # what LoRA does


def _wrong_skew(v: Tensor, b: int) -> Tensor:
    upper = v.new_zeros(*v.shape[:-1], b, b)
    rows, columns = torch.triu_indices(b, b, 1)
    upper[..., rows, columns] = v
    return upper + upper.mT


def _columns_first(v: Tensor, b: int) -> Tensor:
    upper = v.new_zeros(*v.shape[:-1], b, b)
    columns, rows = torch.tril_indices(b, b, -1)
    upper[..., rows, columns] = v
    return upper - upper.mT


def _eye(q: Tensor) -> Tensor:
    return torch.eye(q.shape[-1])


def _bias_scaled(self: Any, run: Any, x: Tensor) -> Tensor:
    y: Tensor = run(self.rotated(x))
    return y if self.s is None else y * self.s


def _first_place(self: Any) -> list[Turn]:
    made = self.method.matrix(_rotations.skew(self.v, self.size))
    places = torch.arange(self.places)[:, None, None]
    return [Turn(made * (places == 0) if len(made) == 1 else made)]


BROKEN: dict[str, tuple[Any, str, Any]] = {
    "Q symmetric": (_block_rotations, "skew", _wrong_skew),
    "U filled by columns": (_block_rotations, "skew", _columns_first),
    "no inverse": (oft, "cayley", lambda q: 2 * q),
    "the inverse alone": (oft, "cayley", lambda q: torch.linalg.inv(_eye(q) - q) - _eye(q)),
    "R transposed": (oft, "cayley", lambda q: -2 * q @ torch.linalg.inv(_eye(q) + q)),
    "merged the wrong way": (Turn, "back", Turn.__call__),
    "rotated twice": (Rotation, "rotated", lambda self, x: self.turns()[0](self.turns()[0](x))),
    "the shared block at one place": (BlockRotation.Layer, "turns", _first_place),
    "the bias scaled": (Rotation, "around", _bias_scaled),
    "s left out": (Rotation, "around", lambda self, run, x: run(self.rotated(x))),
}


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not holds()


def test_the_constraint_bounds_the_distance() -> None:
    reached, bound = distance()
    assert 0.5 * bound < reached <= bound * (1 + 1e-5)


@pytest.mark.parametrize(
    "line", ["no constraint", "the bound for each block", "the norm of half of Q", "moved by after_step alone"]
)
def test_the_bound_fails_without_the_constraint(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BlockRotation.Layer
    plain = layer.inside
    if line == "no constraint":
        monkeypatch.setattr(layer, "inside", lambda self: self.v)
    elif line == "the norm of half of Q":
        monkeypatch.setattr(_block_rotations.math, "sqrt", lambda n: 1 if n == 2 else n**0.5)
    elif line == "the bound for each block":

        def loose(self: Any) -> Tensor:
            self.limit *= 3**0.5
            made = plain(self)
            self.limit /= 3**0.5
            return made

        monkeypatch.setattr(layer, "inside", loose)
    else:  # in a loop that calls no events what is computed is bounded all the same
        monkeypatch.setattr(BlockRotation, "after_step", lambda *args: None)
        host, weight, _ = trained(OFT(block_size=8, targets=["0"], eps=0.3))
        found: Any = host.adapters("default")["0"]
        assert (answers(host) - weight).norm() <= 2 * 0.3 * torch.linalg.svdvals(weight)[0] < found.v.detach().norm()
        return
    reached, bound = distance()
    assert reached > 1.05 * bound


def test_a_constrained_step_is_that_of_the_projected_point() -> None:
    """The gradient reaches v as if v had been moved into the ball."""
    host, _, _ = trained(OFT(block_size=8, targets=["0"], eps=0.3), steps=5)
    layer = host.adapters("default")["0"]
    x, found = torch.randn(4, IN), []
    for far in (False, True):
        with torch.no_grad():
            layer.v.copy_(layer.inside() * (7 if far else 1))
        (gradient,) = torch.autograd.grad(host.model(x).square().sum(), layer.v)
        found.append(gradient)
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()


def test_dropout_leaves_whole_blocks_out() -> None:
    host, _, _ = trained(OFT(block_size=4, targets=["0"], share=True, dropout=0.5), steps=5)
    layer = host.adapters("default")["0"]
    with torch.no_grad():
        (whole,) = layer.eval().turns()
        torch.manual_seed(0)
        drawn = torch.cat([layer.train().turns()[0].blocks for _ in range(100)])
    kept = (drawn == whole.blocks).flatten(1).all(1)
    assert ((drawn == 0).flatten(1).all(1) | kept).all()
    assert 0.4 < kept.double().mean() < 0.6


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
def test_start_count_and_merge(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, OFT(block_size=8))
    assert torch.equal(logits(model, batch), base)
    layers: Any = host.adapters("default")
    assert host.summary().trainable == sum(layer.site.shape[1] * 7 // 2 for layer in layers.values())
    host.verify(batch)
    randomise(host, size=0.1)
    live = logits(model, batch)
    assert (live - base).abs().max() > 0.01
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-4
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_an_embeddings_rows_are_rotated(tiny: Any, randomise: Any) -> None:
    model, ids = tiny("llama"), torch.tensor([[3, 9, 5]])
    rows = model.model.embed_tokens(ids).detach()
    host = al.attach(model, OFT(block_size=8, targets=["embed_tokens"]))
    randomise(host, size=0.3)
    layer = next(iter(host.adapters("default").values()))
    wanted = (rows.double() @ blocks(layer)).float()
    assert (model.model.embed_tokens(ids) - wanted).abs().max() < 1e-5
    host.merge(tied="untie")
    assert (model.model.embed_tokens(ids) - wanted).abs().max() < 1e-5


def test_two_adapters_multiply_in_their_order(randomise: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    weight, x = model[0].weight.detach().clone(), torch.randn(3, IN)
    host = al.attach(model, OFT(block_size=8, targets=["0"]), "first")
    host.attach(OFT(block_size=6, targets=["0"], rescale=True), "second")
    host.activate("first", "second")
    for name in ("first", "second"):
        randomise(host, name, size=0.3)
    live = model(x)
    inner, outer = (host.adapters(name)["0"] for name in ("first", "second"))
    wanted = (x.double() @ blocks(outer) @ blocks(inner) @ weight.double().T) * outer.s + model[0].bias
    assert (live - wanted).abs().max() < 1e-5
    host.merge("first")
    host.merge("second")
    assert (model(x) - wanted).abs().max() < 1e-5


def test_factors_of_outputs_are_not_decayed(tiny: Any) -> None:
    host = al.attach(tiny("llama"), OFT(block_size=8, targets=["q"], rescale=True))
    groups: list[dict[str, Any]] = []
    host.methods["default"].optimizer(host, "default", groups.extend)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    assert sum(p.numel() for group in groups for p in group["params"]) == host.summary().trainable


def test_sizes_that_do_not_divide_name_those_that_do(tiny: Any) -> None:
    with pytest.raises(
        AttachError, match=r"block_size=32 does not divide the 48 features of .*down_proj.*=2, 4, 8, 16 fit"
    ):
        al.attach(tiny("llama"), OFT())
    with pytest.raises(AttachError, match=r"blocks=5 does not divide the 32 .*blocks=1, 2, 4, 8 fit"):
        al.attach(tiny("llama"), OFT(blocks=5))
    with pytest.raises(AttachError, match=r"1 features of 0 into blocks of two and more. No block_size fits"):
        al.attach(nn.Sequential(nn.Linear(1, 4)), OFT(block_size=1, targets=["0"]))
    with pytest.raises(ConfigError, match="set one of them"):
        OFT(block_size=0)
    host = al.attach(tiny("llama"), OFT(uneven="nearest"))
    assert {layer.size for layer in host.adapters("default").values()} == {32, 24}
