"""Proxy tuning: a large model closes most of the gap to its tuned self by a small pair's logits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from mutations import Mutation, begun, fails_without
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign.cache import cache_argument, cache_out
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.side_network.proxy_tuning import _HELD, ProxyTuning


@pytest.fixture(autouse=True)
def _forget():
    yield
    _HELD.clear()


def held(**models) -> dict[str, str]:
    return {field: ProxyTuning.hold(field, model) for field, model in models.items()}


# ---------------------------------------------------------------- the claim

SYMBOLS = 16


def language(seed: int) -> torch.Tensor:
    """Transition probabilities of a random first-order language, `[symbol, symbol]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.softmax(2.5 * torch.randn(SYMBOLS, SYMBOLS, generator=draw), -1)


def corpus(table: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, SYMBOLS, (rows,), generator=draw)]
    for _ in range(15):
        ids.append(torch.multinomial(table[ids[-1]], 1, generator=draw)[:, 0])
    return torch.stack(ids, 1)


def lm(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=SYMBOLS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
                    num_attention_heads=2, tie_word_embeddings=False)
    )  # fmt: skip


def train(model, table, steps: int):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    rows = corpus(table, 512, 0)
    for step in range(steps):
        ids = rows[32 * step % 512 :][:32]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    """Small and large models of language A, and both tuned on language B."""
    a, b = language(1), language(2)
    small, large = train(lm(8, 0), a, 40), train(lm(32, 1), a, 40)
    tuned_small, tuned_large = train(copy.deepcopy(small), b, 40), train(copy.deepcopy(large), b, 40)
    return {"small": small, "large": large, "tuned_small": tuned_small, "tuned_large": tuned_large, "b": b}


def measure(trained) -> float:
    """Share of the loss gap between the large model and its tuned self that proxying closes, on language B."""
    ids = corpus(trained["b"], 64, 999)

    def loss(model) -> float:
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    proxied = copy.deepcopy(trained["large"])
    al.attach(proxied, ProxyTuning(**held(expert=trained["tuned_small"], anti_expert=trained["small"])))
    before, after = loss(trained["large"]), loss(trained["tuned_large"])
    assert before > after + 0.3, (before, after)
    return (before - loss(proxied)) / (before - after)


def test_claim_half_of_the_gap_is_closed(trained):
    assert measure(trained) >= 0.5


# ---------------------------------------------------------------- identities

SMALL = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def models(tiny):
    """A base, and a pair of another width and another family that shares the vocabulary."""
    expert, anti = tiny("gpt2"), tiny("gpt2")
    with torch.no_grad():
        for p in expert.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return tiny("llama"), expert, anti


def test_logits_are_the_written_sum(models, batch_for):
    base, expert, anti = models
    batch = batch_for(base)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, e, a = (m(**inputs).logits.double() for m in (base, expert, anti))
        host = al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti), alpha=0.7))
        out = base(**batch)
    expected = s + 0.7 * (e - a)
    assert torch.allclose(out.logits.double(), expected, atol=1e-5)
    labels = batch["labels"][:, 1:]
    token = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(out.loss.double(), token, atol=1e-5)
    loss, logits, *_ = base(**batch, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert torch.equal(base(inputs["input_ids"], inputs["attention_mask"]).logits, out.logits)
    assert host.summary().trainable == 0
    assert not host.tensors("default")


def test_the_small_models_are_those_of_evaluation(models):
    _, expert, _ = models
    noisy = LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.5)).train()
    ids = torch.randint(3, 128, (2, 6))
    with torch.no_grad():
        plain = expert(ids).logits
        al.attach(expert, ProxyTuning(**held(expert=noisy, anti_expert=copy.deepcopy(noisy))))
        assert torch.allclose(expert(ids).logits, plain, atol=1e-5)


def test_no_difference_gives_the_base_and_the_base_as_anti_expert_gives_the_expert(models):
    base, expert, _ = models
    ids = torch.randint(3, 128, (2, 6))
    with torch.no_grad():
        plain, tuned = base(ids).logits, expert(ids).logits
        twin = copy.deepcopy(base)
        for fields, expected in (
            ({"expert": expert, "anti_expert": expert}, plain),
            ({"expert": expert, "anti_expert": twin}, tuned),
        ):
            host = al.attach(base, ProxyTuning(**held(**fields)))
            assert torch.allclose(base(ids).logits, expected, atol=1e-5)
            host.detach("default")
        host = al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=twin), alpha=0.0))
        assert torch.equal(base(ids).logits, plain)
        with host.using():
            assert torch.equal(base(ids).logits, plain)


def test_several_experts_add_their_differences(models):
    base, expert, anti = models
    ids = torch.randint(3, 128, (2, 6))
    with torch.no_grad():
        s, e, a = (m(ids).logits for m in (base, expert, anti))
        fields = held(expert=expert, anti_expert=anti)
        host = al.attach(base, ProxyTuning(**fields, alpha=0.5))
        host.attach(ProxyTuning(**fields, alpha=0.25), "second")
        assert torch.allclose(base(ids).logits, s + 0.75 * (e - a), atol=1e-4)


def test_the_anti_expert_may_be_the_expert_with_its_adapter_off(models, randomise):
    base, _, small = models
    ids = torch.randint(3, 128, (2, 6))
    with torch.no_grad():
        s, a = base(ids).logits, small(ids).logits
        randomise(al.attach(small, LoRA(r=2)))
        e = small(ids).logits
        al.attach(base, ProxyTuning(**held(expert=small)))
        assert torch.allclose(base(ids).logits, s + e - a, atol=1e-4)
        given = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(base.generate(**given), base.generate(**given, use_cache=False))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("beams", [1, 3])
def test_three_caches_give_what_no_cache_gives(models, beams):
    base, expert, anti = models
    al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti)))
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with_cache = base.generate(**given, use_cache=True)
    assert torch.equal(with_cache, base.generate(**given, use_cache=False))
    short = base.generate(**{**given, "input_ids": ids[:1, 3:], "attention_mask": mask[:1, 3:]})[:, 4:]
    assert torch.equal(with_cache[:1, 7 : 7 + short.shape[1]], short)


def test_each_step_reads_one_token_only(models):
    base, expert, anti = models
    al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti)))
    lengths: list[int] = []
    expert.register_forward_hook(lambda m, a, k, o: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    base.generate(torch.randint(3, 128, (1, 5)), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert lengths == [5, 1, 1, 1]


def test_a_copied_or_cropped_cache_stays_in_step(models):
    base, expert, anti = models
    al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti)))
    ids = torch.randint(3, 128, (1, 6))
    with torch.no_grad():
        whole = base(ids).logits
        past = cache_out(base(ids[:, :5], use_cache=True))
        again, third = copy.deepcopy(past), copy.deepcopy(past)
        past.crop(-2)
        name = str(cache_argument(base))
        assert torch.allclose(base(ids[:, 3:], **{name: past}).logits, whole[:, 3:], atol=1e-4)
        assert torch.allclose(base(ids[:, 5:], **{name: again}).logits, whole[:, 5:], atol=1e-4)
        with warnings.catch_warnings():  # users go on calling the argument what it was called
            warnings.simplefilter("ignore", FutureWarning)
            assert torch.allclose(base(ids[:, 5:], past_key_values=third).logits, whole[:, 5:], atol=1e-4)


def test_a_foreign_cache_and_embeddings_are_refused(models):
    base, expert, anti = models
    host = al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti)))
    ids = torch.randint(3, 128, (1, 4))
    with host.using(), torch.no_grad():
        past = base(ids, use_cache=True).past_key_values
    with pytest.raises(AttachError, match=r"holds 4 tokens.*has seen 0.*empty cache"):
        base(ids[:, :1], past_key_values=past)
    with pytest.raises(AttachError, match=r"without input_ids .*inputs_embeds"):
        base(inputs_embeds=torch.zeros(1, 3, 32))


# ---------------------------------------------------------------- attaching, naming, saving


def test_saving_keeps_names_and_no_weights(models, tmp_path, tiny):
    base, expert, anti = models
    ids = torch.randint(3, 128, (1, 4))
    host = al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti), alpha=0.5))
    expected = base(ids).logits
    host.save(tmp_path / "proxy")
    assert (tmp_path / "proxy" / "adapter_model.safetensors").stat().st_size < 100
    fresh = tiny("llama")
    again = al.load(fresh, tmp_path / "proxy")
    assert again.methods["default"] == host.methods["default"]
    assert torch.equal(fresh(ids).logits, expected)
    assert torch.equal(copy.deepcopy(base)(ids).logits, expected)


def test_names_are_loaded_as_the_base_was(models, tmp_path, monkeypatch, randomise):
    base, _, anti = models
    small = copy.deepcopy(anti)
    randomise(al.attach(small, LoRA(r=2)))
    al.host(small).save(tmp_path / "tuned")
    asked = []

    def load_model(name, **options):
        asked.append((name, options["precision"]))
        return copy.deepcopy(anti).bfloat16(), None

    monkeypatch.setattr("adapterlab.models.load_model", load_model)
    al.attach(base.bfloat16(), ProxyTuning(expert="small", expert_adapter=str(tmp_path / "tuned")))
    assert asked == [("small", "bf16")]
    ids = torch.randint(3, 128, (1, 4))
    with torch.no_grad():
        proxied = base(ids).logits
        with al.host(base).using():
            assert (proxied - base(ids).logits).abs().max() > 0.1


def test_mistakes_are_named(models, tiny):
    base, expert, anti = models
    odd = copy.deepcopy(anti)
    odd.resize_token_embeddings(130, mean_resizing=False)
    with pytest.raises(AttachError, match=r"anti_expert .* vocabulary of 130 .* one of 128.*resize_token_embeddings"):
        al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=odd)))
    assert al.host(base) is None
    with pytest.raises(AttachError, match=r"no adapter that could be switched off.*Give anti_expert"):
        al.attach(base, ProxyTuning(**held(expert=expert)))
    with pytest.raises(AttachError, match=r"T5ForConditionalGeneration.*decoder-only"):
        al.attach(tiny("t5"), ProxyTuning(**held(expert=expert, anti_expert=anti)))
    with pytest.raises(ConfigError, match="needs the setting 'expert'"):
        ProxyTuning()
    host = al.attach(base, ProxyTuning(**held(expert=expert, anti_expert=anti)))
    with pytest.raises(AttachError, match="batch of their own"), host.rows(["default", None]):
        base(torch.arange(3, 9).view(2, 3))


AROUND = ProxyTuning.Around
LOGITS, GIVEN = AROUND._logits, AROUND._given


def _logits(change) -> Mutation:
    """`change(i, get)`: what is said by model i of expert and anti-expert, of which `get(i)` gives the logits."""
    return (AROUND, "_logits", lambda self, i, *rest: change(i, lambda j: LOGITS(self, j, *rest)))


BROKEN: dict[str, Mutation] = {
    "the expert alone": _logits(lambda i, get: (1 - i) * get(i)),
    "the anti-expert alone": _logits(lambda i, get: i * get(i)),
    "expert and anti-expert exchanged": _logits(lambda i, get: get(1 - i)),
    "expert and anti-expert added": _logits(lambda i, get: (1 - 2 * i) * get(i)),
    "probabilities instead of logits": _logits(lambda i, get: get(i).softmax(-1)),
    "the logits of the token before": _logits(lambda i, get: get(i).roll(1, dims=1)),
    "a sum in half precision": _logits(lambda i, get: get(i).bfloat16().float()),
    "alpha left out": begun(AROUND, lambda part, method: setattr(part, "alpha", 1.0)),
    "alpha squared": begun(AROUND, lambda part, method: setattr(part, "alpha", method.alpha**2)),
    "padding is read": (
        AROUND, "_given",
        lambda self, given, note: {
            **(found := GIVEN(self, given, note)), "attention_mask": torch.ones_like(found["attention_mask"]),
        },
    ),
    "noise of training in the small models": begun(AROUND, lambda part, method: [m.train() for m in part.models]),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_logits_are_the_written_sum, test_the_small_models_are_those_of_evaluation, lines=BROKEN
)
test_with_one_small_model_the_claim_fails_when = fails_without(
    test_the_anti_expert_may_be_the_expert_with_its_adapter_off,
    lines={
        "the adapter stays on": _logits(lambda i, get: get(0)),
        "the adapter is off in both": _logits(lambda i, get: get(1)),
    },
)
test_the_gap_is_not_closed_when = fails_without(
    test_claim_half_of_the_gap_is_closed,
    lines={key: BROKEN[key] for key in ("expert and anti-expert exchanged", "probabilities instead of logits")},
)
