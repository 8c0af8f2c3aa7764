"""The fused low-rank product against plain autograd, and what it keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.ops.low_rank import low_rank_linear


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
def test_gradcheck(transposed: bool) -> None:
    (x, a, b), weight, shift = case((2, 3), True, transposed, True)
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank_linear(x, weight, shift, a, b, 0.3), (x, a, b))


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
    low_rank_linear(leaves[0], weight, None, *leaves[1:], 1.0).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_half_precision_input_with_float32_factors() -> None:
    x = torch.randn(6, 16).bfloat16().requires_grad_()
    weight, a, b = torch.randn(8, 16).bfloat16(), torch.randn(2, 16), torch.randn(8, 2)
    a.requires_grad_()
    b.requires_grad_()
    y = low_rank_linear(x, weight, None, a, b, 0.5)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
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
def test_a_linear_layer_keeps_its_input_and_the_thin_product_only(family: str, dtype: torch.dtype, tiny: Any) -> None:
    model = tiny(family).to(dtype)
    host = al.attach(model, al.LoRA(r=4, targets=["up"]))
    site = host.sites(al.Targets(include=["up"]))[0]
    x = torch.randn(10, 32, dtype=dtype, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = saved_bytes(lambda: site.module(x), parameters)
    size = dtype.itemsize
    assert sorted(kept.values()) == sorted([10 * 32 * size, 10 * 4 * size])
    assert x.untyped_storage().data_ptr() in kept  # the input itself, not a copy


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert-classes"])
def test_fused_and_unfused_layers_agree(family: str, tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4))
    randomise(host, size=0.1)
    fused = model(**batch_for(model)).loss
    grads = torch.autograd.grad(fused, host.parameters("default"))
    for adapter in host.adapters("default").values():
        adapter.fuses = lambda x: False  # type: ignore[method-assign]
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


def test_a_trained_base_bias_gets_its_gradient(tiny: Any, batch_for: Any) -> None:
    model = tiny("qwen2")
    host = al.attach(model, al.LoRA(r=4, targets=["q"], bias="lora_only"))
    model(**batch_for(model)).loss.backward()
    biases = {k: p for k, p in host.named_parameters("default").items() if k.startswith("base.")}
    assert len(biases) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in biases.values())
