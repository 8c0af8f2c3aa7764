"""MAM adapter: prefix attention is a mixture of the base's attention and attention to the prefix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor

from adapterlab.errors import ConfigError, MergeError
from adapterlab.hosts import Host, attach
from adapterlab.methods.bottleneck._bottleneck import Projections
from adapterlab.methods.bottleneck.adapter_parallel import AdapterParallel
from adapterlab.methods.composite.mam_adapter import MAMAdapter
from adapterlab.methods.prompt import prefix_tuning
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning

PATH = "model.layers.0.self_attn"


def measure(make: Callable[[str], Any]) -> float:
    """Largest error of (1 − λ) · Attn(q, K, V) + λ · softmax(q P_kᵀ / √hd) P_v, with grouped heads and causal mask."""
    model = make("llama").double()
    host = attach(model, MAMAdapter(length=3, m=4, init="normal"))
    layer: Any = host.adapters("default/prefix")[PATH]
    seen: dict[str, Tensor] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any) -> Any:
        # The core of the attention, by hand: K and V with what was put in front of them.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v, None

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    seen["got"] = layer.around(attention, q, k, v, mask)[0]
    p_k, p_v = (t.repeat_interleave(2, 0) for t in layer.pairs())
    own = (q @ p_k.mT / 8**0.5).exp()
    wide = k.repeat_interleave(2, 1)
    base = (q @ wide.mT / 8**0.5).masked_fill(~mask, -torch.inf).exp()
    share = own.sum(-1, keepdim=True) / (own.sum(-1, keepdim=True) + base.sum(-1, keepdim=True))
    plain = attention(q, k, v, mask)[0]
    wanted = (1 - share) * plain + share * (own / own.sum(-1, keepdim=True)) @ p_v
    return float((seen["got"] - wanted).detach().abs().max())


def test_claim(tiny: Any) -> None:
    assert measure(tiny) < 1e-5


def behind(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, p_k: Tensor, p_v: Tensor, kwargs: Any, *_: Any
) -> Any:
    count = p_k.shape[2]
    mask = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], count)], -1)
    k, v = (torch.cat([t, p.expand(len(t), -1, -1, -1)], 2) for t, p in ((k, p_k), (v, p_v)))
    return k, v, mask, kwargs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_both_parts_train_and_the_count_is_the_formula(
    kind: str, tiny: Any, batch_for: Any, logits: Any, inside_attention: Any
) -> None:
    model = tiny(kind)
    inside_attention(model)
    batch = batch_for(model)
    before = logits(model, batch)
    host = attach(model, MAMAdapter(length=3, m=4))
    attentions, blocks = (6, 4) if kind == "t5" else (2, 2)
    heads = 2 if kind in ("llama", "mixtral") else 4
    wanted = attentions * 2 * 3 * heads * 8 + blocks * (2 * 4 * 32 + 4 + 32)
    assert host.summary().trainable == wanted
    host.verify(batch)
    after = logits(model, batch)
    assert not torch.equal(after, before)
    with host.using():
        assert torch.equal(logits(model, batch), before)
    saved = host.state_dict("default")
    again = tiny(kind)
    attach(again, MAMAdapter(length=3, m=4, init="zeros")).load_state_dict("default", saved)
    assert torch.equal(logits(again, batch), after)


def test_parameters_reach_the_parts(tiny: Any) -> None:
    host = attach(tiny("llama"), MAMAdapter(length=5, m=6, scale=2.0, dropout=0.1))
    adapter: Any = host.adapters("default/adapter")["model.layers.0.mlp"]
    assert (adapter.scale, adapter.p, adapter.down.shape[0]) == (2.0, 0.1, 6)
    assert host.adapters("default/prefix")[PATH].get_parameter("prefix").shape == (2, 2, 5, 8)


def test_refusals(tiny: Any) -> None:
    host = attach(tiny("llama"), MAMAdapter(length=3, m=4))
    with pytest.raises(MergeError, match=r"host\.save"):
        host.merge()
    with pytest.raises(ConfigError, match="length = 0"):
        MAMAdapter(length=0)


def test_it_is_a_prefix_without_positions_and_a_parallel_adapter(
    tiny: Any, batch_for: Any, logits: Any, randomise: Any
) -> None:
    model, apart = tiny("llama"), tiny("llama")
    batch = batch_for(model)
    host = attach(model, MAMAdapter(length=3, m=4, scale=2.0, init="zeros"))
    randomise(host)
    parts = attach(apart, PrefixTuning(length=3, init="zeros", offset=0), "prefix")
    parts.attach(AdapterParallel(m=4, scale=2.0), "adapter")
    for name in ("prefix", "adapter"):
        own = {key.removeprefix(f"{name}/"): value for key, value in host.state_dict("default").items()}
        parts.load_state_dict(name, {key: own[key] for key in parts.state_dict(name)})
    assert torch.allclose(logits(model, batch), logits(apart, batch), atol=1e-6)


PREPEND, ATTACH, COMPOSE = prefix_tuning.prepend, MAMAdapter.attach, Host.compose


def _prefix(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Mutation:
    def prepend(module: Any, q: Any, k: Any, v: Any, mask: Any, p_k: Tensor, p_v: Tensor, *rest: Any) -> Any:
        return PREPEND(module, q, k, v, mask, *change(p_k, p_v), *rest)

    return (prefix_tuning, "prepend", prepend)


def _given(**other: Any) -> Mutation:
    """Something else reaches the parts than was set."""
    return (MAMAdapter, "attach", lambda self, host, name: ATTACH(self.replace(**other), host, name))


def _moved(self: Host, name: str, key: str, method: Any) -> None:
    COMPOSE(self, name, key, method.replace(offset=None) if key == "prefix" else method)


test_the_mixture_fails_with = fails_without(
    test_claim,
    lines={
        "a masked prefix": (prefix_tuning, "prepend", behind),
        "no prefix": _prefix(lambda k, v: (k[:, :, :0], v[:, :, :0])),
        "keys alone": _prefix(lambda k, v: (k, 0 * v)),
        "values alone": _prefix(lambda k, v: (0 * k, v)),
        "keys scaled": _prefix(lambda k, v: (2 * k, v)),
        "keys and values exchanged": _prefix(lambda k, v: (v, k)),
        "heads exchanged": _prefix(lambda k, v: (k.flip(1), v)),
        "one pair less": _prefix(lambda k, v: (k[:, :, 1:], v[:, :, 1:])),
    },
)  # fmt: skip
test_the_composition_fails_with = fails_without(
    test_parameters_reach_the_parts,
    functools.partial(test_both_parts_train_and_the_count_is_the_formula, "llama"),
    test_it_is_a_prefix_without_positions_and_a_parallel_adapter,
    lines={
        "another scale": _given(scale=4.0),
        "another dropout": _given(dropout=0.0),
        "another width": _given(m=5),
        "another length": _given(length=4),
        "positions of the prefix": (Host, "compose", _moved),
        "s left out": begun(Projections, lambda part, method: setattr(part, "scale", 1.0)),
    },
)
