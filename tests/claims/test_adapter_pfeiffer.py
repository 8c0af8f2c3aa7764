"""Pfeiffer adapters: half of the adapters, close to the whole of the gain; and AdapterHub's form with the norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor

from adapterlab.core.method import Method
from adapterlab.errors import ConfigError, MergeError, TargetError
from adapterlab.hosts import attach
from adapterlab.methods.bottleneck import _bottleneck
from adapterlab.methods.bottleneck.adapter_houlsby import AdapterHoulsby
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer

FAMILIES = ("llama", "gpt2", "bert-classes", "t5", "mixtral", "vit")


def tuned(method: Method | None, make: Callable[[str], Any], steps: int = 80) -> tuple[float, int]:
    """(held-out error, trainable parameters) of fitting a frozen tiny BERT to one with other feed-forward weights."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = make("bert-classes"), make("bert-classes")
    with torch.no_grad():
        for path, p in teacher.named_parameters():
            if "intermediate" in path or ("output" in path and "attention" not in path):
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    ids = torch.randint(3, 128, (48, 12), generator=draw)
    with torch.no_grad():
        wanted = teacher.bert(ids).last_hidden_state
    if method is None:
        with torch.no_grad():
            return float((student.bert(ids[32:]).last_hidden_state - wanted[32:]).square().mean()), 0
    torch.manual_seed(0)
    host = attach(student, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (student.bert(ids[:32]).last_hidden_state - wanted[:32]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        error = (student.bert(ids[32:]).last_hidden_state - wanted[32:]).square().mean()
    return float(error), host.summary().trainable


def measure(make: Callable[[str], Any]) -> dict[str, float]:
    """Gains of one and of two adapters in each block, and the ratio of their sizes."""
    start, _ = tuned(None, make)
    one, small = tuned(AdapterPfeiffer(m=8), make)
    two, large = tuned(AdapterHoulsby(m=8, norms=False, init_std=0.02, activation="relu"), make)
    return {"one": (start - one) / start, "two": (start - two) / start, "size": small / large}


def holds(m: dict[str, float]) -> bool:
    """The claim: half of the parameters give at least 90 % of the gain."""
    return m["size"] == 0.5 and m["one"] >= 0.9 * m["two"] and m["two"] > 0.1


def test_claim(tiny: Any) -> None:
    assert holds(measure(tiny))


@pytest.mark.parametrize("reads", ["normed", "output"])
def test_formula_behind_the_sum(reads: Any, tiny: Any, randomise: Any) -> None:
    """BERT: r = FFN(x), h = LN(r + x), o = r + up(relu(down(h))), y = LN(o + x), in float64."""
    model = tiny("bert-classes").double()
    host = attach(model, AdapterPfeiffer(m=4, reads=reads))
    randomise(host)
    adapter: Any = next(iter(host.adapters("default").values()))
    layer: Any = model.bert.encoder.layer[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = layer.feed_forward_chunk(x)
    with host.using():
        r = layer.output.dense(layer.intermediate(x))
        h = layer.output.LayerNorm(r + x) if reads == "normed" else r
        o = r + torch.relu(h @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
        wanted = layer.output.LayerNorm(o + x)
    assert torch.allclose(got, wanted, atol=1e-12)


def test_formula_before_the_sum(tiny: Any, randomise: Any) -> None:
    model = tiny("llama").double()
    host = attach(model, AdapterPfeiffer(m=4))
    randomise(host)
    adapter: Any = host.adapters("default")["model.layers.0.mlp"]
    block = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = block(x)
    with host.using():
        r = block(x)
    wanted = r + torch.relu(r @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_start_is_near_the_base_and_the_count_is_the_formula(kind: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(kind)
    batch = batch_for(model)
    before = logits(model, batch)
    host = attach(model, AdapterPfeiffer(reduction=8))
    change = (logits(model, batch) - before).abs().max()
    assert 0 < change < 0.02 * before.abs().max()
    blocks = 4 if kind == "t5" else 2
    assert host.summary().trainable == blocks * (2 * 4 * 32 + 4 + 32)
    host.verify(batch)


def test_norms_as_targets(tiny: Any) -> None:
    """Where names do not tell that a norm follows the sum, it can be named."""
    host = attach(tiny("bert-classes"), AdapterPfeiffer(m=4, targets=[r".*attention\.output\.LayerNorm"]))
    assert {type(a).__name__ for a in host.adapters("default").values()} == {"AroundNorm"}
    with pytest.raises(TargetError, match="embedding"):
        attach(tiny("bert-classes"), AdapterPfeiffer(targets=["embed"]))


def test_refusals(tiny: Any) -> None:
    host = attach(tiny("bert-classes"), AdapterPfeiffer(m=4))
    with pytest.raises(MergeError, match=r"nonlinear function.*host\.save"):
        host.merge()
    with pytest.raises(ConfigError, match=r"reduction = 0\.5"):
        AdapterPfeiffer(reduction=0.5)
    with pytest.raises(ConfigError, match="reads = 'both'"):
        AdapterPfeiffer(reads="both")


def test_where_it_starts(tiny: Any) -> None:
    torch.manual_seed(0)
    layer: Any = attach(tiny("llama"), AdapterPfeiffer(m=64)).adapters("default")["model.layers.0.mlp"]
    assert layer.scale == 1.0
    for weight in (layer.down, layer.up):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
        assert weight.abs().max() > 0.05  # not cut
    assert not layer.down_bias.any()


AROUND, AFTER = _bottleneck.AroundNorm, _bottleneck.After
SHARE = _bottleneck.Projections.share


def _linear(self: Any, z: Tensor) -> Tensor:
    return (z @ self.down.T + self.down_bias) @ self.up.T + self.up_bias


BROKEN: dict[str, Mutation] = {
    "nothing is read": (AROUND, "around", lambda self, run, z: run(z + self.share(torch.zeros_like(z)))),
    "the sum is read, not its norm": (AROUND, "around", lambda self, run, z: run(z + self.share(z))),
    "added behind the norm": (AROUND, "around", lambda self, run, z: run(z) + self.share(run(z))),
    "the norm alone": (AROUND, "around", lambda self, run, z: run(self.share(run(z)))),
    "no skip connection": (AFTER, "around", lambda self, run, x: self.share(run(x))),
    "the share twice": (_bottleneck.Projections, "share", lambda self, z: 2 * SHARE(self, z)),
    "no nonlinearity": (_bottleneck.Projections, "share", _linear),
    "starts larger": begun(_bottleneck.Projections, lambda part, method: part.up.mul_(2)),
    "starts uniform": begun(_bottleneck.Projections, lambda part, method: part.up.uniform_(-0.035, 0.035)),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula_behind_the_sum, "normed"),
    functools.partial(test_formula_behind_the_sum, "output"),
    test_formula_before_the_sum,
    test_where_it_starts,
    lines=BROKEN,
)


def test_the_gain_is_lost_when_nothing_is_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN["nothing is read"])
    assert not holds(measure(tiny))
