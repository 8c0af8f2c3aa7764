"""MoV: vectors of which a router takes a mean for each token fit gains that one vector cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clusters import fitted
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.core.method import Method
from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.hosts import Host, attach
from adapterlab.methods.mixture import mov
from adapterlab.methods.mixture.mov import MoV, Vectors
from adapterlab.methods.multiplicative.ia3 import IA3

WIDTH = 16


def gains(seed: int) -> tuple[Tensor, Tensor, nn.Sequential]:
    """Two clusters, told apart by a plane through zero, and targets W x of which each cluster scales the entries."""
    draw = torch.Generator().manual_seed(seed)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw) / 4)
    which = torch.arange(512) % 2
    centre = 3 * torch.randn(WIDTH, generator=draw)
    x = centre * (1 - 2 * which[:, None]) + torch.randn(512, WIDTH, generator=draw)
    scales = 0.25 + 1.5 * torch.rand(2, WIDTH, generator=draw)
    return x, x @ linear.weight.detach().T * scales[which], nn.Sequential(linear)


def measure() -> dict[str, float]:
    """Errors of one vector and of a mixture of two, which a router reads off the scaled output."""

    def error(method: Method) -> float:
        return fitted(method, *gains(0), steps=150, lr=5e-2)

    own: Any = {"targets": ["0"], "feedforward": ()}
    return {"ia3": error(IA3(**own)), "mixture": error(MoV(experts=2, **own))}


def holds(errors: dict[str, float]) -> bool:
    """The claim: at most a fifth of the error."""
    return errors["mixture"] <= 0.2 * errors["ia3"]


def test_claim() -> None:
    assert holds(measure())


def weights(part: Any, u: Tensor, top_k: int | None) -> Tensor:
    p = torch.softmax(u @ part.router.T, -1)
    return p if top_k is None else torch.where(p >= p.sort(-1, descending=True).values[..., top_k - 1 : top_k], p, 0)


CASES = {"llama": ("k_proj", 2), "gpt2": ("c_attn", 12), "t5": ("SelfAttention.v", 4), "down": ("mlp.down_proj", 1)}


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_formula(case: str, top_k: int | None, tiny: Any, randomise: Any) -> None:
    """Against a loop over heads and experts in float64; at the start the output is the base's, to the bit."""
    kind = "llama" if case == "down" else case
    model, (end, heads) = tiny(kind).double(), CASES[case]
    host: Host = attach(model, MoV(experts=3, top_k=top_k))
    parts: Any = host.adapters("default")
    path = next(path for path in parts if path.endswith(end))
    part, module = parts[path], model.get_submodule(path)
    assert part.on_input == (case == "down")
    x = torch.randn(2, 3, 48 if case == "down" else 32, dtype=torch.float64)
    with host.using():
        base = module(x)
    assert torch.equal(module(x), base)
    randomise(host)
    with host.using():
        wanted = _rescaled(part, x, top_k, 1, module) if case == "down" else _rescaled(part, module(x), top_k, heads)
    assert torch.allclose(module(x), wanted, atol=1e-12)


def _rescaled(part: Any, u: Tensor, top_k: int | None, heads: int, then: Any = lambda y: y) -> Tensor:
    """What is left of the weights, where some are set to 0, is that of a vector of ones."""
    width = u.shape[-1] // heads
    pieces = []
    for head in range(heads):
        own = u[..., head * width : (head + 1) * width]
        p, scales = weights(part, own, top_k), part.l[:, head * width : (head + 1) * width]
        mean = sum(p[..., e, None] * scales[e] for e in range(len(scales)))
        pieces.append(own * (mean + 1 - p.sum(-1, keepdim=True)))
    return then(torch.cat(pieces, -1))


def test_the_router_gets_no_gradient_before_the_vectors_differ(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = attach(model, MoV(experts=4))
    model(**batch_for(model)).loss.backward()
    for key, p in host.named_parameters("default").items():
        assert p.grad is not None
        assert bool(p.grad.any()) == key.endswith(".l"), key
        if key.endswith(".l"):
            apart = (p.grad - p.grad.mean(0)).abs().max()
            assert apart > 1e-3 * p.grad.abs().max(), "the random router makes the vectors differ"


def test_one_vector_is_ia3(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    found = []
    for method in (MoV(experts=1), IA3()):
        model = tiny("llama")
        host = attach(model, method)
        randomise(host)
        live = logits(model, batch_for(model))
        host.merge()
        assert (logits(model, batch_for(model)) - live).abs().max() < 1e-4
        found.append((live, host.tensors("default")))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()


@pytest.mark.parametrize("scope", ["head", "tensor"])
def test_count(scope: Any, tiny: Any) -> None:
    host = attach(tiny("llama"), MoV(experts=3, router_scope=scope))
    router = 8 if scope == "head" else 16
    assert host.summary().trainable == 2 * 3 * (2 * (16 + router) + 48 + 48)


def test_refusals(tiny: Any) -> None:
    with pytest.raises(MergeError, match="router"):
        attach(tiny("llama"), MoV()).merge()
    with pytest.raises(ConfigError, match="top_k=4 is more than experts=3"):
        al.method("mov")(experts=3, top_k=4)
    lone = nn.ModuleDict({"k": nn.Linear(8, 8)})
    with pytest.raises(AttachError, match=r"k makes 8 numbers.*router_scope='tensor'"):
        attach(lone, MoV(targets=["k"]))
    assert attach(lone, MoV(targets=["k"], router_scope="tensor")).adapters("default")
    with pytest.raises(AttachError, match="tied"):
        attach(tiny("llama-tied"), MoV(targets=["head"]))


LAYER, WEIGHTS, SCALED = Vectors, Vectors.weights, Vectors.scaled


def _weights(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Mutation:
    return (LAYER, "weights", lambda self, u: change(self, u, WEIGHTS(self, u)))


BROKEN: dict[str, Mutation] = {
    "equal weights": _weights(lambda self, u, p: torch.full_like(p, 1 / p.shape[-1])),
    "no softmax": _weights(lambda self, u, p: u @ self.router.T),
    "the chosen ones sum to one": _weights(lambda self, u, p: p / p.sum(-1, keepdim=True)),
    "the others are not left out": _weights(lambda self, u, p: (u @ self.router.T).softmax(-1)),
    "the first head's weights for all": _weights(lambda self, u, p: p[..., :1, :].expand_as(p).contiguous()),
    "the wrong side": begun(LAYER, lambda part, method: setattr(part, "on_input", not part.on_input)),
    "vectors start at zero": begun(LAYER, lambda part, method: part.l.zero_()),
    "the router starts at zero": begun(LAYER, lambda part, method: part.router.zero_()),
    "scaled twice": (LAYER, "scaled", lambda self, u: SCALED(self, SCALED(self, u))),
    "one vector for all": (mov, "weighted_scales", lambda u, w, v: u * w.sum(-1, keepdim=True) * v.mean(0)),
    "one more than the scale": (mov, "weighted_scales", lambda u, w, v: u + u * torch.einsum("...he,ehd->...hd", w, v)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "llama", None),
    functools.partial(test_formula, "llama", 2),
    functools.partial(test_formula, "down", None),
    test_the_router_gets_no_gradient_before_the_vectors_differ,
    lines=BROKEN,
)


def test_the_fit_is_lost_with_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN["equal weights"])
    assert not holds(measure())
