"""HRA: the update is orthogonal and of low rank at once, at half of LoRA's parameters for square layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import ConfigError


def chain(u: Tensor) -> Tensor:
    """H₁ ⋯ H_r multiplied out, in float64."""
    u = u.double()
    product = torch.eye(len(u), dtype=torch.float64)
    for column in u.T:
        product = product @ (
            torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(column, column) / column.dot(column)
        )
    return product


def measure(width: int = 24, r: int = 4) -> tuple[float, float, float]:
    """Train towards a rotated weight: (final loss / first, largest relative change of a singular value, rank of ΔW)."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    model = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    x = torch.randn(128, width)
    target = x @ (weight.double() @ chain(torch.randn(width, r))).float().T
    host = al.attach(model, al.HRA(r=r, targets=["0"]))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    losses = []
    for _ in range(300):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        adapted = model(torch.eye(width)).T
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(adapted)
    rank = torch.linalg.matrix_rank(adapted - weight, rtol=1e-4)
    return losses[-1] / losses[0], float(((after - before) / before[0]).abs().max()), float(rank)


def holds() -> bool:
    loss, drift, rank = measure()
    return loss < 0.1 and drift < 1e-4 and rank <= 4


def test_an_orthogonal_low_rank_change_is_learned() -> None:
    assert holds()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
def test_start_count_chain_and_merge(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.HRA(r=4))
    assert (logits(model, batch) - base).abs().max() < 1e-4
    layers: Any = host.adapters("default")
    assert host.summary().trainable == sum(4 * layer.site.shape[1] for layer in layers.values())
    host.verify(batch)
    randomise(host, size=0.05)
    for layer in layers.values():
        site, x = layer.site, torch.randn(3, layer.site.shape[1])
        expected = x.double() @ (site.weight().double() @ chain(layer.u)).T
        expected = expected if site.bias is None else expected + site.bias.double()
        assert (site.module(x) - expected).abs().max() < 1e-4
    live = logits(model, batch)
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-3


def test_the_extra_loss_measures_overlap(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.HRA(r=4, orthogonality=0.5, targets=["q"]))
    layers: Any = host.adapters("default")
    loss = host.methods["default"].penalty(host, "default")
    written = torch.zeros(())
    for layer in layers.values():
        unit = (layer.u / layer.u.norm(dim=0)).detach()
        written += 0.5 * (torch.eye(4) - unit.T @ unit).norm() ** 2
    assert loss is not None
    assert loss.item() == pytest.approx(written.item(), rel=1e-5)
    assert al.HRA(r=4).penalty(host, "default") is None


def test_gram_schmidt_reflects_in_the_whole_span(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.HRA(r=3, gram_schmidt=True, targets=["q"]))
    layer: Any = next(iter(host.adapters("default").values()))
    u, x = layer.u.double(), torch.randn(3, layer.site.shape[1])
    projector = u @ torch.linalg.inv(u.T @ u) @ u.T
    weight = layer.site.weight().double()
    expected = x.double() @ (weight @ (torch.eye(len(u), dtype=torch.float64) - 2 * projector)).T
    assert (layer.site.module(x) - expected).abs().max() < 1e-4


def test_an_odd_number_of_reflections_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r = 3 is odd.*choose 4"):
        al.HRA(r=3)


LAYER, DIRECTIONS, OVERLAP, PENALTY = al.HRA.Layer, al.HRA.Layer.directions, al.HRA.Layer.overlap, al.HRA.penalty


def _mixed(change: Any) -> Mutation:
    """Another T, made of ÛᵀÛ."""
    return (LAYER, "reflectors", lambda self: ((unit := self.directions()), unit @ change(unit.T @ unit)))


def _t(gram: Tensor) -> Tensor:
    return torch.linalg.inv(gram.triu(1) + 0.5 * torch.eye(len(gram)))


def _unweighed(self: Any, *given: Any) -> Tensor | None:
    loss = PENALTY(self, *given)
    return None if loss is None else loss / self.orthogonality


BROKEN: dict[str, Mutation] = {
    "side by side, not chained": _mixed(lambda gram: 2 * torch.eye(len(gram))),
    "the chain in the other order": _mixed(lambda gram: _t(gram).T),
    "projections, not reflections": _mixed(lambda gram: torch.linalg.inv(gram.triu(1) + torch.eye(len(gram)))),
    "the first reflection left out": _mixed(lambda gram: _t(gram) * (torch.arange(len(gram)) > 0)),
    "directions not of length one": (LAYER, "directions", lambda self: self.u),
    "rows of length one": (LAYER, "directions", lambda self: nn.functional.normalize(self.u, dim=1)),
    "orthogonal always": (LAYER, "directions", lambda self: torch.linalg.qr(self.u)[0]),
    "all directions alike": (LAYER, "directions", lambda self: DIRECTIONS(self)[:, :1].expand_as(self.u)),
    "no pairs at the start": begun(LAYER, lambda layer, method: layer.u.normal_()),
    "the output reflected": (
        LAYER, "around", lambda self, run, x: run(x) - run(x @ self.reflectors()[1] @ self.reflectors()[0].T)
    ),
    "overlap not squared": (LAYER, "overlap", lambda self: OVERLAP(self).sqrt()),
    "the weight of the extra loss ignored": (al.HRA, "penalty", _unweighed),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_start_count_chain_and_merge, "llama"),
    test_the_extra_loss_measures_overlap,
    lines=BROKEN,
)
