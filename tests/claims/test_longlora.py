"""LongLoRA: groups are what the formula says, nothing sees the future, and shifted groups carry over the borders."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.hosts import Host
from adapterlab.methods.composite.longlora import LongLoRA

LENGTH, GROUP, BACK, SYMBOLS = 8, 4, 2, 4
FIELDS: dict[str, Any] = {"r": 16, "alpha": 32, "group_size": GROUP}


def recall(seed: int, count: int = 32) -> Tensor:
    """Random tokens; each place is to answer the token BACK places before it."""
    return torch.randint(0, SYMBOLS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def measure(method: LongLoRA, steps: int = 80) -> float:
    """Train, and return the loss where the answer lies beyond a border of the unshifted groups."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=SYMBOLS, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, initializer_range=0.1,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    host = al.attach(GPT2LMHeadModel(config).train(), method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=1e-2)
    for step in range(steps):
        ids = recall(step)
        loss = F.cross_entropy(host.model(ids).logits[:, BACK:].flatten(0, 1), ids[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = recall(10_000, 256)
    beyond = torch.arange(GROUP, GROUP + BACK)
    with torch.no_grad():
        return float(F.cross_entropy(host.model(ids).logits[:, beyond].flatten(0, 1), ids[:, beyond - BACK].flatten()))


def test_shifted_groups_carry_information_over_the_borders() -> None:
    chance = math.log(SYMBOLS)
    assert measure(LongLoRA(**FIELDS)) < 0.5 * chance
    # The same claim fails when the groups of all heads have the same borders.
    assert measure(LongLoRA(**FIELDS, shift=False)) > 0.9 * chance


class _Formula:
    """Attention by the dense mask: (j ≤ i) and group(i) == group(j), by head."""

    def __init__(self, method: LongLoRA):
        self.method = method

    def __call__(
        self, layer: Any, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> Any:
        heads, length = q.shape[1], q.shape[2]
        place = torch.arange(length)
        size = self.method.group(length)
        allowed = torch.stack([
            (place[None] <= place[:, None])
            & (((place + s) // size)[None] == ((place + s) // size)[:, None])
            for s in [0] * (heads // 2) + [size // 2] * (heads // 2)
        ])[None]  # fmt: skip
        if mask is not None:
            allowed = allowed & (mask if mask.dtype == torch.bool else mask > -1)
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        scores = (q.double() @ k.double().transpose(-1, -2)) * kw["scaling"]
        scores = scores.masked_fill(~allowed, -1e30)
        return (scores.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2), None


def trained_pattern(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.train()(ids, **kwargs).logits
    model.eval()
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("llama", 1), ("gpt2", 4), ("mixtral", 2)])
@pytest.mark.parametrize("length", [16, 19])
def test_groups_equal_the_dense_formula(
    family: str, kv_heads: int, implementation: str, length: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    if kv_heads == 1:
        config = model.config
        config.num_key_value_heads = 1
        torch.manual_seed(2)
        model = type(model)(config)
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    method = LongLoRA(group_size=4)
    al.attach(model, method)
    ours = trained_pattern(model, ids, attention_mask=mask)
    formula = _Formula(method)
    monkeypatch.setattr(
        LongLoRA.Layer, "around", lambda self, run, q, k, v, mask=None, **kw: formula(self, run, q, k, v, mask, **kw)
    )
    dense = trained_pattern(model, ids, attention_mask=mask)
    assert (ours - dense)[mask == 1].abs().max() < 1e-5


def test_no_token_sees_a_later_one(tiny: Any) -> None:
    model = tiny("llama")
    al.attach(model, LongLoRA(group_size=4))
    ids = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = 5
    difference = (trained_pattern(model, ids) - trained_pattern(model, other)).abs().amax(-1)[0]
    assert difference[:-1].max() == 0
    assert difference[-1] > 0


def test_scores_are_computed_inside_groups_only(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = tiny("llama"), []
    plain = F.scaled_dot_product_attention

    def counting(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counted.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return plain(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    al.attach(model, LongLoRA(group_size=8))
    trained_pattern(model, torch.arange(3, 67)[None])
    heads, layers = 4, 2
    # Half of the heads have one group more, whose halves stand at both ends.
    assert sum(counted) == layers * heads * (64 * 8 + 72 * 8) // 2


def host_on(model: Any, **fields: Any) -> Host:
    return al.attach(model, LongLoRA(**fields))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2", "mixtral"])
def test_it_trains_the_documented_number_and_starts_at_the_base(
    family: str, tiny: Any, batch_for: Any, logits: Any
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = host_on(model, r=4)
    assert torch.equal(logits(model, batch), base)
    d, kv = 32, 32 if family == "gpt2" else 16
    lora = 2 * 4 * ((d + 3 * d) + 2 * d if family == "gpt2" else 2 * (d + d) + 2 * (d + kv))
    rest = (128 + 64) * d + 2 * 5 * d if family == "gpt2" else 128 * d + 5 * d
    assert host.summary().trainable == lora + rest
    model.train()
    host.verify(batch)
    host.detach("default")
    assert torch.equal(logits(model.eval(), batch), base)


def test_after_training_it_merges_and_generates_with_full_attention(tiny: Any, randomise: Any) -> None:
    model, ids = tiny("llama"), torch.arange(3, 21)[None]
    host = host_on(model, group_size=4)
    randomise(host, size=0.05)
    quiet: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(ids, **quiet)
    assert torch.equal(model.generate(ids, use_cache=False, **quiet), answer)
    with torch.no_grad():
        live = model(ids).logits
        host.merge()
        assert (model(ids).logits - live).abs().max() < 1e-4


def test_stretching_is_linear_rope_scaling(tiny: Any, logits: Any) -> None:
    model, ids = tiny("llama"), {"input_ids": torch.arange(3, 21)[None]}
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": None})
    config.rope_parameters = {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": model.config.rope_parameters["rope_theta"],
    }
    scaled = type(model)(config).eval()
    scaled.load_state_dict(model.state_dict())
    host = host_on(model, stretch=4)
    assert (logits(model, ids) - logits(scaled, ids)).abs().max() < 1e-5
    with pytest.raises(MergeError, match="positions"):
        host.merge()


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    for family in ("bert-masked", "t5", "vit"):
        with pytest.raises(AttachError, match=r"Choose (LoRA|a method that wraps modules)"):
            al.attach(tiny(family), LongLoRA())
    with pytest.raises(AttachError, match="rotary"):
        al.attach(tiny("gpt2"), LongLoRA(stretch=2))
    with pytest.raises(ConfigError, match="group_size = 3"):
        LongLoRA(group_size=3)


LAYER, GROUPED, VISIBLE, SIZE = LongLoRA.Layer, LongLoRA.Layer.grouped, LongLoRA.Layer.visible, LongLoRA.group


def _grouped(change: Callable[[int, int], int]) -> Mutation:
    """Other shifts, made of the group size and the right shift."""

    def grouped(self: Any, run: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, size: int, shift: int, kw: Any) -> Any:
        return GROUPED(self, run, q, k, v, mask, size, change(size, shift), kw)

    return (LAYER, "grouped", grouped)


def _seeing_all(self: Any, *given: Any) -> Tensor:
    return torch.ones_like(VISIBLE(self, *given), dtype=torch.bool)


def _wrapped(self: Any, run: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, size: int, shift: int, kw: Any) -> Any:
    """Groups moved in a ring, as in the authors' code: the first tokens see the last ones."""
    if (mask is not None and mask.shape[0] > 1) or q.shape[2] % size:
        return GROUPED(self, run, q, k, v, mask, size, shift, kw)
    rolled = (t.roll(-shift, 2) for t in (q, k, v))
    return GROUPED(self, run, *rolled, None, size, 0, kw).roll(shift, 1)


def _exchanged(self: Any, run: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kw: Any) -> Any:
    q, k, v = (torch.cat([*reversed(t.chunk(2, 1))], 1) if self.splits else t for t in (q, k, v))
    out, *rest = AROUND(self, run, q, k, v, mask, **kw)
    return torch.cat([*reversed(out.chunk(2, 2))], 2), *rest


AROUND = LAYER.around
BROKEN: dict[str, Mutation] = {
    "no shift": _grouped(lambda size, shift: 0),
    "all heads shifted": _grouped(lambda size, shift: size // 2),
    "a shift of a quarter": _grouped(lambda size, shift: shift // 2),
    "later tokens are seen": (LAYER, "visible", _seeing_all),
    "groups in a ring": (LAYER, "grouped", _wrapped),
    "the halves of heads exchanged": (LAYER, "around", _exchanged),
    "full attention": (LAYER, "around", lambda self, run, q, k, v, mask=None, **kw: run(q, k, v, mask, **kw)),
    "groups of twice the size": (LongLoRA, "group", lambda self, length: 2 * SIZE(self, length)),
}


def _scores(tiny: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_scores_are_computed_inside_groups_only(tiny, patch)


def _formula(tiny: Any, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_groups_equal_the_dense_formula("llama", 2, "sdpa", length, tiny, patch)


test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(_formula, length=16), test_no_token_sees_a_later_one, _scores, lines=BROKEN
)
