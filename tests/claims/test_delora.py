"""DeLoRA: however large the rate, the weight stays within the bound, and what is learned hardly depends on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import ConfigError, TargetError
from adapterlab.methods.low_rank import delora
from adapterlab.methods.low_rank.delora import DeLoRA

RATES = (1e-3, 1e-2, 1e-1)
WIDTH, R = 24, 4


def trained(method: al.Method, lr: float) -> tuple[Any, float]:
    """(host of a layer trained at a rate, share of the loss that is left)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    x, update = torch.randn(128, WIDTH), torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH)
    target = (x @ (model[0].weight + 0.3 * update / update.norm() * model[0].weight.norm()).T).detach()
    host = al.attach(model, method)
    optimizer = host.methods["default"].optimizer(host, "default", lambda p: _adam(p, lr))
    losses = []
    for _ in range(100):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return host, losses[-1] / losses[0]


def _adam(given: list[Any], lr: float) -> Any:
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    return torch.optim.Adam([{"params": g["params"], "lr": lr * g.get("lr_factor", 1)} for g in groups])


def written(layer: Any, a: Tensor, b: Tensor, lam: Tensor, w: Tensor) -> Tensor:
    """ΔW in float64, direction by direction."""
    total = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
    for row, column in zip(a.double(), b.double().T, strict=True):
        norms = [max(float(t.norm()), 1e-4) for t in (row, column)]
        total += float(lam) / len(a) * torch.outer(column, row) * w / (norms[0] * norms[1])
    return total


def measure(start: str = "copy") -> dict[str, float]:
    """What must be at most one."""
    found = dict.fromkeys(("bound", "written", "merged"), 0.0)
    for lr in RATES:
        host, _ = trained(DeLoRA(r=R, strength=2, start=start, targets=["0"]), lr)
        layer, weight = host.adapters("default")["0"], host.model[0].weight.detach().clone()
        own = written(layer, layer.A.detach(), layer.B.detach(), layer.lam.detach(), weight.norm(dim=0).double())
        before = 0 if start == "zero" else written(layer, layer.A0, layer.B0, layer.lam0, weight.norm(dim=0).double())
        found["bound"] = max(
            found["bound"], float(_alone(layer).norm() / (layer.lam.abs() * weight.norm(dim=0).max()).detach())
        )
        live = host.model(torch.eye(WIDTH)).T.detach()
        found["written"] = max(found["written"], float((live - weight - own + before).abs().max()) / 1e-5)
        host.merge()
        found["merged"] = max(found["merged"], float((host.model[0].weight - live).abs().max()) / 1e-5)
    return found


def _alone(layer: Any) -> Tensor:
    """ΔW without the frozen copy."""
    r = len(layer.A)
    a, b = (f.detach() for f in layer.factors())
    return b[:, :r] @ a[:r]


def holds() -> bool:
    return all(value <= 1 + 1e-5 for start in ("copy", "zero") for value in measure(start).values())


def test_the_update_stays_within_its_bound_at_every_rate() -> None:
    assert holds()


def test_the_rate_matters_less_than_to_lora() -> None:
    spreads = []
    for make in (lambda: DeLoRA(r=R, strength=0.5, targets=["0"]), lambda: al.LoRA(r=R, targets=["0"])):
        losses = [trained(make(), lr)[1] for lr in (1e-2, 1e-1, 1.0)]
        spreads.append(max(losses) / min(losses))
    assert spreads[0] < spreads[1] / 5


def _norms(self: Any, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    return lam / (len(a) * a.norm(dim=1) * b.norm(dim=0).clamp_min(1e-4))


def _factors(self: Any, **change: Any) -> tuple[Tensor, Tensor]:
    w = change.get("w", self.w)
    b = self.B * self.strengths(self.A, self.B, self.lam)
    if self.A0 is None:
        return self.A * w, b
    back = change.get("back", -1) * self.B0 * self.strengths(self.A0, self.B0, change.get("lam", self.lam0))
    return torch.cat([self.A, self.A0]) * w, torch.cat([b, back], 1)


BROKEN: dict[str, Any] = {
    "λ not divided by r": ("strengths", lambda self, a, b, lam: lam / (a.norm(dim=1) * b.norm(dim=0).clamp_min(1e-4))),
    "A not normalised": ("strengths", lambda self, a, b, lam: lam / (len(a) * b.norm(dim=0).clamp_min(1e-4))),
    "B not normalised": ("strengths", lambda self, a, b, lam: lam / (len(a) * a.norm(dim=1))),
    "B normalised along the other axis": ("strengths", lambda self, a, b, lam: _norms(self, a, b[: len(a)].T, lam)),
    "λ dead": ("strengths", lambda self, a, b, lam: _norms(self, a, b, torch.ones(1))),
    "no w": ("factors", lambda self: _factors(self, w=1)),
    "w of the whole": ("factors", lambda self: _factors(self, w=self.w.norm())),
    "the copy added": ("factors", lambda self: _factors(self, back=1)),
    "the copy follows λ": ("factors", lambda self: _factors(self, lam=self.lam)),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeLoRA.Layer, *BROKEN[line])
    assert not holds()


def test_a_zero_start_jumps_to_the_bound_and_a_copy_does_not() -> None:
    """After one small step of Adam ΔW is as large as it may be, because only directions count."""
    sizes = {}
    for start in ("zero", "copy"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        host = al.attach(model, DeLoRA(r=R, start=start, targets=["0"]))
        x, weight = torch.randn(8, WIDTH), model[0].weight.detach()
        optimizer = torch.optim.Adam(host.parameters("default"), lr=1e-3)
        model(x).square().mean().backward()
        optimizer.step()
        sizes[start] = float((model(torch.eye(WIDTH)).T.detach() - weight).norm() / weight.norm())
    assert sizes["zero"] > 0.5
    assert sizes["copy"] < 0.1


@pytest.mark.parametrize("start", ["copy", "zero"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5"])
def test_start_count_and_merge(family: str, start: Any, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, DeLoRA(r=3, start=start))
    assert (logits(model, batch) - base).abs().max() < 1e-4
    shapes = [layer.site.shape for layer in host.adapters("default").values()]
    assert host.summary().trainable == sum(3 * (out + in_) + 1 for out, in_ in shapes)
    host.verify(batch)
    randomise(host, size=0.1)
    live = logits(model, batch)
    assert (live - base).abs().max() > 0.01
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-3


def test_ranks_and_strengths_differ_by_pattern(tiny: Any) -> None:
    method = DeLoRA(r=2, rank_pattern={"v_proj": 5}, strength_pattern={"layers.1.*": 3.0}, targets=["q", "v"])
    for path, layer in al.attach(tiny("llama"), method).adapters("default").items():
        assert len(layer.A) == (5 if path.endswith("v_proj") else 2)
        assert layer.lam.item() == (3 if ".1." in path else 8)
    with pytest.raises(TargetError, match="strength_pattern names 'k_proj'"):
        al.attach(tiny("llama"), DeLoRA(strength_pattern={"k_proj": 1.0}, targets=["q"]))


def test_strengths_have_their_own_rate_and_no_decay(tiny: Any) -> None:
    host = al.attach(tiny("llama"), DeLoRA(r=2, targets=["q"]))
    groups: list[dict[str, Any]] = []
    host.methods["default"].optimizer(host, "default", groups.extend)
    assert [(len(g["params"]), g.get("lr_factor", 1), g.get("weight_decay")) for g in groups] == [
        (4, 1, None), (2, 0.5, 0.0)
    ]  # fmt: skip


@pytest.mark.parametrize("lam", [8.0, 5.0, 11.0, -3.0])
def test_one_adapter_of_twice_the_rank_holds_the_copy_and_gives_it_back(
    lam: float, tmp_path: Any, randomise: Any
) -> None:
    host = al.attach(nn.Sequential(nn.Linear(WIDTH, 7)), DeLoRA(r=R, targets=["0"]))
    randomise(host, size=0.5)
    layer = host.adapters("default")["0"]
    with torch.no_grad():
        layer.lam.fill_(lam)
    joined = layer.joined()
    whole = written(layer, *(joined[key].detach() for key in ("A", "B", "lam", "w")))
    assert len(joined["A"]) == 2 * R
    assert (whole - layer.delta()).abs().max() < 1e-5
    host.save(tmp_path / "adapter")
    model = nn.Sequential(nn.Linear(WIDTH, 7))
    again = al.load(model, tmp_path / "adapter")
    for key, value in host.state_dict("default").items():
        assert torch.equal(again.state_dict("default")[key], value), key


def test_it_is_a_lora_of_twice_the_rank(randomise: Any) -> None:
    host = al.attach(nn.Sequential(nn.Linear(WIDTH, 7)), DeLoRA(r=R, targets=["0"]))
    randomise(host, size=0.5)
    layer = host.adapters("default")["0"]
    a, b = layer.low_rank()
    assert a.shape == (2 * R, WIDTH)
    assert torch.allclose(b @ a, layer.delta())
    assert math.isclose(layer.scale, 1.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="strength"):
        DeLoRA(strength=0)
    assert delora._LEAST == 1e-4
