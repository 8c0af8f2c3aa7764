"""DoRA: a change of all row norms is in reach at rank one, where LoRA's update is not; and the formula itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.core.kept import Kept
from adapterlab.errors import ConfigError, MergeError
from adapterlab.methods.low_rank import dora
from adapterlab.ops.magnitude import magnitude_linear


def adapter(host: Any, path: str, name: str = "default") -> Any:
    return host.adapters(name)[path]


def measure(method: Any, width: int = 24, steps: int = 150) -> float:
    """The final loss as a share of the first, when the target is the base with its rows rescaled by 0.5 to 1.5."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    model = nn.Sequential(layer)
    x = torch.randn(128, width)
    target = x @ ((0.5 + torch.rand(width))[:, None] * layer.weight.detach()).T
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0]


def holds() -> bool:
    return measure(al.DoRA(r=1, targets=["0"])) < 0.01 and measure(al.LoRA(r=1, targets=["0"])) > 0.5


def test_row_norms_are_learned_at_rank_one() -> None:
    assert holds()


def effective(site: Any, layer: Any) -> Tensor:
    """The adapted weight in float64, written out."""
    update = site.weight().double() + layer.scale * layer.B.double() @ layer.A.double()
    return layer.m.double()[:, None] * update / update.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("family", "targets"), [("qwen2", "all-linear"), ("gpt2", "all-linear"), ("llama", "embed")])
def test_the_formula_in_float64(family: str, targets: str, tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny(family), al.DoRA(r=3, targets=[targets]))
    randomise(host)
    for layer in host.adapters("default").values():
        site = layer.site
        x = torch.randn(4, site.shape[1]) if site.kind == "linear" else torch.arange(9)
        rows = x.double() if site.kind == "linear" else F.one_hot(x, site.shape[1]).double()
        expected = rows @ effective(site, layer).T + (0 if site.bias is None else site.bias.double())
        assert (site.module(x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classes", "t5", "vit", "mixtral"])
def test_start_and_count(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.DoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    shapes = [a.site.shape for a in host.adapters("default").values()]
    assert host.summary().trainable == sum(4 * (i + o) + o for o, i in shapes)
    host.verify(batch)


def test_gradients_treat_the_norm_as_a_constant(tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny("qwen2"), al.DoRA(r=3, targets=["q"]))
    randomise(host)
    layer = next(iter(host.adapters("default").values()))
    site, x = layer.site, torch.randn(5, layer.site.shape[1])
    inputs = (layer.A, layer.B, layer.m)
    weight = site.weight() + layer.scale * layer.B @ layer.A
    written = F.linear(x, (layer.m / weight.detach().norm(dim=1))[:, None] * weight, site.bias)
    expected = torch.autograd.grad(written.square().sum(), inputs)
    found = torch.autograd.grad(site.module(x).square().sum(), inputs, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ((ours - theirs).abs() <= 1e-4 * theirs.abs().max()).all()


def test_dropout_spares_the_base_and_reaches_both_corrections(monkeypatch: pytest.MonkeyPatch, randomise: Any) -> None:
    linear = nn.Linear(6, 5)
    base = nn.Sequential(linear)
    host = al.attach(base, al.DoRA(r=2, dropout=0.5, targets=["0"]))
    base.train()
    randomise(host)
    layer = adapter(host, "0")
    x, mask = torch.randn(3, 6), torch.tensor([0.0, 2, 0, 2, 2, 0])
    monkeypatch.setattr(F, "dropout", lambda x, p: x * mask)
    w, b = linear.weight, linear.bias
    update = layer.scale * layer.B @ layer.A
    g = layer.m / (w + update).norm(dim=1)
    expected = x @ w.T + b + (g - 1) * (x * mask @ w.T) + g * (x * mask @ update.T)
    assert torch.allclose(base(x), expected, atol=1e-5)


def test_kept_norms_follow_every_change(tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny("llama"), al.DoRA(r=2, targets=["v"]))
    layer = next(iter(host.adapters("default").values()))

    def right() -> bool:
        site = layer.site
        expected = (site.weight() + layer.scale * layer.B @ layer.A).norm(dim=1)
        return torch.allclose(layer.norms(), expected, atol=1e-5)

    with torch.inference_mode():
        assert right()
    assert right()
    kept = layer.norms()
    assert layer.norms() is kept  # not computed again
    randomise(host)
    assert right()
    with torch.no_grad():
        layer.site.module.weight.mul_(1.5)
    assert right()
    layer.scale *= 3
    assert right()
    layer.train()
    layer.B.data.add_(1.0)
    layer.eval()
    assert right()


def test_adapters_on_one_module_merge_from_the_inside_out(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny("qwen2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRA(r=2), "first")
    host.attach(al.DoRA(r=2), "second")
    host.attach(al.DoRA(r=3, targets=["q", "down"]), "third")
    randomise(host, size=0.1)
    live = logits(model, batch)
    with pytest.raises(MergeError, match="first"):
        host.merge("second")
    for name in ("first", "second", "third"):
        host.merge(name)
        assert (logits(model, batch) - live).abs().max() < 1e-4, name
    for name in ("third", "second", "first"):
        host.restore(name)
        assert (logits(model, batch) - live).abs().max() < 1e-4, name
    with host.using():
        assert torch.equal(logits(model, batch), base)


def test_rows_of_a_batch_have_their_own_adapter(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = {k: v for k, v in batch_for(model, rows=3).items() if k != "labels"}
    host = al.attach(model, al.DoRA(r=2), "a")
    host.attach(al.LoRA(r=2), "b")
    randomise(host)
    apart = []
    for names in (("a",), ("b",), ()):
        with host.using(*names):
            apart.append(logits(model, batch))
    with host.rows(["a", "b", None]):
        mixed = logits(model, batch)
    for row in range(3):
        assert (mixed[row] - apart[row][row]).abs().max() < 1e-5


def test_a_packed_base_starts_equal_and_merges(randomise: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(model[0].state_dict())
    model[0] = packed.to("cpu")
    x = torch.randn(3, 64)
    if model(x).isnan().any() or model[0].weight.dtype != torch.uint8:
        pytest.skip("this bitsandbytes cannot pack on the CPU")
    base = model(x)
    host = al.attach(model, al.DoRA(r=4, targets=["0"]))
    assert torch.equal(model(x), base)
    randomise(host)
    model.eval()
    live = model(x)
    weight = effective(adapter(host, "0").site, adapter(host, "0")).float()
    assert (live - x @ weight.T - packed.bias).abs().max() < 1e-3
    host.merge(quantized="dequantize")
    assert (model(x) - live).abs().max() < 1e-3
    host.restore("default")
    assert torch.equal(model(x), live)


def test_a_bias_of_b_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_bias"):
        al.DoRA(lora_bias=True)


LAYER, MERGED, NORMS, LINEAR = al.DoRA.Layer, al.DoRA.Layer.merged, dora.row_norms, magnitude_linear


def _norms(change: Any) -> Mutation:
    """Other norms, made of W, A, B and s."""
    return (dora, "row_norms", lambda w, a, b, s, squares=None: change(w, a, b, s))


def _linear(change: Any) -> Mutation:
    """Another product, made of x, W, the bias, s B A and the gain."""
    return (dora, "magnitude_linear", lambda x, w, bias, a, b, s, gain, *again: change(x, w, bias, s * b @ a, gain))


def _bias(bias: Any) -> Any:
    return 0 if bias is None else bias


def _kept(self: Any, name: str, compute: Any, *tensors: Tensor, given: Any = None) -> Any:
    return self._held.setdefault(name, (0, compute()))[1]


BROKEN: dict[str, Mutation] = {
    "m gets no gradient": _linear(lambda x, w, bias, d, g: F.linear(x, g.detach()[:, None] * (w + d), bias)),
    "the gain on the update alone": _linear(lambda x, w, bias, d, g: F.linear(x, w + g[:, None] * d, bias)),
    "the gain on the base alone": _linear(lambda x, w, bias, d, g: F.linear(x, g[:, None] * w + d, bias)),
    "the gain on the bias too": _linear(lambda x, w, bias, d, g: g * F.linear(x, w + d, bias)),
    "the bias lost": _linear(lambda x, w, bias, d, g: F.linear(x, g[:, None] * (w + d))),
    "norms of W alone": _norms(lambda w, a, b, s: w.norm(dim=1)),
    "s left out of the norms": _norms(lambda w, a, b, s: NORMS(w, a, b, 1.0)),
    "no cross term in the norms": _norms(lambda w, a, b, s: (w.norm(dim=1) ** 2 + (s * b @ a).norm(dim=1) ** 2).sqrt()),
    "one norm for all rows": _norms(lambda w, a, b, s: NORMS(w, a, b, s).mean().expand(len(w))),
    "squared norms": _norms(lambda w, a, b, s: NORMS(w, a, b, s) ** 2),
    "a gradient through the norms": _norms(lambda w, a, b, s: (w + s * b @ a).norm(dim=1)),
    "m starts at one": begun(LAYER, lambda layer, method: layer.m.fill_(1)),
    "norms kept for ever": (Kept, "once", _kept),
    "merged without the gain": (LAYER, "merged", lambda self, w, bias: (w + self.delta(), bias)),
    "the gain merged into the bias": (
        LAYER, "merged", lambda self, w, b: (MERGED(self, w, b)[0], None if b is None else b * self.m / self.norms())
    ),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_the_formula_in_float64, "qwen2", "all-linear"),
    test_gradients_treat_the_norm_as_a_constant,
    functools.partial(test_start_and_count, "llama"),
    test_kept_norms_follow_every_change,
    test_adapters_on_one_module_merge_from_the_inside_out,
    test_row_norms_are_learned_at_rank_one,
    lines=BROKEN,
)
