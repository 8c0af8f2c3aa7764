"""UniPELT: three methods together, each behind a gate that reads the input, are as good as the best of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.method import Method
from adapterlab.errors import ConfigError, MergeError
from adapterlab.hosts import Host, attach, load
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.composite import unipelt
from adapterlab.methods.composite.unipelt import Gate, UniPELT
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning

NAME, PREFIX = "default", "bert.encoder.layer.0.attention.self"
FAMILIES = ("llama", "gpt2", "bert-classes", "t5", "mixtral", "vit")


def tuned(method: Method | None, make: Callable[[str], Any], steps: int = 80) -> float:
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
    parameters = attach(student, method).parameters(NAME) if method else []
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for _ in range(steps if optimizer else 0):
        assert optimizer is not None
        optimizer.zero_grad()
        (student.bert(ids[:32]).last_hidden_state - wanted[:32]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float((student.bert(ids[32:]).last_hidden_state - wanted[32:]).square().mean())


def measure(make: Callable[[str], Any]) -> dict[str, float]:
    """What is left of the error, for the whole and for its parts by themselves."""
    methods: dict[str, Method] = {
        "all": UniPELT(length=3, r=2, m=4),
        "prefix": PrefixTuning(length=3, offset=0),
        "lora": LoRA(r=2, alpha=2, targets=["q", "v"]),
        "adapter": AdapterPfeiffer(m=4),
    }
    start = tuned(None, make)
    return {what: tuned(method, make) / start for what, method in methods.items()}


@pytest.mark.slow
def test_claim(tiny: Any) -> None:
    m = measure(tiny)
    parts = [m["prefix"], m["lora"], m["adapter"]]
    assert m["all"] <= 1.02 * min(parts), m
    assert m["all"] <= 0.7 * max(parts), m


def adapted(make: Any, kind: str, padding: bool = False) -> tuple[Any, Any]:
    """A model in float64 with random values in all tensors."""
    model = make(kind).double()
    host = attach(model, UniPELT(length=3, r=2, m=4, init="normal", padding=padding))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in host.tensors(NAME).values():
            value.copy_(torch.randn(value.shape, generator=draw).double() * 0.4)
    return model, host


def gate(layer: Any, h: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens of σ(w · h_t + b): `[batch, 1, 1]`."""
    g = torch.sigmoid(h @ layer.gate.weight[0] + layer.gate.bias)
    return ((g * real).sum(1) / real.sum(1))[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("padding", [False, True])
def test_formula_without_causality(padding: bool, tiny: Any) -> None:
    """A whole BERT layer by hand, with padding, which no gate counts unless it is to."""
    model, host = adapted(tiny, "bert-classes", padding)
    layer = model.bert.encoder.layer[0]
    part = {what: host.adapters(f"{NAME}/{what}") for what in ("view", "prefix", "lora", "adapter")}
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    counted = torch.ones_like(real) if padding else real
    mask = (1 - real.double())[:, None, None] * torch.finfo(torch.float64).min
    got = layer(x, mask.expand(2, 1, 5, 5))
    got = got[0] if isinstance(got, tuple) else got
    self = layer.attention.self

    def project(key: str) -> Tensor:
        module, lora = getattr(self, key), part["lora"].get(f"{PREFIX}.{key}")
        y = F.linear(x, module.weight, module.bias)
        y = y if lora is None else y + gate(lora, x, counted) * (x @ lora.A.T @ lora.B.T)
        return y.view(2, 5, 4, 8).transpose(1, 2)

    q, k, v = (project(key) for key in ("query", "key", "value"))
    g = gate(part["view"][PREFIX], x, counted)[..., None]
    p_k, p_v = part["prefix"][PREFIX].prefix
    k, v = torch.cat([g * p_k, k], 2), torch.cat([g * p_v, v], 2)
    scores = q @ k.mT / 8**0.5 + F.pad(mask, (3, 0))
    o = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32)
    with host.using():
        a = layer.attention.output(o, x)
        r = layer.output.dense(layer.intermediate(a))
        norm = layer.output.LayerNorm
        z, adapter = norm(r + a), part["adapter"]["bert.encoder.layer.0.output.LayerNorm"]
        share = torch.relu(z @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
        wanted = norm(r + a + gate(adapter, z, counted) * share)
    assert torch.allclose(got[real.bool()], wanted[real.bool()], atol=1e-10)


@torch.no_grad()
def test_formula_of_a_causal_prefix(tiny: Any) -> None:
    """Each query has a gate of its own, on its scores with the prefix and on what it gets from it."""
    _, host = adapted(tiny, "llama")
    path = "model.layers.0.self_attn"
    layer: Any = host.adapters(f"{NAME}/prefix")[path]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    h = torch.randn(2, 5, 32, dtype=torch.float64, generator=draw)
    view: Any = host.adapters(f"{NAME}/view")[path]
    g = torch.sigmoid(h @ view.gate.weight[0] + view.gate.bias)  # [batch, tokens]

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, scaling: Any = None, **_: Any) -> Any:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = (q @ k.mT * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, 1, 5, 5)
    view.around(lambda hidden_states: None, hidden_states=h)
    got = layer.around(attention, q, k, v, mask, scaling=0.3)[0]
    p_k, p_v = (t.repeat_interleave(2, 0) for t in layer.prefix)
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    row = g[:, None, :, None]
    scores = torch.cat([0.3 * row * (q @ p_k.mT), (0.3 * q @ wide_k.mT).masked_fill(~mask, -torch.inf)], -1)
    a = scores.softmax(-1)
    wanted = row * (a[..., :3] @ p_v) + a[..., 3:] @ wide_v
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_causal_gates_see_no_later_token(kind: str, tiny: Any, inside_attention: Any) -> None:
    model = tiny(kind)
    inside_attention(model)
    model, _ = adapted(tiny, kind)
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 6:] += 1
    if kind == "t5":
        read = torch.randint(3, 128, (1, 5), generator=torch.Generator().manual_seed(1))
        a, b = (model(input_ids=read, decoder_input_ids=t).logits for t in (ids, other))
    else:
        a, b = (model(t).logits for t in (ids, other))
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-10)
    assert not torch.allclose(a[:, 6:], b[:, 6:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("gated", [(False, True), (True, False), (True, True)])
def test_other_prefixes_beside_it(gated: tuple[bool, bool], tiny: Any) -> None:
    """Prefixes, with gates and without, take part in one softmax, whichever is inside."""
    model, plain = tiny("llama").double(), tiny("llama").double()
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    host = attach(plain, PrefixTuning(length=6, init="zeros", offset=0), "all")
    other = Host(model)
    for i, has_gate in enumerate(gated):
        made = UniPELT(length=3, r=2, m=4, init="normal")
        other.attach(made if has_gate else PrefixTuning(length=3, init="normal", offset=0), str(i))
        # Gates that are half open: keys and values of the prefix, and what the adapter adds, count half.
        for key, value in other.tensors(str(i)).items():
            value.mul_(0) if "gate" in key else None
        for path, layer in host.adapters("all").items():
            found = other.adapters(f"{i}/prefix" if has_gate else str(i))[path].get_parameter("prefix")
            layer.get_parameter("prefix")[:, :, 3 * i : 3 * i + 3] = found / 2 if has_gate else found
        if has_gate:
            host.attach(AdapterPfeiffer(m=4, scale=0.5), f"half-{i}")
            for path, layer in host.adapters(f"half-{i}").items():
                state = other.adapters(f"{i}/adapter")[path].state_dict()
                layer.load_state_dict({key: value for key, value in state.items() if "gate" not in key})
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-10)


@torch.no_grad()
def test_padding_changes_nothing(tiny: Any) -> None:
    model, _ = adapted(tiny, "bert-classes")
    ids = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(0))
    padded, mask = F.pad(ids, (0, 3)), F.pad(torch.ones_like(ids), (0, 3))
    assert torch.allclose(model(padded, attention_mask=mask).logits, model(ids).logits, atol=1e-10)


@pytest.mark.parametrize("kind", FAMILIES)
def test_count_saving_and_what_gates_opened(
    kind: str, tiny: Any, batch_for: Any, logits: Any, inside_attention: Any, tmp_path: Any
) -> None:
    model = tiny(kind)
    inside_attention(model)
    batch = batch_for(model)
    before = logits(model, batch)
    host = attach(model, UniPELT(length=3, r=2, m=4))
    attentions, blocks = (6, 4) if kind == "t5" else (2, 2)
    heads = 2 if kind in ("llama", "mixtral") else 4
    lora = {"gpt2": 2 * (32 + 96) + 33, "llama": 2 * (64 + 48) + 66, "mixtral": 2 * (64 + 48) + 66}
    one = lora.get(kind, 2 * (64 + 64) + 66)
    size = attentions * (2 * 3 * heads * 8 + one + 33) + blocks * (2 * 4 * 32 + 4 + 32 + 33)
    assert host.summary().trainable == size
    host.verify(batch)
    model.train()
    model(**batch)
    model.eval()
    told = host.methods[NAME].outcome(host, NAME)
    assert set(told) == {"gates of prefix", "gates of lora", "gates of adapter"}
    assert all(0.3 < float(text.split()[0]) < 0.7 for text in told.values()), told
    after = logits(model, batch)
    host.save(tmp_path / "adapter")
    again = load(tiny(kind), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), after)
    with host.using():
        assert torch.equal(logits(model, batch), before)


def test_start(tiny: Any) -> None:
    torch.manual_seed(0)
    host = attach(tiny("llama"), UniPELT(m=4))
    gates = [v.detach() for key, v in host.tensors(NAME).items() if key.endswith("gate.weight")]
    assert float(torch.cat(gates, 1).std()) == pytest.approx(0.02, rel=0.15)
    assert not any(v.any() for key, v in host.tensors(NAME).items() if key.endswith("gate.bias"))


def test_refusals(tiny: Any) -> None:
    with pytest.raises(MergeError, match=r"inside the attention|depends on the input"):
        attach(tiny("llama"), UniPELT(m=4)).merge()
    with pytest.raises(ConfigError, match="length = 0"):
        UniPELT(length=0)


FORWARD, PREPEND = Gate.forward, unipelt.prepend
AFTER, LORA = unipelt.Gated, unipelt.GatedLoRA.Layer
BARE, ADDED = unipelt.After.share, LoRA.Layer.added


def _prepended(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Mutation:
    def other(module: Any, q: Any, k: Any, v: Any, mask: Any, p_k: Any, p_v: Any, kwargs: Any) -> Any:
        return PREPEND(module, q, k, v, mask, *change(p_k, p_v), kwargs)

    return (unipelt, "prepend", other)


def _half(self: Any, h: Tensor) -> Tensor:
    return torch.full_like(FORWARD(self, h), 0.5)


def _deaf(self: Any) -> Any:
    self.padding = False
    return self


def _bare(self: Any) -> Any:
    self.bias.zero_()
    return self


BROKEN: dict[str, Mutation] = {
    "gates do not open": (Gate, "forward", _half),
    "no sigmoid": (Gate, "forward", lambda self, h: FORWARD(self, h).logit()),
    "the reverse": (Gate, "forward", lambda self, h: 1 - FORWARD(self, h)),
    "no bias": (Gate, "forward", lambda self, h: FORWARD(_bare(self), h)),
    "padding never counts": (Gate, "forward", lambda self, h: FORWARD(_deaf(self), h)),
    "padding counts": (unipelt, "over_tokens", lambda g, real: g.mean(-2, keepdim=True)),
    "the first token's gate for a row": (unipelt, "over_tokens", lambda g, real: g[:, :1]),
    "the mean in causal stacks": (Gate, "forward", lambda self, h: FORWARD(self, h).mean(-2, keepdim=True).expand(
        *h.shape[:-1], 1) if self.causal else FORWARD(self, h)),
    "LoRA without its gate": (LORA, "added", lambda self, x: ADDED(self, x)),
    "the adapter without its gate": (AFTER, "share", lambda self, z: BARE(self, z)),
    "the bias behind the gate": (AFTER, "share", lambda self, z: self.gate(z) * (BARE(self, z) - self.up_bias)
                                 + self.up_bias),
    "keys doubled": _prepended(lambda k, v: (2 * k, v)),
    "values doubled": _prepended(lambda k, v: (k, 2 * v)),
    "the prefix behind a mask": _prepended(lambda k, v: (k * 0, v * 0)),
    "alpha is used": (unipelt.UniPELT, "parts", lambda self, host: {
        **PARTS(self, host), "lora": unipelt.GatedLoRA(r=self.r, alpha=16, targets=["q", "v"])}),
}  # fmt: skip
PARTS = UniPELT.parts
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula_without_causality, False),
    functools.partial(test_formula_without_causality, True),
    test_formula_of_a_causal_prefix,
    functools.partial(test_causal_gates_see_no_later_token, "llama"),
    lines=BROKEN,
)


@pytest.mark.slow
def test_the_gain_is_lost_with_closed_gates(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "forward", lambda self, h: 0 * FORWARD(self, h))
    with pytest.raises(AssertionError):
        test_claim(tiny)
