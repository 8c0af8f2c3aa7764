"""The fused low-rank product against plain autograd, and what it keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import adapterlab as al
from adapterlab.engine import fusion
from adapterlab.engine.fusion import may_fuse
from adapterlab.methods.low_rank import dora
from adapterlab.ops.low_rank import Span, low_rank_linear, low_rank_spans
from adapterlab.registry import method as method_of
from adapterlab.testing.models import packed


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * (x @ a.T @ b.T)


def case(shape: tuple[int, ...], bias: bool, transposed: bool, contiguous: bool) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64)

    x = normal(*shape, 5)
    if not contiguous:
        x = normal(5, *shape).movedim(0, -1)
    weight = normal(5, 3).T if transposed else normal(3, 5)
    a, b = normal(2, 5), normal(3, 2)
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    return leaves, weight, normal(3) if bias else None


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 1, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_value_and_gradients(shape: tuple[int, ...], bias: bool, transposed: bool, contiguous: bool) -> None:
    (x, a, b), weight, shift = case(shape, bias, transposed, contiguous)
    expected, found = (f(x, weight, shift, a, b, 1.7) for f in (plain, low_rank_linear))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected)
    out = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * out).sum(), (x, a, b)) for y in (expected, found)]
    assert all(torch.allclose(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(transposed: bool, p: float, packed: bool) -> None:
    (x, a, b), weight, shift = case((2, 3), True, transposed, True)
    assert shift is not None
    again = (lambda: weight.clone()) if packed else None

    def run(x: Tensor, shift: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank_linear(x, weight.clone() if packed else weight, shift, a, b, 0.3, p, again)

    assert torch.autograd.gradcheck(run, (x, shift.requires_grad_(), a, b))


def method(id: str, **fields: Any) -> Any:
    found: Any = method_of(id)
    return found(**fields)


def seen_mask(rows: int, width: int, p: float) -> Tensor:
    """What the dropout multiplies x by, read off an update that is the identity on a base of zeros."""
    eye = torch.eye(width)
    return low_rank_linear(torch.ones(rows, width), torch.zeros(width, width), None, eye, eye, 1.0, p)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_each_element_with_its_probability(p: float) -> None:
    torch.manual_seed(0)
    mask = seen_mask(1000, 96, p)
    kept = mask > 0
    assert set(kept.unique().tolist()) == {True, False}
    assert ((mask[kept] - 1 / (1 - p)).abs() < 1e-3).all()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - p)) < 4 * deviation / 96000**0.5
    # Elements come four to a drawn word: each of the four must have the right share, and know nothing of the others.
    lanes = kept.float().view(-1, 4)
    assert ((lanes.mean(0) - (1 - p)).abs() < 4 * deviation / 24000**0.5).all()
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 0.03
    again = seen_mask(1000, 96, p) > 0
    assert abs(float((kept == again).float().mean()) - (p**2 + (1 - p) ** 2)) < 0.01
    torch.manual_seed(0)
    assert torch.equal(seen_mask(1000, 96, p), mask)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False), (True, False, False)])
def test_dropout_against_the_formula_with_its_mask(needs: tuple[bool, ...]) -> None:
    leaves, weight, shift = case((4, 3), True, False, True)
    x, a, b = (leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True))
    torch.manual_seed(5)
    mask = seen_mask(12, 5, 0.4).double().view(4, 3, 5)
    expected = F.linear(x, weight, shift) + 1.7 * (x * mask @ a.T @ b.T)
    torch.manual_seed(5)
    found = low_rank_linear(x, weight, shift, a, b, 1.7, 0.4)
    assert torch.allclose(found, expected, rtol=1e-4)  # the probability is rounded to a multiple of 2⁻¹⁶
    wanted = [t for t in (x, a, b) if t.requires_grad]
    out = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * out).sum(), wanted) for y in (expected, found)]
    assert all(torch.allclose(g, h, rtol=1e-3, atol=1e-6) for g, h in zip(*grads, strict=True))


def test_recomputed_activations_see_the_same_dropout() -> None:
    (x, a, b), weight, _ = case((6,), False, False, True)

    def run(x: Tensor) -> Tensor:
        return low_rank_linear(x, weight, None, a, b, 1.0, 0.5).square().sum()

    grads = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(2)
        y = call(x)
        torch.rand(3)  # what is drawn in between must not matter
        grads.append(torch.autograd.grad(y, (x, a, b)))
    assert all(torch.equal(g, h) for g, h in zip(*grads, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_operator_says_what_it_returns(p: float) -> None:
    (x, a, b), weight, shift = case((4,), True, False, True)
    tensors = [t.detach() for t in (x, weight, shift, a, b)]
    torch.library.opcheck(torch.ops.adapterlab.low_rank.default, (*tensors, 0.5, p, torch.tensor(3) if p else None))
    torch.library.opcheck(torch.ops.adapterlab.dropout_mask.default, (tensors[0], 3, 0.5, torch.tensor(3)))


def spans_case() -> tuple[Tensor, Tensor, list[tuple[int, int, Tensor, Tensor, float]]]:
    """Tokens, a weight, and updates of some of them with ranks of their own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64, requires_grad=True)

    places = [(0, 40, 2, 0.0), (40, 80, 5, 0.4), (120, 150, 3, 0.7)]
    return normal(2, 80, 6), normal(4, 6).detach(), [(a, b, normal(r, 6), normal(4, r), p) for a, b, r, p in places]


def test_spans_of_one_product_are_what_each_would_be_alone() -> None:
    """Values to rounding; gradients of factors to the bit, with the masks of a generator that stands where torch's did.

    They are products of the same slices.
    """
    x, weight, spans = spans_case()
    given = [Span(a, b, A, B, 1.3, p, torch.Generator().manual_seed(i)) for i, (a, b, A, B, p) in enumerate(spans)]
    y = low_rank_spans(x, weight, None, given)
    expected = F.linear(x, weight).flatten(0, 1).clone()
    out = torch.randn(160, 4, dtype=torch.float64)
    grads = torch.autograd.grad((y.flatten(0, 1) * out).sum(), [x, *(f for span in given for f in (span.a, span.b))])
    gx = (out @ weight).clone()
    for i, (a, b, A, B, p) in enumerate(spans):
        torch.manual_seed(i)
        part = x.flatten(0, 1)[a:b].detach().requires_grad_()
        alone = low_rank_linear(part, weight, None, A, B, 1.3, p)
        expected[a:b] = alone.detach()
        ours = torch.autograd.grad((alone * out[a:b]).sum(), (part, A, B))
        gx[a:b] = ours[0]
        assert all(torch.equal(one, other) for one, other in zip(ours[1:], grads[1 + 2 * i : 3 + 2 * i], strict=True))
    torch.testing.assert_close(y.flatten(0, 1), expected)
    torch.testing.assert_close(grads[0].flatten(0, 1), gx)


def test_spans_keep_x_once_and_thin_products() -> None:
    x, weight, spans = spans_case()
    given = [Span(a, b, A, B, 1.3, p) for a, b, A, B, p in spans]
    held = {t.untyped_storage().data_ptr() for t in (weight, *(f for span in given for f in (span.a, span.b)))}
    kept = saved_bytes(lambda: low_rank_spans(x, weight, None, given), held)
    assert sorted(kept.values()) == sorted([8 * 960, 8 * (40 * 2 + 40 * 5 + 30 * 3), 8, 8])  # x, products, two seeds


def test_spans_may_overlap_and_need_no_gradient() -> None:
    x, weight, ((_, _, a, b, _), (_, _, c, d, _), _) = spans_case()
    c = c.detach()
    run = lambda x, a, b, d: low_rank_spans(x, weight, None, [Span(0, 9, a, b, 0.3), Span(4, 12, c, d, 0.5)])  # noqa: E731
    few = x[:, :8].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (few, a, b, d))
    tensors = [few.detach().flatten(0, 1), weight, None, [a.detach(), c], [b.detach(), d.detach()]]
    rest = ([0, 9, 4, 12], [0.3, 0.5], [0.0, 0.5], [None, torch.tensor(3)])
    torch.library.opcheck(torch.ops.adapterlab.low_rank_spans.default, (*tensors, *rest))


def test_a_gradient_that_is_not_contiguous() -> None:
    (x, a, b), weight, _ = case((4, 3), False, False, True)
    grads = [
        torch.autograd.grad(f(x, weight, None, a, b, 1.0).transpose(0, 1).reshape(-1)[::2].sum(), (x, a, b))
        for f in (plain, low_rank_linear)
    ]
    assert all(torch.allclose(p, q) for p, q in zip(*grads, strict=True))
    expanded = torch.autograd.grad(low_rank_linear(x, weight, None, a, b, 1.0).sum(), (x, a, b))
    assert all(
        torch.allclose(p, q)
        for p, q in zip(expanded, torch.autograd.grad(plain(x, weight, None, a, b, 1.0).sum(), (x, a, b)), strict=True)
    )


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needs: tuple[bool, ...]) -> None:
    leaves, weight, _ = case((4,), False, False, True)
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    x, a, b = leaves
    low_rank_linear(x, weight, None, a, b, 1.0).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_half_precision_input_with_float32_factors() -> None:
    x: Any = torch.randn(6, 16).bfloat16().requires_grad_()
    weight, a, b = torch.randn(8, 16).bfloat16(), torch.randn(2, 16), torch.randn(8, 2)
    a.requires_grad_()
    b.requires_grad_()
    y = low_rank_linear(x, weight, None, a, b, 0.5)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert [t.grad.dtype for t in (x, a, b) if t.grad is not None] == [torch.bfloat16, torch.float32, torch.float32]
    exact = plain(x.detach().double(), weight.double(), None, a.detach().double(), b.detach().double(), 0.5)
    assert (y.double() - exact).abs().max() < 0.03 * exact.abs().max()


def saved_bytes(run: Any, skip: set[int]) -> dict[int, int]:
    """Bytes kept for the backward pass by storage, without those of given tensors (parameters)."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        holder = run()
    assert holder is not None  # alive until here, so that no address is used twice
    return kept


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_linear_layer_keeps_its_input_and_the_thin_product_only(
    family: str, dtype: torch.dtype, dropout: float, tiny: Any
) -> None:
    model = tiny(family).to(dtype).train()
    host = al.attach(model, al.LoRA(r=4, targets=["up"], dropout=dropout))
    site = host.sites(al.Targets(include=["up"]))[0]
    x = torch.randn(10, 32, dtype=dtype, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = saved_bytes(lambda: site.module(x), parameters)
    size = dtype.itemsize
    assert sorted(kept.values()) == sorted([10 * 32 * size, 10 * 4 * size] + [8] * bool(dropout))  # the seed
    assert x.untyped_storage().data_ptr() in kept  # the input itself, not a copy


def test_without_training_a_the_input_is_not_kept(tiny: Any) -> None:
    model = tiny("llama").train()
    host = al.attach(model, method("lora_fa", r=4, targets=["up"], dropout=0.5))
    site = host.sites(al.Targets(include=["up"]))[0]
    x = torch.randn(10, 32, requires_grad=True)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert sorted(saved_bytes(lambda: site.module(x), held).values()) == [8, 10 * 4 * 4]


def packed_layer(kind: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).to(dtype)
    if kind == "torchao":
        pytest.importorskip("torchao.quantization").quantize_(model, torchao_config())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return nn.Sequential(packed(model[0], "int8"))  # type: ignore[arg-type]
    made = bnb.nn.Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4")
    made.bias = model[0].bias
    made.support_avx512bf16_for_cpu = False
    return nn.Sequential(made.to("cpu"))


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute base and adapter one after the other from now on."""
    for module in (fusion, dora):
        monkeypatch.setattr(module, "may_fuse", lambda adapter, x: False)


def torchao_config() -> Any:
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
@pytest.mark.parametrize("id", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(
    kind: str, id: str, dtype: torch.dtype, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_layer(kind, dtype)
    host = al.attach(model, method(id, r=4, targets=["0"]))
    randomise(host)
    model.train()
    layer: Any = host.adapters("default")["0"]
    x = torch.randn(10, 128, dtype=dtype, requires_grad=True)
    assert may_fuse(layer, x)
    out = torch.randn(10, 64, dtype=dtype)
    fused = model(x)
    found = torch.autograd.grad((fused * out).sum(), (x, *host.parameters("default")))
    apart(monkeypatch)
    plain = model(x)
    wanted = torch.autograd.grad((plain * out).sum(), (x, *host.parameters("default")))
    close = 1e-5 if dtype == torch.float32 else 0.03
    for ours, theirs in zip((fused, *found), (plain, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= close * theirs.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
@pytest.mark.parametrize("id", ["lora", "dora"])
def test_an_unpacked_weight_is_not_kept(kind: str, id: str) -> None:
    model = packed_layer(kind, torch.float32)
    al.attach(model, method(id, r=4, targets=["0"]))
    model.train()
    x = torch.randn(10, 128, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x)
    assert kept
    assert not {(64, 128), (128, 64)} & set(kept)


def test_layers_that_round_their_input_are_left_to_themselves() -> None:
    model = packed_layer("int8", torch.float32)
    host = al.attach(model, al.LoRA(r=4, targets=["0"]))
    assert not may_fuse(host.adapters("default")["0"], torch.randn(3, 128))
    dynamic = nn.Sequential(nn.Linear(128, 64))
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(dynamic, ao.Int8DynamicActivationInt8WeightConfig())
    host = al.attach(dynamic, al.LoRA(r=4, targets=["0"]))
    assert not may_fuse(host.adapters("default")["0"], torch.randn(3, 128))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert-classes"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_fused_and_unfused_layers_agree(
    family: str, lora_bias: bool, tiny: Any, batch_for: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4, lora_bias=lora_bias))
    randomise(host, size=0.1)
    fused = model(**batch_for(model)).loss
    grads = torch.autograd.grad(fused, host.parameters("default"))
    apart(monkeypatch)
    unfused = model(**batch_for(model)).loss
    assert torch.allclose(fused, unfused, atol=1e-6)
    others = torch.autograd.grad(unfused, host.parameters("default"))
    assert all(torch.allclose(p, q, atol=1e-6, rtol=1e-4) for p, q in zip(grads, others, strict=True))


def test_autocast_is_left_to_torch(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=4))
    randomise(host, size=0.1)
    exact = model(**batch_for(model)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch_for(model)).loss
        loss.backward()
    assert torch.allclose(loss.float(), exact, rtol=0.02)
    assert {p.grad.dtype for p in host.parameters("default")} == {torch.float32}


def test_a_trained_base_bias_gets_its_gradient(tiny: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen2")
    host = al.attach(model, al.LoRA(r=4, targets=["q"], bias="lora_only"))
    model(**batch_for(model)).loss.backward()
    biases = {k: p for k, p in host.named_parameters("default").items() if k.startswith("base.")}
    assert len(biases) == 2
    found = [p.grad for p in biases.values()]
    apart(monkeypatch)
    wanted = torch.autograd.grad(model(**batch_for(model)).loss, list(biases.values()))
    assert all(g.abs().max() > 0 and torch.allclose(f, g, atol=1e-6) for f, g in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("id", "fields"), [("lora", {}), ("lora", {"dropout": 0.5}), ("lora", {"lora_bias": True}), ("dora", {})]
)
def test_one_graph(id: str, fields: dict[str, Any], randomise: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).train()
    host = al.attach(model, method(id, r=2, targets=["0", "1"], **fields))
    randomise(host)
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(4)
        results.append(torch.autograd.grad(run(x).square().sum(), host.parameters("default")))
    assert all((g - h).abs().max() <= 1e-5 * g.abs().max() for g, h in zip(*results, strict=True))


class Products(TorchDispatchMode):
    """Collects the names of weights at the right of a matrix product: as they are stored, [out, in], or transposed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if not p.requires_grad}
        self.straight: set[str] = set()
        self.transposed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        place = {aten.mm: 1, aten.addmm: 2, aten.bmm: 1, aten.mul: 0}.get(func.overloadpacket)  # weights are scaled too
        if place is not None and isinstance(args[place], Tensor) and args[place].data_ptr() in self.names:
            used = self.straight if args[place].is_contiguous() else self.transposed
            used.add(self.names[args[place].data_ptr()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("id", ["lora", "dora"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_backward_pass_ends_at_the_lowest_adapter(id: str, recomputed: bool, tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").train()
    host = al.attach(model, method(id, r=2, targets=al.Targets(include=["all-linear"], layers=[1])))
    host.recompute("full" if recomputed else "none")
    loss = model(**batch_for(model)).loss
    with Products(model) as seen:
        loss.backward()
    assert any(".1." in name for name in seen.straight)
    assert not any(".0." in name for name in seen.straight | seen.transposed)
    inputs = {f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "qkv"}
    assert not inputs & seen.straight  # nothing below asks for the gradient of their input
    assert "model.layers.1.mlp.up_proj.weight" in seen.straight


def test_an_adapter_on_the_first_query_asks_for_no_gradient_of_its_input(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2, targets=al.Targets(include=["q"], layers=[0])))
    loss = model(**batch_for(model)).loss
    with Products(model) as seen:
        loss.backward()
    assert all(p.grad is not None for p in host.parameters("default"))
    here = {name.rpartition("self_attn.")[2] for name in seen.straight if ".0.self_attn" in name}
    assert here == {"o_proj.weight"}
