"""AdaMix: experts that are drawn at random agree with each other, and their mean is as good as they are."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F

from adapterlab.errors import ConfigError, MergeError, TrainingError
from adapterlab.hosts import attach, load
from adapterlab.methods.bottleneck import adamix
from adapterlab.methods.bottleneck._bottleneck import Pair
from adapterlab.methods.bottleneck.adamix import AdaMix, Consistency

NAME, PATH = "default", "bert.encoder.layer.0.output.dense"
LAYER, LORA = AdaMix.Layer, AdaMix.Product


def data(model: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (48, 10), generator=draw)
    return {"input_ids": ids, "labels": (ids[:, 1] * 3 // 128)}


def measure(make: Any, consistency: float, steps: int = 80) -> dict[str, float]:
    """How far two draws are apart after training, and the losses of draws and of the mean expert."""
    model = make("bert-classes")
    torch.manual_seed(0)
    host = attach(model, AdaMix(m=4, consistency=consistency, init_std=0.3, modules_to_save=("classifier",)))
    batch = data(model)
    optimizer = torch.optim.Adam(host.parameters(NAME), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with host.state.collect() as extra:
            (model(**batch).loss + sum(extra)).backward()
        optimizer.step()
    with torch.no_grad():
        found = [model(**batch) for _ in range(8)]
        apart = [adamix.divergence(a.logits, b.logits) for a, b in itertools.pairwise(found)]
        host.methods[NAME].finish(host, NAME)
        merged = float(model.eval()(**batch).loss)
    return {
        "apart": float(torch.stack(apart).mean()),
        "drawn": float(torch.stack([out.loss for out in found]).mean()),
        "merged": merged,
    }


def test_claim(tiny: Any) -> None:
    """Consistency halves the distance between two draws at least; the mean expert is no worse than draws are."""
    with_, without = measure(tiny, 1.0), measure(tiny, 0.0)
    assert with_["apart"] <= 0.5 * without["apart"], (with_, without)
    assert with_["merged"] <= with_["drawn"] * 1.001, with_
    assert with_["drawn"] < 1.0


def adapted(make: Any, **settings: Any) -> tuple[Any, Any, Any, Tensor]:
    """A BERT in float64 with experts of random weights, and an input of its first feed-forward projection."""
    model = make("bert-classes").double()
    host = attach(model, AdaMix(m=4, scale=0.5, **settings))
    draw = torch.Generator().manual_seed(5)
    for value in host.tensors(NAME).values():
        value.data.copy_(torch.randn(value.shape, generator=draw).double() * 0.5)
    return model, host, host.adapters(NAME)[PATH], torch.randn(3, 48, generator=draw).double()


def expert(layer: Any, h: Tensor, i: Any, j: Any) -> Tensor:
    """What the adapter with these experts makes of h: numbers, or "mean"."""
    down, down_bias = (t.mean(0) if i == "mean" else t[i] for t in (layer.down, layer.down_bias))
    up, up_bias = (t.mean(0) if j == "mean" else t[j] for t in (layer.up, layer.up_bias))
    return h + 0.5 * (F.gelu(h @ down.T + down_bias) @ up.T + up_bias)


@torch.no_grad()
def test_experts_are_drawn_independently(tiny: Any) -> None:
    """Each pair with the same probability, for the whole batch; a shared projection is one."""
    torch.manual_seed(0)
    for settings, pairs in (({"experts": 2, "share_up": False}, 4), ({"experts": 3}, 3)):
        model, host, layer, x = adapted(tiny, **settings)
        module = model.get_submodule(PATH)
        with host.using():
            h = module(x)
        wanted = {(i, j): expert(layer, h, i, j) for i in range(len(layer.down)) for j in range(len(layer.up))}
        assert len(wanted) == pairs
        model.train()
        seen = Counter()
        for _ in range(400):
            y = module(x)
            seen.update(pair for pair, made in wanted.items() if torch.allclose(y, made, atol=1e-12))
        assert sum(seen.values()) == 400
        assert all(count > 0.6 * 400 / pairs for count in seen.values()), seen
        assert len(seen) == pairs


@torch.no_grad()
def test_layers_are_drawn_independently(tiny: Any) -> None:
    torch.manual_seed(0)
    model, host, layer, _ = adapted(tiny, experts=2)
    model.train()
    other: Any = host.adapters(NAME)[PATH.replace("0", "1")]
    seen = Counter()
    for _ in range(60):
        one, two = layer.weights()[0], other.weights()[0]
        seen[bool(torch.equal(one, layer.down[1])), bool(torch.equal(two, other.down[1]))] += 1
    assert len(seen) == 4


@torch.no_grad()
def test_evaluation_and_the_end_have_the_mean(tiny: Any, batch_for: Any, logits: Any, tmp_path: Any) -> None:
    """Weights and biases are averaged, not outputs; what is saved is one adapter."""
    model, host, layer, x = adapted(tiny, share_up=False)
    model.float()
    layer, x = host.adapters(NAME)[PATH], x.float()
    module = model.get_submodule(PATH)
    with host.using():
        h = module(x)
    assert torch.allclose(module(x), expert(layer, h, "mean", "mean"), atol=1e-5)
    batch = batch_for(model)
    before, tensors = logits(model, batch), host.state_dict(NAME)
    host.methods[NAME].finish(host, NAME)
    assert torch.equal(logits(model, batch), before)
    assert {key: tuple(v.shape) for key, v in host.tensors(NAME).items()} == {
        key: tuple(v.shape[1:]) for key, v in tensors.items()
    }
    assert all(torch.equal(v, tensors[key].mean(0)) for key, v in host.tensors(NAME).items())
    host.save(tmp_path / "adapter")
    again = load(tiny("bert-classes"), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), before)
    assert not any(isinstance(a, Consistency) for a in again.adapters(NAME).values())
    assert again.summary().trainable == 2 * (2 * 4 * 32 + 4 + 32)


@torch.no_grad()
def test_lora_has_experts_too_and_their_mean_merges(tiny: Any, batch_for: Any, logits: Any) -> None:
    """In training one of each, scaled; then the mean of both, which is written into the base."""
    torch.manual_seed(0)
    model = tiny("bert-classes").double()
    path = "bert.encoder.layer.0.attention.self.query"
    host = attach(model, AdaMix(host="lora", m=4, experts=2, scale=0.5, share_up=False, init_std=0.3))
    layer: Any = host.adapters(NAME)[path]
    assert {p.rpartition(".")[2] for p in host.adapters(NAME)} == {"query", "value", ""}  # the model itself compares
    assert float(layer.down.std()) == pytest.approx(0.3, rel=0.15)
    assert not layer.up.any()
    for value in host.tensors(NAME).values():
        value.normal_()
    x, module = torch.randn(3, 32).double(), model.get_submodule(path)
    with host.using():
        base = module(x)
    pairs = {(i, j): base + 0.5 * x @ layer.down[i].T @ layer.up[j].T for i in range(2) for j in range(2)}
    model.train()
    made = [module(x) for _ in range(60)]
    seen = Counter(pair for y in made for pair, wanted in pairs.items() if torch.allclose(y, wanted, atol=1e-12))
    assert sum(seen.values()) == 60
    assert len(seen) == 4
    model.eval()
    mean = base + 0.5 * x @ layer.down.mean(0).T @ layer.up.mean(0).T
    assert torch.allclose(module(x), mean, atol=1e-12)
    host.methods[NAME].finish(host, NAME)
    assert torch.allclose(module(x), mean, atol=1e-12)
    assert host.summary().trainable == 4 * 4 * (32 + 32)
    batch = batch_for(model)
    wanted = logits(model, batch)
    host.merge()
    assert torch.allclose(logits(model, batch), wanted, atol=1e-10)


def test_divergence() -> None:
    """½ (KL(p ‖ q) + KL(q ‖ p)), whose gradient takes each first distribution as given."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    one, two = (torch.distributions.Categorical(logits=t) for t in (p, q))
    kl = torch.distributions.kl_divergence
    found = adamix.divergence(p, q)
    assert float(found) == pytest.approx(float((kl(one, two) + kl(two, one)).mean() / 2), rel=1e-6)
    found.backward()
    wanted = (p.softmax(-1) - q.softmax(-1)).detach() / (2 * 5)
    assert torch.allclose(p.grad, wanted, atol=1e-7)  # type: ignore[arg-type]
    assert torch.allclose(q.grad, -wanted, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "bert-classes", "bert-tokens", "t5"])
def test_emitted_loss(kind: str, tiny: Any, batch_for: Any) -> None:
    """Of two passes with other draws, at the positions that bear a label; the answer is that of the first."""
    model = tiny(kind)
    host = attach(model, AdaMix(m=4, consistency=3.0, init_std=0.5))
    batch = batch_for(model)
    model.train()
    torch.manual_seed(4)
    with host.state.collect() as extra, torch.no_grad():
        out = model(**batch)
    torch.manual_seed(4)
    with torch.no_grad():
        p, q = (model(**batch).logits for _ in range(2))
    labels = batch["labels"]
    assert torch.equal(out.logits, p)
    if kind == "llama":
        p, q, labels = p[:, :-1], q[:, :-1], labels[:, 1:]
    bears = labels != -100 if p.dim() == 3 else torch.ones(len(p), dtype=torch.bool)
    one, two = (torch.distributions.Categorical(logits=t[bears]) for t in (p, q))
    kl = torch.distributions.kl_divergence
    assert len(extra) == 1
    assert float(extra[0]) == pytest.approx(3 * float((kl(one, two) + kl(two, one)).mean() / 2), rel=1e-4)
    assert float(extra[0]) > 1e-3
    model.eval()
    with host.state.collect() as extra:
        model(**batch)
    assert not extra


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_count(kind: str, tiny: Any, batch_for: Any) -> None:
    for shared, size in ((True, 4 * (4 * 32 + 4) + 4 * 32 + 32), (False, 4 * (2 * 4 * 32 + 4 + 32))):
        model = tiny(kind)
        host = attach(model, AdaMix(m=4, share_up=shared))
        assert host.summary().trainable == (4 if kind == "t5" else 2) * size
        host.verify(batch_for(model))


def test_start(tiny: Any) -> None:
    """As the authors' classes have it: every expert has its own draw."""
    torch.manual_seed(0)
    layer: Any = attach(tiny("llama"), AdaMix(m=64, share_up=False)).adapters(NAME)["model.layers.0.mlp"]
    for weight in (layer.down, layer.up):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(weight[0], weight[1])
    assert not layer.down_bias.any()
    assert not layer.up_bias.any()


def test_refusals(tiny: Any) -> None:
    model = tiny("llama")
    backbone = model.model
    host = attach(backbone, AdaMix(m=4))
    backbone.train()
    with host.state.collect(), pytest.raises(TrainingError, match="consistency=0"):
        backbone(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(MergeError, match=r"nonlinear function|two passes"):
        attach(tiny("llama"), AdaMix(m=4)).merge()
    with pytest.raises(ConfigError, match="experts = 0"):
        AdaMix(experts=0)


AROUND = Consistency.around


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[0] for tensor in tensors)


def _tied(self: Any) -> Any:
    i = int(torch.randint(len(self.down), (1,))) if self.training and self.down.dim() == 3 else 0
    whole = (self.down, self.down_bias, self.up, self.up_bias)
    return tuple(t[min(i, len(t) - 1)] for t in whole) if self.training else WEIGHTS(self)


def _once(self: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
    out = run(*args, **kwargs)
    return AROUND(self, lambda *a, **k: out, *args, **kwargs)


def _crosses(p: Tensor, q: Tensor) -> Tensor:
    a, b = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return 0.5 * ((a - b) * (a.exp() - b.exp())).sum(-1).mean()


WEIGHTS, MERGE, ANSWERS = LAYER.weights, LAYER.merge, adamix.answers
BROKEN: dict[str, Mutation] = {
    "the first expert always": (adamix, "drawn", _same),
    "the same number for both": (LAYER, "weights", _tied),
    "the mean in training too": (adamix, "drawn", adamix.mean),
    "one draw for all layers": (LAYER, "weights", lambda self: ONE.setdefault(len(self.down), WEIGHTS(self))),
    "an expert outside of training": (adamix, "mean", _same),
    "the sum": (adamix, "mean", lambda *tensors: tuple(t.sum(0) for t in tensors)),
    "biases are not averaged": (adamix, "mean", lambda weight, *bias: (weight.mean(0), *(t[0] for t in bias))),
    "nothing is merged": (LAYER, "merge", lambda self: None),
    "the first expert is left": (LAYER, "merge", lambda self: [
        setattr(self, key, torch.nn.Parameter(value.detach()[0])) for key, value in list(self.named_parameters())]),
    "one pass": (Consistency, "around", _once),
    "c left out": (Consistency, "around", lambda self, run, *args, **kwargs: (
        setattr(self, "factor", 1.0), AROUND(self, run, *args, **kwargs))[1]),
    "the second answer": (Consistency, "around", lambda self, run, *args, **kwargs: (
        AROUND(self, run, *args, **kwargs), run(*args, **kwargs))[1]),
    "all positions": (adamix, "answers", lambda p, q, labels, shifted: (p.flatten(0, -2), q.flatten(0, -2))),
    "not shifted": (adamix, "answers", lambda p, q, labels, shifted: ANSWERS(p, q, labels, False)),
    "one divergence": (adamix, "divergence", lambda p, q: F.kl_div(
        q.log_softmax(-1), p.detach().log_softmax(-1), log_target=True, reduction="batchmean")),
    "gradients into both": (adamix, "divergence", _crosses),
    "LoRA has the mean in training": (LORA, "product", Pair.product),
    "LoRA has the first expert at last": (LORA, "factors", lambda self: (
        (self.down, self.up) if self.down.dim() == 2 else (self.down[0], self.up[0]))),
    "LoRA without its scale": begun(LORA, lambda part, method: setattr(part, "scale", 1.0)),
    "LoRA starts off the base": begun(LORA, lambda part, method: part.up.fill_(0.1)),
    "experts start alike": begun(LAYER, lambda part, method: part.down.copy_(part.down[:1].expand_as(part.down))),
    "starts larger": begun(LAYER, lambda part, method: part.up.mul_(2)),
}  # fmt: skip
ONE: dict[int, Any] = {}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_experts_are_drawn_independently,
    test_evaluation_and_the_end_have_the_mean,
    test_divergence,
    functools.partial(test_emitted_loss, "llama"),
    test_lora_has_experts_too_and_their_mean_merges,
    test_start,
    lines=BROKEN,
)


def test_the_claim_fails_without_a_second_draw(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN["one pass"])
    with pytest.raises(AssertionError):
        test_claim(tiny)
