"""Recomputation and offloading: gradients as without them for every kind of method, and what is kept."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import adapterlab as al
from adapterlab.engine.recompute import Offload, _contexts, is_product, offloading
from adapterlab.errors import ConfigError
from adapterlab.ops.operator import operator
from adapterlab.registry import method
from adapterlab.testing import models
from adapterlab.train import Training
from adapterlab.train.loop import train

MODES = ("cheap", "full")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.3},
    "dora": {"dropout": 0.3},
    "ia3": {},
    "adapter_houlsby": {},
    "adapter_pfeiffer": {},
    "adapter_parallel": {},
    "prefix_tuning": {},
    "prompt_tuning": {},
    "molora": {},
    "bitfit": {"bias_mode": "add"},
    "full": {},
    "loha": {},
    "lst": {},
    "mam_adapter": {},
    "lora_dropout": {},
    "hra": {},
}


def _perturb(host: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in host.tensors("default").values():
            if value.is_floating_point():
                value.add_((torch.randn(value.shape, generator=draw) * 0.2).to(value.dtype))


def _gradients(host: Any, mode: str, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with auxiliary ones over two forward passes, and the gradients of everything that trains."""
    model = host.model.train()
    host.recompute(mode)
    batches = [models.batch(model), models.batch(model, rows=3, length=7, seed=4)]
    torch.manual_seed(seed)
    with host.state.collect() as extra:
        loss = sum(model(**batch).loss for batch in batches)
        loss = loss + sum(extra)
    loss.backward()
    found = {key: p.grad.clone() for key, p in host.named_parameters("default").items() if p.grad is not None}
    model.zero_grad()
    host.recompute("none")
    return loss.detach(), found


def _same(host: Any, mode: str) -> None:
    loss, wanted = _gradients(host, "none")
    other, found = _gradients(host, mode)
    torch.testing.assert_close(other, loss)
    assert wanted
    assert wanted.keys() == found.keys()
    assert any(bool(value.any()) for value in wanted.values())
    for key, value in wanted.items():
        error, size = float((found[key] - value).norm()), float(value.norm())
        assert error <= 1e-4 * size, f"{key}: {error} of {size}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_a_plain_pass(name: str, mode: str) -> None:
    host = al.attach(models.tiny("llama"), method(name)(**METHODS[name]))
    _perturb(host)
    _same(host, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "dora", "adapter_pfeiffer"])
def test_gradients_on_narrow_and_packed_bases(name: str, precision: str, mode: str) -> None:
    host = al.attach(models.tiny("llama", precision), method(name)(**METHODS[name]))
    _perturb(host)
    _same(host, mode)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert_tokens", "mixtral", "vit", "qwen2"])
def test_gradients_in_other_families(family: str) -> None:
    model = models.tiny(family)
    if family != "mixtral":  # whose grouped product knows no float64
        model.double()  # tiny random models multiply what rounding leaves
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    host = al.attach(model, al.LoRA(r=2, dropout=0.2))
    _perturb(host)
    _same(host, "cheap")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_inside_attention_draws_the_same_numbers(implementation: str) -> None:
    model = models.tiny("llama")
    model.config._attn_implementation = implementation
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.4
    host = al.attach(model, al.LoRA(r=2, dropout=0.4))
    _perturb(host)
    _same(host, "cheap")
    assert not torch.equal(_gradients(host, "cheap", seed=1)[0], _gradients(host, "cheap", seed=2)[0])


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def _products(mode: str) -> tuple[int, int]:
    """Products and activation functions computed in one step."""
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    host.recompute(mode)
    loss = model(**models.batch(model)).loss
    with _Count() as count:  # inside the block's own modes: it sees what is really computed
        loss.backward()
    dear = sum(n for name, n in count.calls.items() if name.rpartition("::")[2] in ("mm", "addmm", "bmm"))
    dear += sum(n for name, n in count.calls.items() if name.startswith("adapterlab::") and "backward" not in name)
    return dear, count.calls["aten::silu"]


def test_cheap_computes_no_product_again() -> None:
    plain, cheap, full = (_products(mode) for mode in ("none", "cheap", "full"))
    assert plain[1] == 0
    assert cheap[1] == full[1] == 2  # once a block
    assert cheap[0] == plain[0]
    assert full[0] > plain[0]


def _kept(mode: str) -> int:
    """Bytes that are alive between forward and backward pass."""
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    host.recompute(mode)
    batch = models.batch(model, rows=4, length=48)
    seen: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    seen[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, lambda: None)
                    live.append(torch.multiprocessing.reductions.StorageWeakRef(storage))
            return out

    live: list[Any] = []
    with Watch():
        loss = model(**batch).loss
    gc.collect()
    total = sum(seen[memory] for memory in {ref.cdata for ref in live if not ref.expired()})
    loss.backward()
    return total


def test_cheap_keeps_less_than_none_and_more_than_full() -> None:
    none, cheap, full = (_kept(mode) for mode in ("none", "cheap", "full"))
    assert full < cheap < 0.75 * none


def test_nothing_lives_on_after_the_backward_pass() -> None:
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    host.recompute("cheap")
    gc.collect()
    gc.disable()
    try:
        held: list[Any] = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *found: held.append(weakref.ref(found[2])))
        model(**models.batch(model)).loss.backward()
        hook.remove()
        assert held
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


# ---------------------------------------------------------------------- code that writes in place


def _once(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Gradients of a function in a region of which only products are kept."""
    host = al.attach(models.tiny("llama-1"), al.LoRA(r=2))
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    out = checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: _contexts(host))
    out.mul_(3.0)
    out.sin().sum().backward()
    return [value.grad for value in inputs]


def _plainly(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    out = function(*inputs)
    out.mul_(3.0)
    out.sin().sum().backward()
    return [value.grad for value in inputs]


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        y.addmm_(y.detach().clone(), w)
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w, y = ctx.saved_tensors
        return grad * y.sum() @ w.T, x.T @ (grad * y)


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "changed after the product": lambda x, w: (x @ w).add_(x.sin()).cos(),
    "changed twice": lambda x, w: (x @ w).add_(1.0).mul_(2.0).exp().tanh().cos(),
    "changed through a view": lambda x, w: _through_view(x @ w),
    "changed behind a product of three dimensions": lambda x, w: (x[None] @ w).add_(x.cos()).relu_()[0].sin(),
    "changed inside one node": lambda x, w: _InPlace.apply(x.sin(), w).cos(),
    "returned as it is and changed outside": lambda x, w: x.sin() @ w,
    "of three dimensions, returned and changed outside": lambda x, w: x.sin()[None] @ w,
    "linear with a bias, changed": lambda x, w: (
        nn.functional.linear(x[None, None], w, x[0].sin()).mul_(2.0).tanh().cos()
    ),
}


def _through_view(y: Tensor) -> Tensor:
    y[:, 1:].mul_(3.0)
    return y.sin()


@pytest.mark.parametrize("case", CASES)
def test_results_that_are_changed_in_place_are_computed_again(case: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    for found, wanted in zip(_once(CASES[case], x, w), _plainly(CASES[case], x, w), strict=True):
        assert torch.equal(found, wanted)


def test_two_backward_passes_through_one_graph() -> None:
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    _perturb(host)
    host.recompute("cheap")
    loss = model(**models.batch(model)).loss
    first = torch.autograd.grad(loss, host.parameters("default"), retain_graph=True)
    second = torch.autograd.grad(loss, host.parameters("default"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_of_the_package_are_products_and_in_place_ones_are_not() -> None:
    calls: list[int] = []

    @operator("double_for_test(Tensor x) -> Tensor", lambda x: torch.empty_like(x))
    def double_for_test(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    x, w = torch.randn(3, 3), torch.eye(3)
    assert is_product(torch.ops.adapterlab.double_for_test.default)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return double_for_test(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    _once(lambda x, w: Double.apply(x.sin()).cos().exp() @ w, x, w)
    assert len(calls) == 1
    aten = torch.ops.aten
    assert all(map(is_product, (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.convolution.default)))
    assert not any(map(is_product, (aten.addmm_.default, aten.mul.Tensor, aten.mm.out, aten.t.default)))


# ---------------------------------------------------------------------- the choice


def test_unknown_modes_and_models_without_blocks_are_refused() -> None:
    host = al.attach(models.tiny("llama"), al.LoRA(r=2))
    with pytest.raises(ConfigError, match=r"none, cheap, full; received 'chaep'\. .*cheap"):
        host.recompute("chaep")
    plain = al.attach(nn.Sequential(nn.Linear(3, 3)), al.LoRA(r=2, targets=["0"]))
    plain.recompute("none")
    with pytest.raises(ConfigError, match=r"Sequential has no blocks .*recompute to none"):
        plain.recompute("cheap")


def test_cheap_works_in_compiled_models() -> None:
    host = al.attach(models.tiny("llama-1"), al.LoRA(r=2))
    _perturb(host)
    batch = models.batch(host.model)
    host.model.train()
    host.model(**batch).loss.backward()
    wanted = {key: p.grad.clone() for key, p in host.named_parameters("default").items()}
    host.model.zero_grad()
    host.recompute("cheap", compiled=True)
    torch.compiler.reset()
    try:
        torch.compile(host.model, backend="aot_eager")(**batch).loss.backward()
    finally:
        torch.compiler.reset()
    for key, p in host.named_parameters("default").items():
        torch.testing.assert_close(p.grad, wanted[key], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- offloading


def test_offloading_moves_activations_only() -> None:
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    _perturb(host)
    batch = models.batch(model, rows=4, length=32)

    def gradients(context: Any) -> list[Tensor]:
        with context:
            loss = model(**batch).loss
        found = torch.autograd.grad(loss, host.parameters("default"))
        return list(found)

    asked: list[Tensor] = []
    offload = Offload(model, least=4096, moves=lambda tensor: asked.append(tensor) or True)
    moved: list[Any] = []
    pack = offload._pack

    def spy(tensor: Tensor) -> Any:
        result = pack(tensor)
        moved.append((tensor.untyped_storage().data_ptr(), tensor.nbytes, result is tensor, result))
        return result

    torch.autograd.graph.saved_tensors_hooks.__init__(offload, spy, offload._unpack)
    plain, away = gradients(torch.enable_grad()), gradients(offload)
    assert all(torch.equal(a, b) for a, b in zip(plain, away, strict=True))
    fixed = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert any(not stays for _, _, stays, _ in moved)
    assert any(at in fixed and size >= 4096 for at, size, _, _ in moved), "a large weight was looked at"
    assert all(stays for at, size, stays, _ in moved if at in fixed or size < 4096)
    assert all(tensor.nbytes >= 4096 for tensor in asked)
    copies = [id(result) for _, _, stays, result in moved if not stays]
    assert len(set(copies)) < len(copies), "the input of q, k and v is moved once"


def test_offloading_together_with_recomputation() -> None:
    for mode in MODES:
        model = models.tiny("llama").train()
        host = al.attach(model, al.LoRA(r=2))
        _perturb(host)
        wanted = _gradients(host, mode)[1]
        host.recompute(mode)
        count: list[Tensor] = []
        batches = [models.batch(model), models.batch(model, rows=3, length=7, seed=4)]
        torch.manual_seed(3)
        with Offload(model, least=0, moves=lambda tensor, count=count: count.append(tensor) or True):
            loss = sum(model(**batch).loss for batch in batches)
        loss.backward()
        assert count
        for key, p in host.named_parameters("default").items():
            torch.testing.assert_close(p.grad, wanted[key])


def test_values_that_changed_in_between_are_moved_anew() -> None:
    model = nn.Linear(2, 2)
    x = torch.randn(64, requires_grad=True)
    y = x.exp()
    with Offload(model, least=0, moves=lambda tensor: True):
        buffer = torch.ones(64)
        first = y * buffer
        buffer.mul_(2.0)
        second = y * buffer
    (first + second).sum().backward()
    assert torch.allclose(x.grad, 3 * x.detach().exp())


def test_offloading_on_the_cpu_is_refused(rows: Any) -> None:
    host = al.attach(models.tiny("llama"), al.LoRA(r=2))
    with pytest.raises(ConfigError, match=r"nothing to offload to\. Set offload to false"):
        train(host, "default", rows, Training(steps=1, offload=True))
    with offloading(host.model, wanted=False):
        pass
