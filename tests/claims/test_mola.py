"""MoLA: experts where the layers that need them are, a few for each token, and a balance over each layer's routers."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clusters import CLUSTERS, WIDTH, fitted
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.hosts import Host, attach
from adapterlab.methods.mixture.mola import Balance, MoLA
from adapterlab.ops import experts

NARROW = 4


class Tower(nn.Module):
    """Two linear layers in a stack, the first of which makes few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, NARROW, bias=False), nn.Linear(NARROW, WIDTH, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def measure() -> dict[str, float]:
    """Errors with more experts above and with more below, as large in all but for the routers.

    In each of four clusters another update of the upper layer is right, and it leads out of what the lower one, which
    sees the same clusters, can reach through the frozen weight above.
    """
    draw = torch.Generator().manual_seed(1)
    which = torch.arange(512) % CLUSTERS
    x = 4 * torch.randn(CLUSTERS, WIDTH, generator=draw)[which] + torch.randn(512, WIDTH, generator=draw)
    deltas = torch.randn(CLUSTERS, WIDTH, NARROW, generator=draw)
    found = {}
    for pattern in ("24", "42"):
        torch.manual_seed(0)
        tower = Tower()
        with torch.no_grad():
            update = torch.einsum("ni,noi->no", tower.layers[0](x), deltas[which])
            y = (tower(x) + update) / update.std()
            tower.layers[1].weight /= update.std()
        method = MoLA(experts=pattern, r=NARROW, alpha=8.0, balance=0.0)
        found[pattern] = fitted(method, x, y, tower, steps=200, lr=3e-2)
    return found


def holds(errors: dict[str, float]) -> bool:
    """The claim: experts pay where they are needed."""
    return errors["24"] <= 0.5 * errors["42"]


def test_claim() -> None:
    assert holds(measure())


def test_patterns() -> None:
    method = MoLA(experts="2468")
    assert [method.at(j, 32) for j in range(32)] == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert MoLA(experts="inverted_triangle") == MoLA(experts=2468) == MoLA(experts=[2, 4, 6, 8])
    assert MoLA(experts="hourglass").experts == (8, 2, 2, 8)
    assert MoLA(experts=[12]).experts == (12,)
    with pytest.raises(ConfigError, match=r"triangel.*triangle"):
        al.method("mola")(experts="triangel")
    with pytest.raises(ConfigError, match=r"top_k=3 is more than the 2 experts"):
        al.method("mola")(experts="2468", top_k=3)
    with pytest.raises(ConfigError, match="experts"):
        al.method("mola")(experts="1468")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_formula(kind: str, tiny: Any, randomise: Any) -> None:
    """Against a sparse loop in float64, in a layer that the pattern gives six experts."""
    model = tiny(kind).double()
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[kind]
    host: Host = attach(model, MoLA(experts="2468", r=2, alpha=6.0))
    parts: Any = host.adapters("default")
    assert {len(part.A) for key, part in parts.items() if ".0." in key} == {2}
    part, module = parts[path], model.get_submodule(path)
    assert len(part.A) == 6
    x = torch.randn(6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with host.using():
        base = module(x)
    assert torch.equal(module(x), base)
    randomise(host)
    wanted = []
    for token, y in zip(x, base, strict=True):
        p, chosen = (token @ part.router.T).softmax(-1).topk(2)
        for c, e in zip(p / p.sum(), chosen, strict=True):
            y = y + 3.0 * c * (part.B[e] @ (part.A[e] @ token))
        wanted.append(y)
    assert torch.allclose(module(x), torch.stack(wanted), atol=1e-12)


def test_count(tiny: Any) -> None:
    """Equal layers make the triangle as large as the inverted one."""
    sizes = [(o, i) for o, i in [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]]
    counts = [attach(tiny("llama"), MoLA(experts=pattern, r=2)).summary().trainable for pattern in ("26", "62")]
    assert counts == [sum(n * (2 * (o + i) + i) for n in (2, 6) for o, i in sizes)] * 2


def emitted(host: Host, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of what the layers emit, and its gradients."""
    with host.state.collect() as losses:
        host.model(**batch)
    return _with_gradients(host, torch.stack(losses).sum())


def _with_gradients(host: Host, total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    if not total.requires_grad:
        return total, {}
    parameters = host.named_parameters("default")
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return total.detach(), {k: g for k, g in zip(parameters, grads, strict=True) if g is not None}


def reference(host: Host, batch: dict[str, Tensor], real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the rows of each layer's routers below each other, as the authors' code has it."""
    rows: dict[Any, list[Tensor]] = defaultdict(list)
    handles = [
        part.site.module.register_forward_pre_hook(
            lambda _, args, part=part: rows[part.site.layer].append(args[0][real] @ part.router.T)
        )
        for part in host.adapters("default").values()
    ]
    host.model(**batch)
    for handle in handles:
        handle.remove()
    total = torch.zeros(())
    for logits in (torch.cat(found) for found in rows.values()):
        p = logits.softmax(-1)
        counts = F.one_hot(p.topk(2).indices, p.shape[-1]).sum((0, 1)).double()
        total = total + 0.01 * p.shape[-1] * (counts / counts.sum() * p.mean(0)).sum()
    return _with_gradients(host, total)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_balance(mode: Any, tiny: Any, batch_for: Any, randomise: Any) -> None:
    """Over a layer's modules together, without padding, also when the blocks are computed again."""
    model = tiny("llama").double().train()
    host = attach(model, MoLA(experts="34", r=2, balance=0.01))
    randomise(host)
    batch = batch_for(model)
    wanted, grads = reference(host, batch, batch["attention_mask"].bool())
    assert any(key.endswith(".A") for key in grads), "what comes before a router matters to it"
    host.recompute(mode)
    for _ in range(2):  # a second pass begins anew
        found, ours = emitted(host, batch)
        assert torch.allclose(found, wanted)
        for key in ours.keys() | grads.keys():
            one, other = (given.get(key, torch.zeros((), dtype=torch.float64)) for given in (ours, grads))
            assert torch.allclose(one, other, atol=1e-12), key


def test_what_the_balance_says() -> None:
    balance, p = Balance(1.0, 2), torch.full((6, 4), 0.25)
    picked = torch.tensor([[1.0, 1, 0, 0]]).expand(6, 4)
    even = [balance.more(path, picked, p, None) for path in ("q", "v")]
    assert torch.stack(even).sum() == pytest.approx(1), "a uniform p"
    taken = [balance.more(path, picked, picked / 2, None) for path in ("q", "v")]
    assert torch.stack(taken).sum() == pytest.approx(4 / 2), "two experts take everything"
    real = torch.tensor([True, False, True, True, True, True])
    mixed = torch.where(real[:, None], p, torch.tensor([1.0, 0, 0, 0]))
    assert balance.more("q", picked, mixed, real) == pytest.approx(1), "padding counts nothing"


def test_refusals(tiny: Any) -> None:
    with pytest.raises(MergeError, match="router"):
        attach(tiny("llama"), MoLA()).merge()
    with pytest.raises(AttachError, match="lm_head lies in no stack"):
        attach(tiny("llama"), MoLA(targets=["head"]))
    bert = attach(tiny("bert-classes"), MoLA())
    assert all(part.site.layer is not None for part in bert.adapters("default").values())
    stacks = {part.site.stack for part in attach(tiny("t5"), MoLA()).adapters("default").values()}
    assert len(stacks) == 2


LAYER, MORE, MIXTURE = MoLA.Layer, Balance.more, experts.mixture


def _mixture(change: Callable[[Tensor, Any, Tensor], Tensor]) -> Mutation:
    return (experts, "mixture", lambda z, chosen, how: change(z, chosen, MIXTURE(z, chosen, how)))


def _more(change: Callable[..., tuple[Any, ...]]) -> Mutation:
    """A balance of other selections, probabilities or tokens."""
    return (Balance, "more", lambda self, path, *given: MORE(self, path, *change(*given)))


def _by_itself(self: Any, path: str, *given: Any) -> Tensor:
    """Each module balanced by itself, and the mean of those."""
    self.begin()
    return MORE(self, path, *given) / self.modules


BROKEN: dict[str, Mutation] = {
    "equal weights": _mixture(lambda z, chosen, w: chosen / chosen.sum(-1, keepdim=True)),
    "not divided by their sum": _mixture(lambda z, chosen, w: z.softmax(-1).masked_fill(~chosen, 0)),
    "no expert is left out": _mixture(lambda z, chosen, w: z.softmax(-1)),
    "the same number everywhere": (MoLA, "at", lambda self, layer, depth: self.experts[0]),
    "more below": (MoLA, "at", lambda self, layer, depth: self.experts[-1 - layer * len(self.experts) // depth]),
    "s left out": begun(LAYER, lambda part, method: setattr(part, "scale", 1.0)),
    "B does not start at zero": begun(LAYER, lambda part, method: part.B.normal_()),
    "padding counts": _more(lambda picked, p, real: (picked, p, None)),
    "shares by p": _more(lambda picked, p, real: (p, p, real)),
    "each module by itself": (Balance, "more", _by_itself),
    "not times N": (Balance, "value", lambda self: (self.picked / self.picked.sum() * self.sums).sum() / self.tokens),
    "no gradient": _more(lambda picked, p, real: (picked, p.detach(), real)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "llama"), functools.partial(test_balance, "none"), lines=BROKEN
)


def test_the_claim_is_lost_with_the_same_number_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoLA, "at", lambda self, layer, depth: 2)
    assert not holds(measure())
