"""CorDA's claim: in a basis that knows the inputs, the weakest components matter less to what the module answers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.low_rank import _shown_data, corda
from adapterlab.methods.low_rank._starts import balanced
from adapterlab.methods.low_rank.corda import CorDAStart

IN, OUT, DROPPED = 40, 32, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def inputs() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(IN, IN, generator=draw)).Q
    return torch.randn(256, IN, generator=draw) * torch.linspace(3, 0.05, IN) @ turn.T


def adapted(mode: str) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = Net()
    weight = model.layer.weight.detach().clone()
    method = al.CorDA(r=DROPPED, alpha=3, targets=["layer"], init={"name": "corda", "mode": mode})
    host = al.attach(model, method)
    method.prepare(host, "default", [{"x": inputs()}])
    return model, host.adapters("default")["layer"], weight


def measure() -> tuple[float, float]:
    """The change of the outputs when the weakest components are dropped: in CorDA's basis and in the plain one."""
    _, layer, weight = adapted("kpm")
    x = inputs()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    tail = u[:, -DROPPED:] * s[-DROPPED:] @ vh[-DROPPED:]
    return tuple(float((x @ part.T).norm() / (x @ weight.T).norm()) for part in (layer.delta().detach(), tail))


def holds() -> bool:
    ours, plain = measure()
    return ours < 0.6 * plain


def test_dropping_the_weakest_costs_less() -> None:
    assert holds()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_start_is_the_base(mode: str) -> None:
    model, layer, weight = adapted(mode)
    assert torch.allclose(model.layer.weight + layer.delta(), weight, atol=1e-5)
    assert (model(inputs()) - inputs() @ weight.T).abs().max() < 1e-4
    assert not torch.allclose(model.layer.weight, weight, atol=1e-3)
    assert sum(p.numel() for p in (layer.A, layer.B)) == DROPPED * (IN + OUT)


def test_the_strongest_hold_most_of_the_output() -> None:
    shares = []
    for mode in ("ipm", "kpm"):
        _, layer, weight = adapted(mode)
        shares.append(float((inputs() @ layer.delta().T).norm() / (inputs() @ weight.T).norm()))
    assert shares[0] > 0.8
    assert shares[1] < 0.1


def test_before_data_it_is_plain_lora(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.CorDA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert al.CorDA.capabilities()["needs_data"]
    assert not al.PiSSA.capabilities()["needs_data"]
    modes = {m: m.training for m in model.modules()}
    host.methods["default"].prepare(host, "default", [batch])
    assert (logits(model, batch) - base).abs().max() < 1e-5
    assert modes == {m: m.training for m in model.modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_components_are_those_of_all_tokens_but_padding(mode: str, tiny: Any, batch_for: Any) -> None:
    """Each row of data divided by its largest entry, labelled or not; in float64, for the first module of a model."""
    model = tiny("llama")
    batch, q = batch_for(model, rows=3), model.model.layers[0].self_attn.q_proj
    weight = q.weight.detach().double()
    with torch.no_grad():
        h = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"])).double()
    c = torch.zeros(32, 32, dtype=torch.float64)
    for row, mask in zip(h, batch["attention_mask"], strict=True):
        tokens = row[mask == 1]
        c += (tokens / tokens.max()).T @ (tokens / tokens.max()) / 3
    c += 0.01 * c.diagonal().mean() * torch.eye(32)
    u, s, vh = torch.linalg.svd(weight @ c)
    part = slice(4) if mode == "ipm" else slice(-4, None)
    method = al.CorDA(r=4, alpha=6, targets={"include": ["q"], "layers": "0"}, init={"name": "corda", "mode": mode})
    host = al.attach(model, method)
    host.methods["default"].prepare(host, "default", [batch])
    (layer,) = host.adapters("default").values()
    b = u[:, part] * (s[part] / 1.5).sqrt()
    assert torch.allclose((layer.B.double() / b).abs(), torch.ones_like(b), atol=0.05)  # up to signs
    delta = (u[:, part] * s[part]) @ vh[part] @ torch.linalg.inv(c)
    assert float((layer.delta().double() - delta).norm() / delta.norm()) < 1e-3


def test_dropout_is_off_while_it_looks() -> None:
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = Net()
        model.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(IN, OUT))
        host = al.attach(model.train(training), al.CorDA(r=4, targets=["layer.1"]))
        host.methods["default"].prepare(host, "default", [{"x": inputs()}])
        found.append(host.adapters("default")["layer.1"].A)
    assert torch.equal(*found)


ORIENTED, COVARIANCE = CorDAStart.oriented, corda.covariance


def _mode(self: Any, place: Any, c: Tensor) -> Any:
    return ORIENTED(self.replace(mode="kpm" if self.mode == "ipm" else "ipm"), place, c)


def _by_tokens(tokens: Tensor) -> Tensor:
    return tokens.T @ tokens / len(tokens)


BROKEN: dict[str, Mutation] = {
    "no covariance": (CorDAStart, "oriented", lambda self, place, c: ORIENTED(self, place, torch.eye(len(c)))),
    "inverse of the covariance": (
        CorDAStart, "oriented", lambda self, p, c: ORIENTED(self, p, torch.linalg.inv(c + torch.eye(len(c))))
    ),
    "modes exchanged": (CorDAStart, "oriented", _mode),
    "labelled tokens alone": (corda, "samples", lambda x, batch: [_shown_data.labelled(x, batch)]),
    "padding too": (corda, "samples", lambda x, batch: list(x.float() if x.dim() > 2 else x.float()[None])),
    "all rows as one": (corda, "samples", lambda x, batch: [torch.cat(_shown_data.samples(x, batch))]),
    "not divided by the largest entry": (corda, "covariance", lambda tokens: tokens.T @ tokens),
    "a mean over tokens": (corda, "covariance", _by_tokens),
    "centred": (corda, "covariance", lambda tokens: COVARIANCE(tokens - tokens.mean(0))),
    "C left in A": (corda, "balanced", lambda u, s, vh, scale: balanced(u, s, torch.linalg.qr(vh.T).Q.T, scale)),
    "all of S in A": (corda, "balanced", lambda u, s, vh, scale: (s[:, None] * vh / scale, u)),
    "the scale left out": (corda, "balanced", lambda u, s, vh, scale: balanced(u, s, vh, 1.0)),
    "dropout on while it looks": (_shown_data, "evaluating", lambda model: torch.no_grad()),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_dropping_the_weakest_costs_less,
    functools.partial(test_the_components_are_those_of_all_tokens_but_padding, "ipm"),
    functools.partial(test_the_components_are_those_of_all_tokens_but_padding, "kpm"),
    test_dropout_is_off_while_it_looks,
    lines=BROKEN,
)
