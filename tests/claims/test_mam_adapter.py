"""MAM adapter: prefix attention is a mixture of the base's attention and attention to the prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterlab.errors import ConfigError, MergeError
from adapterlab.hosts import attach
from adapterlab.methods.composite.mam_adapter import MAMAdapter
from adapterlab.methods.prompt import prefix_tuning

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
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, p_k: Tensor, p_v: Tensor, kwargs: Any, window: Any
) -> Any:
    count = p_k.shape[2]
    mask = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], count)], -1)
    k, v = (torch.cat([t, p.expand(len(t), -1, -1, -1)], 2) for t, p in ((k, p_k), (v, p_v)))
    return k, v, mask, kwargs


def test_claim_fails_for_a_masked_prefix(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tuning, "prepend", behind)
    assert measure(tiny) > 1e-2


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
