"""Compacter: projections made of shared Kronecker factors grow with the width, not its square, and learn as much."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from adapterlab.core.method import Method
from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.hosts import attach
from adapterlab.methods.bottleneck import compacter
from adapterlab.methods.bottleneck.adapter_houlsby import AdapterHoulsby
from adapterlab.methods.bottleneck.compacter import Compacter, Rule, matrix

Layer = Compacter.Layer


def tuned(method: Method | None, make: Callable[[str], Any], steps: int = 150, lr: float = 1e-2) -> float:
    """Held-out error of fitting a frozen tiny BERT to one with other weights."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = make("bert-classes"), make("bert-classes")
    with torch.no_grad():
        for p in teacher.bert.encoder.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    ids = torch.randint(3, 128, (48, 12), generator=draw)
    with torch.no_grad():
        wanted = teacher.bert(ids).last_hidden_state
    torch.manual_seed(0)
    parameters = attach(student, method).parameters("default") if method else []
    optimizer = torch.optim.Adam(parameters, lr=lr) if parameters else None
    for _ in range(steps if optimizer else 0):
        assert optimizer is not None
        optimizer.zero_grad()
        (student.bert(ids[:32]).last_hidden_state - wanted[:32]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float((student.bert(ids[32:]).last_hidden_state - wanted[32:]).square().mean())


def projections(method: Method, width: int) -> int:
    """Numbers in the projections of an adapted BERT of one layer: neither biases nor what is shared."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    host = attach(BertModel(BertConfig(vocab_size=16, hidden_size=width, **sizes)), method)
    return sum(p.numel() for key, p in host.named_parameters("default").items() if key[-4:] != "bias" and p.dim() > 1
               and not key.startswith("shared."))  # fmt: skip


DENSE: list[tuple[float, float]] = []  # errors without and with dense adapters, whatever is broken in compact ones


def measure(make: Callable[[str], Any]) -> dict[str, float]:
    """What both kinds gain, and how much larger they become when width and bottleneck are doubled."""
    if not DENSE:
        dense = {"norms": False, "init_std": 0.02, "activation": "gelu_tanh"}
        DENSE.append((tuned(None, make), tuned(AdapterHoulsby(m=8, **dense), make)))
    start, other = DENSE[0]
    return {
        "compact": (start - tuned(Compacter(m=8, norms=False), make)) / start,
        "dense": (start - other) / start,
        "compact growth": projections(Compacter(m=16), 64) / projections(Compacter(m=8), 32),
        "dense growth": projections(AdapterHoulsby(m=16), 64) / projections(AdapterHoulsby(m=8), 32),
    }


@pytest.mark.slow
def test_claim(tiny: Any) -> None:
    m = measure(tiny)
    assert m["compact growth"] == pytest.approx(2.0, abs=0.05)
    assert m["dense growth"] == pytest.approx(4.0, abs=0.05)
    assert m["compact"] >= 0.85 * m["dense"] > 0.1, m  # with a sixth of the numbers


@pytest.mark.parametrize(("attention", "count", "share"), [(True, 161_728, 7.3e-4), (False, 104_704, 4.7e-4)])
def test_size_is_what_the_paper_says_of_t5_base(attention: bool, count: int, share: float) -> None:
    """0.073 % and, for Compacter++, 0.047 %: adapters, one A and the norms."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
        host = attach(model, Compacter(attention=attention))
    assert host.summary().trainable == count
    assert count / sum(p.numel() for p in host.base_parameters().values()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("reads", ["output", "normed"])
def test_formula(reads: Any, tiny: Any, randomise: Any) -> None:
    """BERT's feed-forward sublayer with H = Σ A_i ⊗ (S_i T_i) written out, in float64."""
    model = tiny("bert-classes").double()
    host = attach(model, Compacter(m=8, n=2, rank=3, scale=0.5, norms=False, reads=reads))
    randomise(host)
    layer: Any = model.bert.encoder.layer[0]
    where = "dense" if reads == "output" else "LayerNorm"
    adapter: Any = host.adapters("default")[f"bert.encoder.layer.0.output.{where}"]
    a = host.tensors("default")["shared.rule.A"]

    def project(x: Tensor, s: Tensor, t: Tensor, bias: Tensor) -> Tensor:
        return x @ sum(torch.kron(a[i], s[i] @ t[i]) for i in range(2)) + bias

    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = layer.feed_forward_chunk(x)
    with host.using():
        h = layer.output.dense(layer.intermediate(x))
        read = h if reads == "output" else layer.output.LayerNorm(x + h)
        z = F.gelu(project(read, adapter.down_S, adapter.down_T, adapter.down_bias), approximate="tanh")
        wanted = layer.output.LayerNorm(x + h + 0.5 * project(z, adapter.up_S, adapter.up_T, adapter.up_bias))
    assert torch.allclose(got, wanted, atol=1e-12)
    with torch.no_grad():
        for _ in range(2):  # made, then kept
            assert torch.allclose(layer.feed_forward_chunk(x), wanted, atol=1e-12)
        a.mul_(2)
        assert not torch.allclose(layer.feed_forward_chunk(x), wanted, atol=1e-3)


def test_where_it_starts() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    host = attach(BertModel(BertConfig(vocab_size=16, hidden_size=768, **sizes)), Compacter(n=8, m=48))
    tensors = host.tensors("default")
    assert float(tensors["shared.rule.A"].detach().std()) == pytest.approx(1e-4, rel=0.15)
    adapter: Any = host.adapters("default")["encoder.layer.0.output.dense"]
    for factor in (adapter.down_S, adapter.down_T, adapter.up_S, adapter.up_T):
        bound = (2 * 6 / sum(factor.shape[1:])) ** 0.5
        assert 0.9 * bound < float(factor.detach().abs().max()) <= bound
        assert float(factor.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert not adapter.down_bias.any()


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_count_and_saved_state(
    kind: str, attention: bool, tiny: Any, batch_for: Any, logits: Any, randomise: Any, tmp_path: Any
) -> None:
    """A is there once, whatever uses it; cross-attention has no adapter."""
    model = tiny(kind)
    batch = batch_for(model)
    before = logits(model, batch)
    host = attach(model, Compacter(m=4, attention=attention, norms=False))
    assert 0 < (logits(model, batch) - before).abs().max() < 1e-4
    sublayers = (4 if kind == "t5" else 2) * (2 if attention else 1)
    assert host.summary().trainable == sublayers * (2 * (4 + 32) + 4 + 32) + 4**3
    assert len([key for key in host.tensors("default") if key.endswith("rule.A")]) == 1
    assert not any("EncDec" in path for path in host.adapters("default"))
    host.verify(batch)
    randomise(host, size=0.5)
    wanted = logits(model, batch)
    saved = host.state_dict("default")
    again = tiny(kind)
    attach(again, Compacter(m=4, attention=attention, norms=False)).load_state_dict("default", saved)
    assert torch.equal(logits(again, batch), wanted)


def test_refusals(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"n = 8 must divide.*32 and 20.*Choose n from 1, 2, 4, or m"):
        attach(tiny("llama"), Compacter(n=8, m=20))
    with pytest.raises(MergeError, match="nonlinear function"):
        attach(tiny("llama"), Compacter(m=4)).merge()
    with pytest.raises(ConfigError, match="n = 0"):
        Compacter(n=0)
    with pytest.raises(ConfigError, match="reads='normed' needs norms=False"):
        Compacter(reads="normed")


WEIGHTS = Layer.weights


def _weights(change: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Any]) -> Mutation:
    return (Layer, "weights", lambda self: change(self, *WEIGHTS(self)))


def _swapped(a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return sum(torch.kron(s[i] @ t[i], a[i]) for i in range(len(a))).T  # type: ignore[union-attr]


def _own_rule(self: Any, method: Any, width: int, m: int, out: int) -> None:
    MAKE(self, method, width, m, out)
    self.own = Rule(self.site, method.n)


MAKE = Layer.make
BROKEN: dict[str, Mutation] = {
    "A behind": (compacter, "matrix", _swapped),
    "A transposed": (compacter, "matrix", lambda a, s, t: matrix(a.mT, s, t)),
    "the first product alone": (compacter, "matrix", lambda a, s, t: matrix(a[:1], s[:1], t[:1])),
    "S alone": (compacter, "matrix", lambda a, s, t: matrix(a, s, torch.ones_like(t))),
    "no bias in front": _weights(lambda self, d, db, u, ub: (d, 0 * db, u, ub)),
    "no bias behind": _weights(lambda self, d, db, u, ub: (d, db, u, 0 * ub)),
    "what is kept is never made again": (
        Layer, "weights", lambda self: self.__dict__.setdefault("stale", WEIGHTS(self))
    ),
    "the output is read in place of its norm": (
        compacter.FactoredAtNorm, "around", compacter.FactoredBehind.around
    ),
    "A starts at one": begun(Rule, lambda rule, n: rule.A.div_(1e-4)),
    "no gain at the start": begun(Layer, lambda part, method: part.up_S.div_(2**0.5)),
    "T starts at zero": begun(Layer, lambda part, method: part.up_T.zero_()),
    "A for each adapter": (Layer, "make", _own_rule),
    "cross-attention too": (Compacter, "places", lambda self, sites: [
        *(compacter.attention_outputs(sites) if self.attention else []), *compacter.feed_forwards(sites)
    ]),
    "the feed-forward alone": (Compacter, "places", lambda self, sites: compacter.feed_forwards(sites)),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "output"),
    functools.partial(test_formula, "normed"),
    test_where_it_starts,
    functools.partial(test_size_is_what_the_paper_says_of_t5_base, True, 161_728, 7.3e-4),
    lines=BROKEN,
)


@pytest.mark.slow
def test_the_gain_is_lost_when_nothing_is_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*_weights(lambda self, d, db, u, ub: (0 * d, db, u, ub)))
    m = measure(tiny)
    assert m["compact"] < 0.85 * m["dense"], m
