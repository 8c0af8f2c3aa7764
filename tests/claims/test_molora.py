"""MoLoRA: experts that are mixed by output, token by token, fit what one low-rank update cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clusters import CLUSTERS, RANK, fitted, updates
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.core.method import Method
from adapterlab.errors import AttachError, ConfigError, MergeError, TargetError
from adapterlab.hosts import Host, attach
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.mixture.molora import MoLoRA
from adapterlab.ops import experts


def measure() -> dict[str, float]:
    """Errors, summed over two seeds, of the mixture and of one update of the same size."""
    return {
        "lora": error(LoRA(r=CLUSTERS * RANK, alpha=16.0)),
        "mixture": error(MoLoRA(experts=CLUSTERS, r=RANK, alpha=4.0)),
    }


def error(method: Method) -> float:
    return sum(fitted(method, *updates(seed), seed=seed) for seed in range(2))


def holds(errors: dict[str, float]) -> bool:
    """The claim: at most half the error of plain LoRA."""
    return errors["mixture"] <= 0.5 * errors["lora"]


def test_claim() -> None:
    assert holds(measure())


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_formula(kind: str, top_k: int | None, tiny: Any, randomise: Any) -> None:
    """Against a loop over the experts in float64, also on a transposed weight."""
    model = tiny(kind).double()
    path = {"llama": "model.layers.0.mlp.down_proj", "gpt2": "transformer.h.0.mlp.c_proj"}[kind]
    module = model.get_submodule(path)
    x = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    base = module(x)
    host: Host = attach(model, MoLoRA(experts=3, r=2, alpha=6.0, top_k=top_k, targets=["down"]))
    assert torch.equal(module(x), base)
    randomise(host)
    part: Any = host.adapters("default")[path]
    p = torch.softmax(x @ part.router.T, -1)
    if top_k:
        p = torch.where(p >= p.sort(-1, descending=True).values[..., top_k - 1 : top_k], p, 0)
    wanted = base + 3.0 * sum(p[..., e, None] * (x @ part.A[e].T @ part.B[e].T) for e in range(3))
    assert torch.allclose(module(x), wanted, atol=1e-12)


def test_count(tiny: Any) -> None:
    host = attach(tiny("llama"), MoLoRA(experts=3, r=2, targets=["v", "down"]))
    sizes = [(32, 16), (48, 32)] * 2
    assert host.summary().trainable == sum(3 * 2 * (i + o) + 3 * i for i, o in sizes)
    assert {key.rpartition(".")[2] for key in host.tensors("default")} == {"A", "B", "router"}, "as it was always saved"


def test_router_stays_in_float32(tiny: Any) -> None:
    model = tiny("llama").bfloat16()
    part: Any = attach(model, MoLoRA(targets=["q"])).adapters("default")["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        p = part.weights(x)
    assert p.dtype == torch.float32
    assert torch.equal(p, torch.softmax(x.float() @ part.router.T, -1))


def test_refusals(tiny: Any) -> None:
    host = attach(tiny("llama"), MoLoRA())
    with pytest.raises(MergeError, match=r"router.*host\.save"):
        host.merge()
    with pytest.raises(AttachError, match=r"lm_head: its weight is tied.*all-linear"):
        attach(tiny("llama-tied"), MoLoRA(targets=["head"]))
    with pytest.raises(TargetError, match="embed"):
        attach(tiny("llama"), MoLoRA(targets=["embed"]))
    with pytest.raises(ConfigError, match="top_k=4 is more than experts=3"):
        al.method("molora")(experts=3, top_k=4)


def test_where_it_starts(tiny: Any) -> None:
    torch.manual_seed(0)
    part: Any = attach(tiny("llama"), MoLoRA(experts=4, r=16, targets=["q"])).adapters("default")[
        "model.layers.0.self_attn.q_proj"
    ]
    assert not part.B.any()
    assert float(part.A.std()) == pytest.approx(0.02, rel=0.1)
    assert float(part.router.std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(part.A[0], part.A[1])


LAYER, MIXTURE = MoLoRA.Layer, experts.mixture


def _mixture(change: Callable[[Tensor, Tensor], Tensor]) -> Mutation:
    """Other weights, made of the scores and the right ones."""
    return (experts, "mixture", lambda z, *how: change(z, MIXTURE(z, *how)))


def _factors_mixed(self: Any, x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """The factors mixed instead of the experts' outputs, as some implementations have it."""
    p = self.weights(x)
    a, b = (torch.einsum("...e,eij->...ij", p, t) for t in (self.A, self.B))
    return F.linear(x, weight, bias) + self.scale * (b @ (a @ x[..., None]))[..., 0]


BROKEN: dict[str, Mutation] = {
    "equal weights": _mixture(lambda z, p: torch.full_like(p, 1 / p.shape[-1])),
    "weights over tokens": _mixture(lambda z, p: z.softmax(0)),
    "no softmax": _mixture(lambda z, p: z),
    "the others are not left out": _mixture(lambda z, p: z.softmax(-1)),
    "the chosen ones sum to one": _mixture(lambda z, p: p / p.sum(-1, keepdim=True)),
    "one router for all tokens": _mixture(lambda z, p: p.flatten(0, -2).mean(0).expand_as(p)),
    "factors mixed, not outputs": (LAYER, "mixed", _factors_mixed),
    "s left out": begun(LAYER, lambda part, method: setattr(part, "scale", 1.0)),
    "B does not start at zero": begun(LAYER, lambda part, method: part.B.normal_()),
    "experts start alike": begun(LAYER, lambda part, method: part.A.copy_(part.A[:1].expand_as(part.A).clone())),
    "the router starts larger": begun(LAYER, lambda part, method: part.router.mul_(3)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "gpt2", None),
    functools.partial(test_formula, "gpt2", 2),
    test_where_it_starts,
    lines=BROKEN,
)


@pytest.mark.parametrize("line", ["equal weights", "weights over tokens"])
def test_the_fit_is_lost_with_a_wrong_router(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not holds(measure())
