"""MING-MOE: a few of several updates in the feed-forward network fit tasks that come without a label."""

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
from adapterlab.methods.mixture._experts import Experts, Single
from adapterlab.methods.mixture.ming_moe import MingMoE
from adapterlab.ops import experts


def measure() -> dict[str, float]:
    """Errors of the mixture and of one update of the same size; the clusters are tasks that nobody names."""

    def error(method: Method) -> float:
        return fitted(method, *updates(0), steps=300)

    return {
        "lora": error(LoRA(r=CLUSTERS * RANK, alpha=16.0)),
        "mixture": error(MingMoE(experts=CLUSTERS, r=RANK, alpha=4.0, routed=("0",))),
    }


def holds(errors: dict[str, float]) -> bool:
    """The claim: at most half the error of plain LoRA."""
    return errors["mixture"] <= 0.5 * errors["lora"]


def test_claim() -> None:
    assert holds(measure())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_formula(kind: str, tiny: Any, randomise: Any) -> None:
    """Against a sparse loop in float64: each token goes through the experts of its largest scores alone."""
    model = tiny(kind).double()
    end = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[kind]
    host: Host = attach(model, MingMoE(experts=4, r=4, alpha=6.0, scale="sqrt"))
    parts: Any = host.adapters("default")
    path = next(path for path in parts if path.endswith(end))
    part, module = parts[path], model.get_submodule(path)
    x = torch.randn(6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with host.using():
        base = module(x)
    assert torch.equal(module(x), base)
    randomise(host)
    wanted = []
    for token, y in zip(x, base, strict=True):
        z, chosen = (token @ part.router.T + part.shift).topk(2)
        for c, e in zip(z.softmax(-1), chosen, strict=True):
            y = y + 3.0 * c * (part.B[e] @ (part.A[e] @ token))
        wanted.append(y)
    assert torch.allclose(module(x), torch.stack(wanted), atol=1e-12)


def test_attention_has_plain_updates(tiny: Any, randomise: Any) -> None:
    model = tiny("llama").double()
    host = attach(model, MingMoE(experts=3, r=2, alpha=6.0))
    parts: Any = host.adapters("default")
    assert {path.rpartition(".")[2] for path, part in parts.items() if isinstance(part, Experts)} == {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    randomise(host)
    path = "model.layers.1.self_attn.o_proj"
    part, module, x = parts[path], model.get_submodule(path), torch.randn(5, 32, dtype=torch.float64)
    wanted = F.linear(x, module.weight) + 3.0 * (x @ part.A[0].T @ part.B[0].T)
    assert torch.allclose(module(x), wanted, atol=1e-12)


def test_count(tiny: Any) -> None:
    host = attach(tiny("llama"), MingMoE(experts=3, r=2))
    routed = sum(3 * 2 * (i + o) + 3 * (i + 1) for o, i in [(48, 32), (48, 32), (32, 48)])
    assert host.summary().trainable == 2 * (routed + sum(2 * (32 + o) for o in (32, 16, 16, 32)))


def test_one_expert_is_lora(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model, other = tiny("llama").double(), tiny("llama").double()  # to the bit: no kernel takes these
    host, lora = attach(model, MingMoE(experts=1, r=2, alpha=6.0)), attach(other, LoRA(r=2, alpha=6.0))
    randomise(host)
    lora.load_state_dict("default", {key: value[0] for key, value in host.state_dict("default").items()})
    live = logits(model, batch_for(model))
    assert torch.equal(live, logits(other, batch_for(other)))
    host.merge()
    assert (logits(model, batch_for(model)) - live).abs().max() < 1e-4


def test_where_it_starts(tiny: Any) -> None:
    torch.manual_seed(0)
    parts: Any = attach(tiny("llama"), MingMoE(experts=4, r=16)).adapters("default")
    part = parts["model.layers.0.mlp.up_proj"]
    assert not part.B.any()
    for tensor in (part.A, part.router, part.shift):
        assert 0.6 / 32**0.5 < tensor.abs().max() <= 1 / 32**0.5
    assert not torch.equal(part.A[0], part.A[1])


def test_refusals(tiny: Any) -> None:
    with pytest.raises(MergeError, match="router"):
        attach(tiny("llama"), MingMoE()).merge()
    with pytest.raises(ConfigError, match="top_k=4 is more than experts=3"):
        al.method("ming_moe")(experts=3, top_k=4)
    with pytest.raises(ConfigError, match="top_k"):
        al.method("ming_moe")(top_k=1)
    with pytest.raises(TargetError, match=r"none of the 4 adapted modules.*down"):
        attach(tiny("llama"), MingMoE(targets=["q", "v"]))
    with pytest.raises(AttachError, match="tied"):
        attach(tiny("llama-tied"), MingMoE(targets=["head"]))


PRODUCT, MIXTURE = experts._product, experts.mixture


def _mixture(change: Callable[[Tensor, Any, Tensor], Tensor]) -> Mutation:
    """Other weights, made of the scores, the choice and the right weights."""
    return (experts, "mixture", lambda z, chosen, how: change(z, chosen, MIXTURE(z, chosen, how)))


BROKEN: dict[str, Mutation] = {
    "equal weights": _mixture(lambda z, chosen, w: chosen / chosen.sum(-1, keepdim=True)),
    "softmax over all": _mixture(lambda z, chosen, w: z.softmax(-1).masked_fill(~chosen, 0)),
    "no expert is left out": _mixture(lambda z, chosen, w: z.softmax(-1)),
    "the smallest scores": (experts, "selection", lambda z, k: z <= z.sort(-1).values[..., k - 1 : k]),
    "no bias": (experts, "_product", lambda x, router, shift: PRODUCT(x, router)),
    "alpha / r": (MingMoE, "scaling", property(lambda self: self.alpha / self.r)),
    "routed everywhere": (MingMoE, "count", lambda self, site: self.experts),
    "s left out of the plain updates": begun(Single, lambda part, method: setattr(part, "scale", 1.0)),
    "B does not start at zero": begun(Experts, lambda part, method: part.B.normal_()),
    "the router starts larger": begun(Experts, lambda part, method: part.router.mul_(3)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "llama"), test_attention_has_plain_updates, test_where_it_starts, lines=BROKEN
)


def test_the_fit_is_lost_with_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*_mixture(lambda z, chosen, w: torch.full_like(z, 1 / CLUSTERS)))
    assert not holds(measure())
