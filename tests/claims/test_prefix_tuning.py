"""Prefix tuning: a prefix of real keys and values is the same as reading the words, and steers more than a prompt."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

import adapterlab as al
from adapterlab.engine import attention
from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign import written_attention
from adapterlab.methods.prompt import prefix_tuning
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.prompt.prompt_tuning import PromptTuning

WORDS = (17, 4, 99, 31, 8)
QUIET: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(rows: int = 2, length: int = 7, seed: int = 5) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def same_as_reading(model: Any) -> float:
    """Largest difference between a prefix started from words and the plain model that reads the words first."""
    x, words = ids(), torch.tensor([WORDS, WORDS])
    with torch.no_grad():
        read = model(torch.cat([words, x], 1)).logits[:, len(WORDS) :]
        al.attach(model, PrefixTuning(length=len(WORDS), words=WORDS))
        return float((model(x).logits - read).abs().max())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_prefix_of_words_equals_reading_them(family: str, implementation: str, tiny: Any) -> None:
    model = tiny(family)
    model.set_attn_implementation(implementation)
    assert same_as_reading(model) < 1e-5


def test_linear_biases_have_the_prefix_in_front() -> None:
    """Bloom, whose heads are no power of two: it computes attention by itself, to the bit the same without a prefix."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=48, n_layer=2, n_head=6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        before = model(ids()).logits
    assert same_as_reading(model) < 2e-5
    host: Any = al.host(model)
    with torch.no_grad(), host.using():
        assert torch.equal(model(ids()).logits, before)
    with torch.no_grad():
        assert (model(ids()).logits - before).abs().max() > 0.01


def measure(tiny: Any, method: Any, steps: int = 40) -> float:
    """Kullback-Leibler divergence to a teacher that is the same model with a random prefix, after training."""
    model, x = tiny("llama"), ids(8, 6)
    torch.manual_seed(1)
    host = al.attach(model, PrefixTuning(length=4, init="normal"), "teacher")
    with torch.no_grad():
        target = model(x).logits.log_softmax(-1)
    host.detach("teacher")
    host.attach(method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.05)
    for _ in range(steps):
        loss = F.kl_div(model(x).logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_it_steers_every_layer_where_a_prompt_cannot(tiny: Any) -> None:
    prompt = measure(tiny, PromptTuning(length=4))
    assert measure(tiny, PrefixTuning(length=4)) <= 0.5 * prompt


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "bert-tokens", "t5", "vit"])
@pytest.mark.parametrize("hidden", [None, 6])
def test_every_family_trains_the_documented_number(
    family: str, hidden: int | None, tiny: Any, batch_for: Any, inside_attention: Any
) -> None:
    model = tiny(family)
    inside_attention(model)
    host = al.attach(model, PrefixTuning(length=3, hidden=hidden))
    host.verify(batch_for(model))
    kinds, layers = (3, 6) if family == "t5" else (1, 2)
    width = 16 if family == "llama" else 32
    each = (2 if hidden is None else 2 * (hidden + 1)) * width * layers
    expected = 3 * each if hidden is None else each + kinds * (3 * 32 + 32 * hidden + hidden)
    assert host.summary().trainable == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_agrees_with_and_without_cache(family: str, tiny: Any, inside_attention: Any) -> None:
    model, x = tiny(family), ids()
    inside_attention(model)
    al.attach(model, PrefixTuning(length=3, init="normal"))
    plain = model.generate(x, use_cache=False, **QUIET)
    assert torch.equal(model.generate(x, **QUIET), plain)
    assert torch.equal(
        model.generate(x, num_beams=3, **QUIET), model.generate(x, num_beams=3, use_cache=False, **QUIET)
    )
    if family != "t5":
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
        answer = model.generate(padded, attention_mask=(padded != 0).long(), **QUIET)
        assert torch.equal(answer[:, 3:], plain)


def test_rows_have_their_own_prefixes_of_different_lengths(tiny: Any) -> None:
    for family in ("llama", "gpt2"):
        model, x = tiny(family), ids(3)
        host = al.attach(model, PrefixTuning(length=5), "a")
        host.attach(PrefixTuning(length=2), "b")
        with torch.no_grad():
            apart = []
            for row, names in enumerate((("a",), ("b",), ())):
                with host.using(*names):
                    apart.append((model(x).logits[row], model.generate(x, **QUIET)[row]))
            with host.rows(["a", "b", None]):
                together, answers = model(x).logits, model.generate(x, **QUIET)
        for row, (logits, answer) in enumerate(apart):
            assert (together[row] - logits).abs().max() < 1e-5
            assert torch.equal(answers[row], answer)


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_it_is_saved_whole(
    family: str, hidden: int | None, tiny: Any, batch_for: Any, logits: Any, inside_attention: Any, tmp_path: Any
) -> None:
    model = tiny(family)
    inside_attention(model)
    batch = batch_for(model)
    al.attach(model, PrefixTuning(length=3, hidden=hidden)).save(tmp_path / "a")
    again = al.load(tiny(family), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    assert al.host(model).state_dict("default").keys() == again.state_dict("default").keys()


def test_gradient_checkpointing_gives_the_same_gradients(tiny: Any, batch_for: Any) -> None:
    found = []
    for recompute in ("none", "cheap", "full"):
        model = tiny("llama").train()
        host = al.attach(model, PrefixTuning(length=3, words=WORDS))
        host.recompute(recompute)
        model(**batch_for(model)).loss.backward()
        found.append([p.grad for p in host.parameters("default")])
    for again in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], again, strict=True))


def test_bad_settings_say_what_to_do(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="999 is not in the vocabulary of 128"):
        al.attach(tiny("llama"), PrefixTuning(words=(5, 999)))
    with pytest.raises(ConfigError, match="network starts"):
        PrefixTuning(words=(1,), hidden=4)
    with pytest.raises(AttachError, match=r"'mlp'.*self_attn"):
        al.attach(tiny("llama"), PrefixTuning(targets=["mlp"]))
    model = tiny("gpt2")
    al.attach(model, PrefixTuning(length=60))
    with pytest.raises(AttachError, match=r"64 learned.*4 tokens"):
        model(ids())
    assert prefix_tuning.kv_shape(tiny("llama").model.layers[0].self_attn) == (2, 8)


def test_the_network_is_the_written_one(tiny: Any, randomise: Any) -> None:
    """tanh(E W1ᵀ + b1) W2ᵀ + b2 in float64: keys, then values, head by head; E and W1 the same for all layers."""
    host = al.attach(tiny("llama"), PrefixTuning(length=3, hidden=6))
    randomise(host)
    (network,) = host.shared("default").values()
    layers = [layer for layer in host.adapters("default").values() if isinstance(layer, PrefixTuning.Layer)]
    inner: Any = network.inner
    h = (network.embedding.weight.double() @ inner.weight.double().T + inner.bias.double()).tanh()
    assert len(layers) == 2
    for layer in layers:
        flat = h @ layer.out.weight.double().T + layer.out.bias.double()
        for kind, pair in enumerate(layer.pairs()):
            for head, rows in enumerate(pair):
                start = kind * 16 + head * 8
                assert torch.allclose(rows.double(), flat[:, start : start + 8], atol=1e-5)


PAIRS = PrefixTuning.Layer.pairs


def _first_layer(self: Any) -> Tensor:
    return PAIRS(self) if self.site.layer == 0 else PAIRS(self).detach()


def _without_dropout_of_heads(self: Any) -> Tensor:
    return torch.cat([PAIRS(self)[:, :1]] * 2, 1)


CORE = written_attention._linear_core


def _unscaled(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **given: Any) -> Any:
    return CORE(module, q, k, v, mask, 1.0, **given)


BROKEN: dict[str, Mutation] = {
    "no linear bias of the prefix": (attention, "slopes", lambda heads, device: torch.zeros(heads)),
    "one series of slopes": (
        attention,
        "slopes",
        lambda heads, device: 2.0 ** (-8 * torch.arange(1, heads + 1) / heads),
    ),
    "linear attention is not scaled": (written_attention, "_linear_core", _unscaled),
    "positions kept": (PrefixTuning, "first_position", 0),
    "keys and values exchanged": (PrefixTuning.Layer, "pairs", lambda self: PAIRS(self).flip(0)),
    "heads exchanged": (PrefixTuning.Layer, "pairs", lambda self: PAIRS(self).flip(1)),
    "one head for all": (PrefixTuning.Layer, "pairs", _without_dropout_of_heads),
    "one layer alone trains": (PrefixTuning.Layer, "pairs", _first_layer),
    "keys alone": (PrefixTuning.Layer, "pairs", lambda self: torch.stack([PAIRS(self)[0], 0 * PAIRS(self)[1]])),
    "no tanh": (torch, "tanh", lambda x: x),
    "another nonlinearity": (torch, "tanh", F.gelu),
    "no E": (prefix_tuning._Network, "forward", lambda self: self.inner(0 * self.embedding.weight).tanh()),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_a_prefix_of_words_equals_reading_them, "llama", "sdpa"),
    test_linear_biases_have_the_prefix_in_front,
    test_the_network_is_the_written_one,
    test_it_steers_every_layer_where_a_prompt_cannot,
    lines=BROKEN,
)
