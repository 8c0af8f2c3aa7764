"""Ladder side-tuning: what the backward pass keeps, what the side network computes, and where it works."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, DataError
from adapterlab.hosts import host as host_of
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.side_network import _narrow_copy, lst
from adapterlab.methods.side_network.lst import LST, Ladder, Rung, Tap

TOY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


def measure(method, tamper=None) -> tuple[int, int]:
    """(bytes kept for the backward pass in one step, trainable scalars) on a six-layer model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TOY))
    host = al.attach(model, method)
    if tamper:
        tamper(host)
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    hidden.sum().backward()
    return sum(kept.values()), host.summary().trainable


def holds(method, tamper=None) -> bool:
    """LST keeps at most 0.7 of what low-rank updates of as many parameters inside the model keep."""
    ours, size = measure(method, tamper)
    theirs, other = measure(LoRA(r=2))
    assert 0.5 < size / other < 2, (size, other)
    return ours <= 0.7 * theirs


def test_claim_no_activation_of_the_base_is_kept():
    assert holds(LST(r=8))


def test_claim_fails_when_gradients_enter_the_base(monkeypatch):
    class Torch:
        no_grad = torch.enable_grad

        def __getattr__(self, name):
            return getattr(torch, name)

    def around(self, run, x, *args, **kwargs):
        out = run(x, *args, **kwargs)
        self.state.taps[self.key] = (x, out)
        return out

    def tamper(host):
        monkeypatch.setattr("adapterlab.methods.side_network.lst.torch", Torch())
        monkeypatch.setattr(Tap, "around", around)
        host.model.get_input_embeddings().weight.requires_grad_(True)

    assert not holds(LST(r=8), tamper)


def test_gradients_at_the_input_cost_nothing():
    plain, _ = measure(LST(r=8))
    hooked, _ = measure(LST(r=8), lambda host: host.model.enable_input_require_grads())
    assert hooked == plain


def test_trainable_count_is_the_formula():
    model = LlamaForCausalLM(LlamaConfig(**TOY))
    host = al.attach(model, LST(r=4, keep=(1, 3, 5)))
    d, n, kept = 64, 16, 3
    block = 4 * n * n + 3 * n * 32 + 2 * n
    assert host.summary().trainable == kept * (block + d * n + n + 1) + 2 * d * n + d + n + n


def test_output_is_the_written_formula():
    """Everything outside the blocks in float64, with the blocks as given functions."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TOY)).double().eval()
    ids = torch.randint(0, 64, (2, 5))
    with torch.no_grad():
        base = model(ids, output_hidden_states=True).hidden_states
    host = al.attach(model, LST(r=4, keep=(1, 4), tau=0.5))
    ladder = host.adapters("default")["model"]
    side = ladder.side
    with torch.no_grad():
        for i, rung in enumerate(ladder.rungs):
            rung.alpha.fill_(0.3 + i)
        s = base[0] @ ladder.into.weight.T + ladder.into.bias
        places = torch.arange(5)[None]
        rotary = side.rotary_emb(s, places)
        causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        for rung, layer in zip(ladder.rungs, (1, 4), strict=True):
            mu = 1 / (1 + torch.exp(-rung.alpha / 0.5))
            c = base[layer + 1] @ rung.down.weight.T + rung.down.bias
            s = rung.block(mu * s + (1 - mu) * c, attention_mask=causal, position_embeddings=rotary)
        s = s / (s.pow(2).mean(-1, keepdim=True) + side.config.rms_norm_eps).sqrt() * side.norm.weight
        expected = (s @ ladder.up.weight.T + ladder.up.bias) @ model.lm_head.weight.T
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)  # the norms compute in float32


def test_where_it_starts(tiny):
    ladder = al.attach(tiny("llama"), LST(r=2)).adapters("default")["model"]
    for rung in ladder.rungs:
        assert not rung.alpha.any()
        assert rung.down.weight.std() > 0.05
    assert min(ladder.into.weight.std(), ladder.up.weight.std()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert-classes", "bert-tokens", "t5", "mixtral", "vit"])
def test_trains_on_every_family_and_leaves_no_trace(tiny, batch_for, logits, kind):
    model = tiny(kind)
    batch = batch_for(model)
    before = logits(model, batch)
    host = al.attach(model, LST(r=4))
    host.verify(batch)
    assert not torch.allclose(logits(model, batch), before)
    assert not host.state.taps
    with host.using():
        assert torch.equal(logits(model, batch), before)
    host.detach("default")
    assert torch.equal(logits(model, batch), before)


def test_residual_starts_at_the_base(tiny, batch_for, logits):
    for kind in ("llama", "bert-classes"):
        model = tiny(kind)
        batch = batch_for(model)
        before = logits(model, batch)
        host = al.attach(model, LST(r=4, residual=True))
        assert torch.equal(logits(model, batch), before)
        host.verify(batch)


@pytest.mark.parametrize(
    ("kind", "beams"), [("llama", 1), ("llama", 3), ("qwen2", 1), ("gpt2", 3), ("t5", 1), ("t5", 3)]
)
def test_generation_with_cache_equals_without(tiny, randomise, kind, beams):
    model = tiny(kind)
    randomise(al.attach(model, LST(r=4)))
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if kind != "t5":
        ids[0, :3], mask[0, :3] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with_cache = model.generate(**given, use_cache=True)
    assert torch.equal(with_cache, model.generate(**given, use_cache=False))
    alone = model.generate(**{**given, "input_ids": ids[:1], "attention_mask": mask[:1]})
    assert torch.equal(with_cache[:1, : alone.shape[1]], alone)


def test_cached_steps_give_the_logits_of_one_pass(tiny, randomise):
    model = tiny("llama")
    randomise(al.attach(model, LST(r=4)))
    ids = torch.randint(3, 128, (2, 6))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5)


def test_a_cache_filled_without_the_adapter_is_refused(tiny):
    model = tiny("llama")
    host = al.attach(model, LST(r=4))
    ids = torch.randint(3, 128, (1, 6))
    with host.using(), torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    with pytest.raises(AttachError, match=r"holds 6 tokens.*has seen 0.*empty cache"):
        model(ids[:, :1], past_key_values=past)


def test_an_encoder_output_without_the_adapter_is_refused(tiny):
    model = tiny("t5")
    host = al.attach(model, LST(r=4))
    ids = torch.randint(3, 128, (1, 6))
    with host.using():
        outputs = model.get_encoder()(ids)
    with pytest.raises(AttachError, match=r"32 \+ 8 .* received 32"):
        model(encoder_outputs=outputs, decoder_input_ids=ids)


@pytest.mark.parametrize(("kind", "ours"), [("llama", True), ("llama", False), ("gpt2", True), ("t5", True)])
def test_checkpointing_gives_the_same_gradients(tiny, batch_for, kind, ours):
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = tiny(kind)
        torch.manual_seed(0)
        host = al.attach(model, LST(r=4, dropout=0.0))
        model.train()
        if checkpointed and ours:
            host.recompute()
        elif checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = batch_for(model, length=9, seed=1), batch_for(model, length=7, seed=2)
        (model(**first).loss + model(**second).loss).backward()
        return [p.grad for p in host.parameters("default")]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_copies_and_saved_folders_compute_the_same(tiny, batch_for, logits, randomise, tmp_path, kind):
    model = tiny(kind)
    host = al.attach(model, LST(r=4, keep=(1,)))
    randomise(host)
    batch = batch_for(model)
    expected = logits(model, batch)
    assert torch.equal(logits(copy.deepcopy(model), batch), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), expected)
    host.save(tmp_path / "adapter")
    fresh = tiny(kind)
    al.load(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), expected)
    saved = host.state_dict("default")
    assert not [key for key in saved if "embed" in key]
    third = tiny(kind)
    al.attach(third, LoRA(r=2), "other")
    host_of(third).attach(LST(r=4, keep=(1,)), "default", saved=saved)
    assert torch.equal(logits(third, batch), expected)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapters_from_before_the_biases_still_load(tiny, batch_for, logits, randomise, tmp_path, kind):
    model = tiny(kind)
    host = al.attach(model, LST(r=4, bias=False))
    randomise(host)
    batch, saved = batch_for(model), host.state_dict("default")
    assert not any(key.endswith(("into.bias", "up.bias")) for key in saved)
    expected = logits(model, batch)
    fresh = tiny(kind)
    loaded = al.attach(fresh, LoRA(r=2), "other")
    loaded.attach(LST(r=4), "default", saved=saved)
    loaded.activate("default")
    assert torch.equal(logits(fresh, batch), expected)
    loaded.save(tmp_path / "adapter", "default")  # saved once more it is the same still
    again = tiny(kind)
    al.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again, batch), expected)


def test_half_precision_base_keeps_a_float32_side(tiny, batch_for):
    model = tiny("llama").to(torch.bfloat16)
    host = al.attach(model, LST(r=4))
    host.verify(batch_for(model))
    assert {p.dtype for p in host.parameters("default")} == {torch.float32}
    assert model(torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16


def test_encoders_compile_to_one_graph(tiny, batch_for):  # the suite compiles a decoder
    model = tiny("bert-classes")
    al.attach(model, LST(r=4))
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**batch).logits, expected, atol=1e-5)


# ---------------------------------------------------------------- weights cut out of the base


def test_blocks_are_cut_out_of_the_base_by_size():
    """One loud head dimension pair, inner dimension and residual dimension are kept, with their values."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TOY))
    layer = model.model.layers[2]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 17] += 9
        layer.self_attn.k_proj.weight[[5, 13]] += 9  # head 0: halves of one rotary pair
        layer.self_attn.v_proj.weight[[5, 13]] += 9
        layer.mlp.up_proj.weight[100] += 9
    ladder = al.attach(model, LST(r=8, keep=(2,))).adapters("default")["model"]
    block = ladder.rungs[0].block
    dims = model.model.embed_tokens.weight.abs().sum(0).topk(8).indices.sort().values
    assert 17 in dims
    assert torch.equal(block.self_attn.q_proj.weight[:2], layer.self_attn.q_proj.weight[[5, 13]][:, dims])
    assert torch.equal(block.self_attn.o_proj.weight[:, :2], layer.self_attn.o_proj.weight[dims][:, [5, 13]])
    row = layer.mlp.up_proj.weight[100, dims]
    assert any(torch.equal(row, kept) for kept in block.mlp.up_proj.weight)
    where = next(i for i, kept in enumerate(block.mlp.up_proj.weight) if torch.equal(row, kept))
    assert torch.equal(block.mlp.down_proj.weight[:, where], layer.mlp.down_proj.weight[dims, 100])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert-classes", "t5", "vit"])
def test_every_matrix_of_a_block_comes_from_the_base(tiny, kind):
    model = tiny(kind)
    bases = torch.cat([p.detach().flatten() for p in model.parameters()])
    host = al.attach(model, LST(r=4))
    for ladder in host.adapters("default").values():
        for rung in ladder.rungs if isinstance(ladder, Ladder) else []:
            for name, p in rung.block.named_parameters():
                assert torch.isin(p.detach(), bases).all(), name


def test_r_of_one_copies_the_blocks(tiny):
    for kind in ("llama", "gpt2", "bert-classes", "t5"):
        model = tiny(kind)
        host = al.attach(model, LST(r=1))
        for ladder in host.adapters("default").values():
            for rung, path in zip(ladder.rungs, ladder.paths, strict=True) if isinstance(ladder, Ladder) else []:
                base = model.get_submodule(path)
                for name, p in rung.block.named_parameters():
                    assert torch.equal(p, base.get_parameter(name)), (kind, name)


def test_fisher_uses_squared_gradients_of_single_rows(tiny, batch_for):
    model = tiny("llama")
    method = LST(r=4, init="fisher", samples=3)
    host = al.attach(model, method)
    batch = batch_for(model, rows=4)
    modules = [model.model.layers[0].mlp.up_proj, model.model.embed_tokens]
    sums = method._fisher(host, modules, [batch])
    expected = [torch.zeros_like(m.weight) for m in modules]
    plain = tiny("llama")
    for i in range(3):
        plain.zero_grad()
        plain(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
        expected[0] += plain.model.layers[0].mlp.up_proj.weight.grad ** 2
        expected[1] += plain.model.embed_tokens.weight.grad**2
    for module, value in zip(modules, expected, strict=True):
        assert torch.allclose(sums[id(module)], value, rtol=1e-4, atol=1e-10)
    before = host.state_dict("default")
    method.prepare(host, "default", [batch])
    after = host.state_dict("default")
    assert any(not torch.equal(before[k], after[k]) for k in before if "block" in k)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    with pytest.raises(DataError, match=r"received none.*magnitude"):
        method.prepare(host, "default", [])


def test_fisher_fills_every_family(tiny, batch_for):
    for kind in ("gpt2", "bert-classes", "t5"):
        model = tiny(kind)
        method = LST(r=4, init="fisher")
        host = al.attach(model, method)
        method.prepare(host, "default", [batch_for(model)])
        host.verify(batch_for(model))


def test_mistakes_are_named(tiny):
    with pytest.raises(ConfigError, match=r"keep = \(0, 7\).*layers 0-1"):
        al.attach(tiny("llama"), LST(keep=(0, 7)))
    with pytest.raises(AttachError, match="configuration, which Linear has not"):
        al.attach(nn.Linear(2, 2), LST())
    model = tiny("llama")
    host = al.attach(model, LST(r=4))
    host.attach(LST(r=4), "second")
    with pytest.raises(AttachError, match=r"'second' would replace the answer of 'default'.*host.using"):
        model(torch.arange(3, 9)[None])
    with host.rows(["default", None]), pytest.raises(AttachError, match="batch of their own"):
        model(torch.arange(3, 9).view(2, 3))


def _tap(change) -> Mutation:
    def around(self, run, x, *args, **kwargs):
        out = run(x, *args, **kwargs)
        self.state.taps[self.key] = change(x, out[0] if isinstance(out, tuple) else out)
        return out

    return (Tap, "around", around)


def _rung(change) -> Mutation:
    """`change(mu, s, c)`: what the block reads."""

    def forward(self, s, *args, **kwargs):
        s = s if self.start is None else self.start
        mu = torch.sigmoid(self.alpha / self.tau)
        return self.block(change(mu, s, self.down(self.tap)), *args, **kwargs)

    return (Rung, "forward", forward)


def _answer(self, out, s):
    out.last_hidden_state = s @ self.up.weight.T


ANSWER, FISHER, HEADS = Ladder._answer, LST._fisher, _narrow_copy._heads
BROKEN: dict[str, Mutation] = {
    "the layers' inputs are read": _tap(lambda x, y: (x, x)),
    "the side network starts behind the first layer": _tap(lambda x, y: (y, y)),
    "the token before is read": _tap(lambda x, y: (x, y.roll(1, dims=1))),
    "gates the other way round": _rung(lambda mu, s, c: (1 - mu) * s + mu * c),
    "gates half open": _rung(lambda mu, s, c: (s + c) / 2),
    "no gates": _rung(lambda mu, s, c: s + c),
    "the side network alone": _rung(lambda mu, s, c: s),
    "the base alone": _rung(lambda mu, s, c: c),
    "no temperature": begun(Rung, lambda rung, block: setattr(rung, "tau", 1.0)),
    "gates start elsewhere": begun(Rung, lambda rung, block: rung.alpha.fill_(1.0)),
    "W_i starts at zero": begun(Rung, lambda rung, block: rung.down.weight.zero_()),
    "W_in starts at zero": begun(Ladder, lambda ladder, method: ladder.into.weight.zero_()),
    "W_up starts at zero": begun(Ladder, lambda ladder, method: ladder.up.weight.zero_()),
    "no bias of W_up": (Ladder, "_answer", _answer),
    "added to the base's output": begun(Ladder, lambda ladder, method: setattr(ladder, "residual", True)),
    "with residual it replaces": begun(Ladder, lambda ladder, method: setattr(ladder, "residual", False)),
    "with residual W_up starts elsewhere": begun(Ladder, lambda ladder, method: ladder.up.bias.add_(0.1)),
    "the residual dimensions are the first": (lst, "residual_dims", lambda table, count: torch.arange(count)),
    "the residual dimensions are the smallest": (
        lst, "residual_dims", lambda table, count: (-table.sum(1)).topk(count).indices.sort().values,
    ),
    "the head dimensions are the last": (_narrow_copy, "_heads", lambda *given: tuple(7 - x for x in HEADS(*given))),
    "the inner dimensions are the first": (
        _narrow_copy, "_feed_forward", lambda source, near, narrow, score: 2 * (torch.arange(len(narrow.weight)),),
    ),
    "what is kept is the first": (_narrow_copy, "_top", lambda values, count: torch.arange(count)),
    "gradients not squared": (LST, "_fisher", lambda *given: {k: v.sqrt() for k, v in FISHER(*given).items()}),
    "more rows than asked for": (
        LST, "_fisher", lambda self, *given: FISHER(self.replace(samples=self.samples + 1), *given),
    ),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_output_is_the_written_formula,
    test_where_it_starts,
    test_residual_starts_at_the_base,
    test_blocks_are_cut_out_of_the_base_by_size,
    test_fisher_uses_squared_gradients_of_single_rows,
    lines=BROKEN,
)
