"""X-LoRA: a trained classifier mixes frozen adapters, token by token, better than any of them and than their mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import adapterlab as al
from adapterlab.cli import main
from adapterlab.data import Collator
from adapterlab.engine.loss import Loss
from adapterlab.engine.packing import obstacle
from adapterlab.errors import AttachError, ConfigError, FormatError
from adapterlab.foreign.cache import cache_argument, cache_out, without_cache
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.mixture.xlora import Gate, Mixed, XLoRA
from adapterlab.testing import models
from adapterlab.train import fit
from tiny_folder import write_model
from tiny_runs import make_config, write_data

# ---------------------------------------------------------------- the claim

SYMBOLS, RUN = 8, 4  # of each language; tokens of one language before the other follows


def language(seed: int) -> Tensor:
    """Transition probabilities of a random first-order language, `[symbol, symbol]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.softmax(5 * torch.randn(SYMBOLS, SYMBOLS, generator=draw), -1)


def corpus(which: int, rows: int, seed: int, length: int = 4 * RUN, kin: int = 0) -> Tensor:
    """Rows of one language, or of its kin with the same symbols; the second has symbols of its own."""
    draw, table = torch.Generator().manual_seed(seed), language(which + kin)
    ids = [torch.randint(0, SYMBOLS, (rows,), generator=draw)]
    for _ in range(length - 1):
        ids.append(torch.multinomial(table[ids[-1]], 1, generator=draw)[:, 0])
    return torch.stack(ids, 1) + which * SYMBOLS


def interleaved(rows: int, seed: int) -> Tensor:
    """Rows that change the language every few tokens."""
    return torch.cat([corpus(i % 2, rows, 10 * seed + i, RUN) for i in range(4)], 1)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Of the tokens that follow one of their own language: when it changes, nobody knows."""
    labels = ids.clone()
    labels[:, 1:][ids[:, 1:] // SYMBOLS != ids[:, :-1] // SYMBOLS] = -100
    loss: Tensor = model(ids, labels=labels).loss
    return loss


def trained(model: Any, parameters: Any, ids: Tensor, lr: float, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        loss_of(model, ids[32 * step % len(ids) :][:32]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def learned() -> Any:
    """A model that knows two languages, with two adapters, each of which learned another one with those symbols."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2 * SYMBOLS, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    kin = torch.stack([corpus(which, 128, 0, kin=50) for which in range(2)], 1).flatten(0, 1)
    trained(model, model.parameters(), kin, lr=1e-2, steps=40)
    for which, name in enumerate("ab"):
        host = al.attach(model, LoRA(r=8), name)
        with host.using(name):
            trained(model, host.parameters(name), corpus(which, 256, 0), lr=1e-2, steps=50)
    return host


def test_claim(learned: Any) -> None:
    """On rows that change the language, the mixture is 5 % below the best of the adapters and of their mean."""
    host, ids = learned, interleaved(64, 9)
    before = {name: host.state_dict(name) for name in "ab"}
    torch.manual_seed(0)
    host.attach(XLoRA(adapters={"one": "a", "two": "b"}), "mixture")
    try:
        with host.using("mixture"):
            trained(host.model, host.parameters("mixture"), interleaved(256, 1), lr=2e-2, steps=40)

        def loss(*live: Any) -> float:
            with torch.no_grad(), host.using(*live):
                return float(loss_of(host.model, ids))

        others = [loss("a"), loss("b"), loss(al.Average("a", "b"))]
        assert loss("mixture") < 0.95 * min(others), (loss("mixture"), others)
        assert min(others) < loss()
        frozen = {key: value for key, value in host.tensors("mixture").items() if "/" in key}
        assert len(frozen) == 2 * 14
        assert all(value.grad is None and not value.requires_grad for value in frozen.values())
        for name, part in (("a", "one"), ("b", "two")):
            assert all(torch.equal(frozen[f"{part}/{key}"], value) for key, value in before[name].items())
    finally:
        host.detach("mixture")


# ---------------------------------------------------------------- the formula

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))
PARTS: dict[str, Any] = {
    "one": {"name": "lora", "r": 2, "targets": ["q", "v", "embed"]},
    "two": {"name": "lora", "r": 3, "alpha": 5, "targets": ["v", "down"]},
    "three": {"name": "lora", "r": 4, "scale": "sqrt", "targets": ["all-linear"]},
}
FACTORS = {"one": 16 / 2, "two": 5 / 3, "three": 16 / 4**0.5}
CASES: dict[str, dict[str, Any]] = {
    "alike in all modules": {},
    "deep": {"depth": 3, "size": 5},
    "by module": {"layerwise": True, "temperature": 0.5, "depth": 2, "size": 7},
    "the first two": {"layerwise": True, "top_k": 2},
    "softmax of the first two": {"top_k": 2, "softmax": False, "softmax_topk": True},
    "no softmax": {"softmax": False, "layerwise": True, "global_weight": 0.6},
    "adapters in the first pass": {"scaling_pass_value": 0.7, "global_weight": 1.3},
    "a mean in the first pass": {"scaling_pass_value": None},
}


def mixture(tiny: Any, randomise: Any, family: str = "llama", **settings: Any) -> Any:
    model = tiny(family).double()
    host = al.attach(model, XLoRA(adapters=PARTS, **settings))
    randomise(host, size=0.2)
    return host


def deltas(host: Any) -> list[dict[str, Tensor]]:
    """The whole update of each adapter by module, `[out, in]`."""
    return [
        {path: FACTORS[part] * layer.B @ layer.A for path, layer in host.adapters(f"default/{part}").items()}
        for part in PARTS
    ]


def by_hand(plain: Any, updates: list[dict[str, Tensor]], classifier: list[tuple[Tensor, Tensor]], **given: Any) -> Any:
    """Two passes of a model without adapters, with hooks that add whole updates one after the other."""
    method = {"softmax": True, "temperature": 1.0, "top_k": 3, "softmax_topk": False, "layerwise": False,
              "global_weight": 1.0, "scaling_pass_value": 0.0, **given}  # fmt: skip
    paths = [path for path, _ in plain.named_modules() if any(path in update for update in updates)]

    def run(scale: Any) -> Tensor:
        def hooked(number: int, path: str) -> Any:
            def hook(_: Any, args: Any, out: Tensor) -> Tensor:
                x = args[0] if args[0].is_floating_point() else F.one_hot(args[0], 128).to(out)
                for i, update in enumerate(updates):
                    if path in update:
                        out = out + method["global_weight"] * scale(number, i) * (x @ update[path].T)
                return out

            return hook

        handles = [plain.get_submodule(p).register_forward_hook(hooked(n, p)) for n, p in enumerate(paths)]
        try:
            hidden: Tensor = plain.model(IDS, use_cache=False).last_hidden_state
            return hidden
        finally:
            for handle in handles:
                handle.remove()

    value = 1 / 3 if method["scaling_pass_value"] is None else method["scaling_pass_value"]
    z = run(lambda number, i: value).detach()
    for depth, (weight, bias) in enumerate(classifier):
        z = (z.clamp(min=0) if depth else z) @ weight.T + bias
    z = z.view(2, 6, -1, 3)
    s = (z / method["temperature"]).exp() if method["softmax"] else z
    s = s / s.sum(-1, keepdim=True) if method["softmax"] else s
    stays = (s[..., None, :] > s[..., :, None]).sum(-1) < (method["top_k"] or 3)
    again = s.exp() * stays
    s = again / again.sum(-1, keepdim=True) if method["softmax_topk"] else s * stays
    hidden = run(lambda number, i: s[:, :, number if method["layerwise"] else 0, i, None])
    return plain.lm_head(hidden)


def gate_of(host: Any) -> Any:
    return host.adapters("default")["model"]


def layers_of(host: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in gate_of(host).classifier]


def test_formula(tiny: Any, randomise: Any) -> None:
    plain = tiny("llama").double()
    for name, given in CASES.items():
        host = mixture(tiny, randomise, **given)
        with torch.no_grad():
            wanted = by_hand(plain, deltas(host), layers_of(host), **given)
            # The norms of this model compute in float32.
            assert torch.allclose(host.model(IDS).logits, wanted, atol=1e-5), name
            assert (wanted - plain(IDS).logits).abs().max() > 0.1, name


def test_gradients(tiny: Any, randomise: Any) -> None:
    """They are those of the formula with the first pass held fixed, for the adapters too if they train."""
    given = {"scaling_pass_value": 0.7, "layerwise": True, "depth": 2, "size": 4, "dropout": 0.0}
    host, plain = mixture(tiny, randomise, use_trainable_adapters=True, **given), tiny("llama").double()
    host.model.train()
    parameters = host.named_parameters("default")
    assert {key.partition("/")[0] for key in parameters if "/" in key} == set(PARTS)
    weights = torch.randn(2, 6, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, wanted = host.model(IDS).logits, by_hand(plain, deltas(host), layers_of(host), **given)
    for key, got, right in zip(
        parameters,
        torch.autograd.grad((found * weights).sum(), list(parameters.values())),
        torch.autograd.grad((wanted * weights).sum(), list(parameters.values())),
        strict=True,
    ):
        assert torch.allclose(got, right, rtol=1e-4, atol=1e-4), key
        assert right.abs().max() > 1e-3, key


def test_trained_are_the_classifier_and_nothing_else(tiny: Any, randomise: Any) -> None:
    host = mixture(tiny, randomise, depth=3, size=5, layerwise=True)
    assert host.summary().trainable == 32 * 5 + 5 + 5 * 5 + 5 + 5 * 45 + 45  # 15 modules: all linear ones, and words
    assert {key.rpartition(".")[0] for key in host.named_parameters("default")} == {
        f"adapter.model.classifier.{i}" for i in range(3)
    }
    hidden = []
    gate_of(host).classifier[0].register_forward_hook(lambda _, args, out: hidden.append(args[0]))
    host.model(IDS)
    assert not hidden[0].requires_grad


def test_dropout(tiny: Any, randomise: Any) -> None:
    """In training: of the classifier between its layers, and each adapter's own."""
    host = mixture(tiny, randomise, depth=2, size=64, dropout=0.5)
    h = torch.randn(4, 32, dtype=torch.float64)
    gate = gate_of(host)
    (weight, bias), (last, end) = layers_of(host)
    inner = (h @ weight.T + bias).clamp(min=0)
    with torch.no_grad():
        assert torch.allclose(gate.classify(h), inner @ last.T + end)
        gate.train()
        torch.manual_seed(3)
        noisy = gate.classify(h)
        torch.manual_seed(3)
        assert torch.allclose(noisy, F.dropout(inner, 0.5) @ last.T + end)
    parts = {name: {**settings, "dropout": 0.5 * (name == "two")} for name, settings in PARTS.items()}
    other = al.attach(tiny("llama").double(), XLoRA(adapters=parts))
    mixed: Any = other.adapters("default")["model.layers.0.self_attn.v_proj"]
    randomise(other)
    with torch.no_grad():
        x = torch.randn(2, 6, 32, dtype=torch.float64)
        a, _ = mixed.train().factors(x.dtype)
        [part.train() for part in mixed.parts]
        torch.manual_seed(5)
        found = mixed.projected(x, a)
        torch.manual_seed(5)
        wanted = torch.cat([x @ a[:2].T, F.dropout(x, 0.5) @ a[2:5].T, x @ a[5:].T], -1)
        assert torch.allclose(found, wanted)


# ---------------------------------------------------------------- two caches

FAMILIES = ["llama", "gpt2", "qwen2", "mistral-window"]


def family(name: str, randomise: Any, **settings: Any) -> Any:
    parts = {"one": {"name": "lora", "r": 2}, "two": {"name": "lora", "r": 3}}
    host = al.attach(models.tiny(name), XLoRA(adapters=parts, layerwise=True, scaling_pass_value=0.2, **settings))
    randomise(host, size=0.2)
    return host


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_with_two_caches_give_the_logits_of_one_pass(name: str, randomise: Any) -> None:
    stepwise(randomise, name)


def stepwise(randomise: Any, name: str = "llama") -> None:
    """Padding on either side, several tokens at once and one, a growing cache and one of fixed size."""
    host = family(name, randomise)
    model, ids = host.model, torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(4))
    for cut in (slice(0, 3), slice(11, 14)):
        mask = torch.ones_like(ids)
        mask[0, cut] = 0
        given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "attention_mask": mask}
        with torch.no_grad():
            whole = model(ids, **given, use_cache=False).logits
            for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
                found, made = [], cache
                for here in (slice(0, 9), slice(9, 10), slice(10, 13), slice(13, 14)):
                    part = {"position_ids": given["position_ids"][:, here], "attention_mask": mask[:, : here.stop]}
                    out = model(ids[:, here], **part, **{str(cache_argument(model)): made}, use_cache=True)
                    made = cache_out(out)
                    found.append(out.logits)
                apart = (torch.cat(found, 1) - whole).abs()[mask.bool()]
                assert apart.max() < 1e-4, (cut, type(made))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_without_caches_and_reads_each_token_twice(beams: int, randomise: Any) -> None:
    host, ids = family("llama", randomise), IDS.clone()
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    read: list[int] = []
    host.model.model.layers[0].register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False,
             "num_beams": beams, "pad_token_id": 0}  # fmt: skip
    made = host.model.generate(**given)
    assert read == [6, 6, *[1] * 10]
    read.clear()
    assert torch.equal(made, host.model.generate(**given, use_cache=False))
    assert read == [length for length in range(6, 12) for _ in range(2)]


def test_a_cache_filled_without_the_adapter_is_refused(randomise: Any) -> None:
    host = family("llama", randomise)
    with torch.no_grad():
        with host.using():
            past = host.model(IDS, use_cache=True)
        name = str(cache_argument(host.model))
        with pytest.raises(AttachError, match=r"holds 6 tokens.*has seen 0.*empty cache"):
            host.model(IDS[:, :1], **{name: cache_out(past)})
        mine = cache_out(host.model(IDS, use_cache=True))
        mine.crop(-2)
        whole = host.model(IDS, use_cache=False).logits
        assert (host.model(IDS[:, 4:], **{name: mine}).logits - whole[:, 4:]).abs().max() < 1e-4


# ---------------------------------------------------------------- batches, steps and calls


def test_packed_rows_have_the_loss_of_padded_ones(randomise: Any) -> None:
    host = family("llama", randomise)
    assert obstacle(host.model, Collator(0), 12) == ""
    assert Loss(host.model).path == "chunked"


def test_steps_are_sums_over_their_batches(tiny: Any, randomise: Any, batch_for: Any) -> None:
    host = mixture(tiny, randomise)
    loss, one, two = Loss(host.model), batch_for(host.model, seed=1), batch_for(host.model, length=7, seed=2)
    total = loss.tokens(one) + loss.tokens(two)
    parameters = host.parameters("default")
    apart = [torch.autograd.grad(loss(batch, total), parameters) for batch in (one, two)]
    both = torch.autograd.grad(loss(one, total) + loss(two, total), parameters)
    for first, second, whole in zip(*apart, both, strict=True):
        assert torch.allclose(first + second, whole)


def test_a_block_called_by_itself_is_refused(tiny: Any, randomise: Any, batch_for: Any) -> None:
    """So are activations that are computed again where nothing tells the scales."""
    host = mixture(tiny, randomise)
    with pytest.raises(AttachError, match=r"called without the model around it.*host.recompute"):
        host.model.model.layers[0].mlp(torch.randn(1, 3, 32, dtype=torch.float64))
    host.model.gradient_checkpointing_enable({"use_reentrant": False})
    host.model.train()
    with pytest.raises(AttachError, match="called without the model around it"):
        host.model(**batch_for(host.model)).loss.backward()


# ---------------------------------------------------------------- adapters from elsewhere


def test_folders_and_names_become_parts(tiny: Any, randomise: Any, tmp_path: Path) -> None:
    """Saved adapters and adapters on the model, with their values; what is saved needs neither."""
    model = tiny("llama")
    host = al.attach(model, LoRA(r=2), "math")
    host.attach(LoRA(r=3, targets=["q", "v"]), "code")
    randomise(host, size=0.2)
    host.save(tmp_path / "code", "code")
    values = {"one": host.state_dict("math"), "two": host.state_dict("code")}
    host.detach("code")
    host.attach(XLoRA(adapters={"one": "math", "two": str(tmp_path / "code")}, layerwise=True), "mixture")
    assert list(host.methods) == ["math", "mixture"]
    tensors = host.state_dict("mixture")
    for part, held in values.items():
        assert all(torch.equal(tensors[f"{part}/{key}"], value) for key, value in held.items())
    host.activate("mixture")
    with torch.no_grad():
        before = model(IDS).logits
    host.save(tmp_path / "mixture", "mixture")
    host.save(tmp_path / "mixture", "mixture", overwrite=True)
    (tmp_path / "code" / "adapter_model.safetensors").unlink()
    fresh = tiny("llama")
    again = al.load(fresh, tmp_path / "mixture")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, before)
    assert again.methods["mixture"].adapters["two"]["r"] == 3
    (tmp_path / "mixture" / "1" / "method.json").unlink()
    (tmp_path / "mixture" / "1" / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="holds no adapter"):
        al.load(tiny("llama"), tmp_path / "mixture")


def test_a_run_goes_on_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line: adapters by folder, a run that is interrupted and goes on, an answer."""
    write_model(tmp_path / "model")
    write_data(tmp_path / "rows.jsonl")
    for seed, name in enumerate(("math", "code")):
        run = make_config(tmp_path, steps=1, accumulation=1, eval_every=1, warmup=0, seed=seed)
        fit({**run, "output": str(tmp_path / name)}, quiet=True)
    adapters = {name: str(tmp_path / name / "best") for name in ("math", "code")}
    run = make_config(tmp_path, steps=3, accumulation=2, save_every=1, eval_every=3, warmup=0)
    run["method"] = {"name": "xlora", "adapters": adapters}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "run.yaml")])
    assert not ended.value.code, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    loads = [line["load"] for line in lines if "load" in line]
    assert loads
    assert all(len(share) == 2 and abs(sum(share) - 1) < 1e-3 for load in loads for share in load.values())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path / "run"), "1+2=", "--max-new-tokens", "3", "--json"])
    assert not ended.value.code, capsys.readouterr().err
    saved = tmp_path / "run" / "best"
    assert {path.name for path in saved.iterdir() if path.is_dir()} == {"0", "1"}


def test_a_run_is_resumed_with_folders_in_its_settings(tiny: Any, randomise: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), LoRA(r=2), "math")
    randomise(host)
    host.save(tmp_path / "math")
    method = XLoRA(adapters={"one": str(tmp_path / "math")}, use_trainable_adapters=True)
    first = al.attach(tiny("llama"), method)
    randomise(first)
    again = al.attach(tiny("llama"), LoRA(r=1), "other")
    again.attach(method, "default", saved=first.state_dict("default"))
    for key, value in first.state_dict("default").items():
        assert torch.equal(again.state_dict("default")[key], value), key


def test_what_does_not_fit_is_refused(tiny: Any, tmp_path: Path) -> None:
    one = {"name": "lora", "targets": ["q"]}
    wide = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ))  # fmt: skip
    al.attach(wide, LoRA(r=2)).save(tmp_path / "wide")
    for adapters, error, message in (
        ({"a": str(tmp_path)}, FormatError, "holds no adapter"),
        ({"a": str(tmp_path / "wide")}, FormatError, "another base"),
        ({"a": {"r": 3}}, ConfigError, r"adapters\['a'\].*settings of a new one"),
        ({"a": {"name": "adapter_pfeiffer"}}, AttachError, "'a' has a .* at .*Take a LoRA"),
        ({"a": {"name": "dora"}}, AttachError, "'a' has a DoRA.Layer at"),
        ({"a": one, "b": {**one, "lora_bias": True}}, AttachError, "'b' has a bias beside"),
        ({"a": {**one, "init": "pissa"}}, AttachError, "'a' changes model.layers.0.self_attn.q_proj.weight"),
        ({"a": {"name": "adalora"}}, AttachError, "'a' is a adalora adapter, which acts in steps"),
        ({"a": {"name": "lora", "targets": ["head"]}}, AttachError, "'a' adapts a head, .* at lm_head"),
    ):
        model = tiny("llama")
        with pytest.raises(error, match=message):
            al.attach(model, XLoRA(adapters=adapters))
        assert al.host(model) is None
    with pytest.raises(AttachError, match=r"T5ForConditionalGeneration has two stacks.*al.Average"):
        al.attach(tiny("t5"), XLoRA(adapters={"a": one}))
    for fields, message in (
        ({"adapters": {}}, "adapters"),
        ({"adapters": {"a": "a"}, "top_k": 2}, r"top_k=2 is more than the 1 adapters"),
        ({"adapters": {"a": "a"}, "softmax_topk": True}, "set top_k too"),
    ):
        with pytest.raises(ConfigError, match=message):
            XLoRA(**fields)


# ---------------------------------------------------------------- what the tests above refuse

_classify, _chosen, _scaled, _own, _mix = Gate.classify, Gate.chosen, Gate.scaled, Mixed.own, XLoRA._mix


def _without_relu(self: Gate, h: Tensor) -> Tensor:
    for layer in self.classifier:
        h = layer(h)
    return h


def _without_biases(self: Gate, h: Tensor) -> Tensor:
    for i, layer in enumerate(self.classifier):
        h = F.linear(h.relu() if i else h, layer.weight)
    return h


def _smallest(self: Gate, s: Tensor) -> Tensor:
    return -_chosen(self, -s)


def _scaled_up(self: Gate, s: Tensor) -> Tensor:
    kept = _chosen(self, s)
    return kept / kept.sum(-1, keepdim=True)


def _over_the_batch(self: Gate, s: Tensor) -> Tensor:
    """The second softmax as in the authors' code."""
    if not self.softmax_topk:
        return _chosen(self, s)
    top = s.topk(self.top_k or 1, -1)
    return torch.zeros_like(s).scatter(-1, top.indices, top.values.flatten().softmax(0).view_as(top.values))


def _plain_top(self: Gate, s: Tensor) -> Tensor:
    top = s.topk(self.top_k or 1, -1)
    return torch.zeros_like(s).scatter(-1, top.indices, top.values)


def _changed_stack(change: Any) -> Mutation:
    """`change(part, a, b, weight)` gives the factors of an adapter."""

    def stacked(self: Mixed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = [change(part, *part.factors(), self.weight) for part in self.parts]
        return torch.cat([a for a, _ in found]).to(dtype), torch.cat([b for _, b in found], 1).to(dtype)

    return (Mixed, "stacked", stacked)


def _through(self: Gate, run: Any, given: Any, past: Any) -> Any:
    """The first pass with gradient."""
    return _scaled(self, run, given, self.pass_value)


FORMULA: dict[str, Mutation] = {
    "the first pass has no adapters": begun(Gate, lambda self, method: setattr(self, "pass_value", 0.0)),
    "the first pass has all of them": begun(Gate, lambda self, method: setattr(self, "pass_value", 1.0)),
    "the second pass is the first": (
        Gate, "scaled", lambda self, run, given, scales: _scaled(self, run, given, self.pass_value)
    ),
    "no ReLU": (Gate, "classify", _without_relu),
    "no biases": (Gate, "classify", _without_biases),
    "scales of the token before": (Gate, "classify", lambda self, h: _classify(self, h.roll(1, 1))),
    "no softmax": (Gate, "normalised", lambda self, z: z),
    "temperature left out": (Gate, "normalised", lambda self, z: z.softmax(-1)),
    "temperature multiplies": (Gate, "normalised", lambda self, z: (z * self.temperature).softmax(-1)),
    "softmax over modules": (Gate, "normalised", lambda self, z: (z / self.temperature).softmax(-2)),
    "all are taken": (Gate, "chosen", lambda self, s: s),
    "the smallest are taken": (Gate, "chosen", _smallest),
    "what is left is scaled up": (Gate, "chosen", _scaled_up),
    "the second softmax is over the batch": (Gate, "chosen", _over_the_batch),
    "no second softmax": (Gate, "chosen", _plain_top),
    "scales of the first module for all": (Mixed, "own", lambda self, scales: scales[..., 0, :]),
    "scales of the module before": (Mixed, "own", lambda self, scales: scales[..., self.index - 1, :]),
    "adapters exchanged": (Mixed, "own", lambda self, scales: _own(self, scales).flip(-1)),
    "g left out": _changed_stack(lambda part, a, b, weight: (a, part.scale * b)),
    "s left out": _changed_stack(lambda part, a, b, weight: (a, weight * b)),
    "g squared": _changed_stack(lambda part, a, b, weight: (a, weight**2 * part.scale * b)),
}  # fmt: skip
test_the_formula_fails_when = fails_without(test_formula, lines=FORMULA)
test_the_gradients_are_others_when = fails_without(
    test_gradients, lines={"they go through the first pass": (Gate, "first", _through)}
)
test_more_trains_when = fails_without(
    test_trained_are_the_classifier_and_nothing_else,
    lines={
        "the adapters do": (
            XLoRA, "_mix", lambda self, host, name: _mix(self.replace(use_trainable_adapters=True), host, name)
        ),
    },
)  # fmt: skip
test_dropout_is_wrong_when = fails_without(
    test_dropout,
    lines={
        "the classifier has none": (Gate, "classify", lambda self, h: _classify(_still(self), h)),
        "adapters have none": (Mixed, "projected", lambda self, x, a: self.site.op(x, a)),
        "adapters share a mask": (Mixed, "projected", lambda self, x, a: self.site.op(F.dropout(x, 0.5), a)),
    },
)


def _still(gate: Gate) -> Gate:
    return gate.eval()


_first = Gate.first


def _forgets(self: Gate, run: Any, given: dict[str, Any], past: Any) -> Any:
    """A first pass over the new tokens alone."""
    _first(self, run, given, past)
    return _first(self, run, without_cache(given), None) if past is not None else _first(self, run, given, past)


test_a_cache_is_missed_when = fails_without(
    stepwise, lines={"the first pass forgets earlier tokens": (Gate, "first", _forgets)}
)
test_the_claim_fails_when = fails_without(
    test_claim,
    lines={
        "all tokens have the same scales": (
            Gate, "classify", lambda self, h: _classify(self, h.mean((0, 1), True).expand_as(h))
        ),
        "the classifier does not train": (
            Gate, "classify", lambda self, h: _classify(self, h).detach() + 0 * _classify(self, h)
        ),
    },
)  # fmt: skip
