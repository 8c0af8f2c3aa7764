"""Weighted experts and scales against plain autograd, and what they keep for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_low_rank import saved_bytes
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.methods.mixture.molora import MoLoRA
from adapterlab.ops.experts import scores, weighted_low_rank, weighted_scales

EXPERTS, RANK, IN, OUT = 3, 2, 5, 4


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, *base: Any) -> Tensor:
    """One expert after the other."""
    y = F.linear(x, *base) if base else 0
    return y + scale * sum(w[..., e, None] * (x @ a[e].T @ b[e].T) for e in range(len(a)))


def leaves(shape: tuple[int, ...]) -> list[Tensor]:
    found = [
        normal(*shape, IN, seed=1),
        normal(*shape, EXPERTS, seed=2),
        normal(EXPERTS, RANK, IN, seed=3),
        normal(EXPERTS, OUT, RANK, seed=4),
    ]
    return [leaf.requires_grad_() for leaf in found]


BASES: dict[str, tuple[Tensor, ...]] = {
    "none": (),
    "plain": (normal(OUT, IN, seed=5), normal(OUT, seed=6)),
    "transposed": (normal(IN, OUT, seed=5).T,),
}


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("base", BASES)
def test_value_and_gradients(shape: tuple[int, ...], base: str) -> None:
    given = leaves(shape)
    wanted, found = plain(*given, 1.7, *BASES[base]), weighted_low_rank(*given, 1.7, 0.0, *BASES[base])
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted)
    out = torch.randn_like(wanted)
    grads = [torch.autograd.grad((y * out).sum(), given) for y in (wanted, found)]
    assert all(torch.allclose(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("base", ["none", "plain"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(p: float, base: str, packed: bool) -> None:
    again = (lambda: BASES["plain"][0].clone()) if packed and base == "plain" else None
    shift = normal(OUT, seed=6).requires_grad_()

    def run(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        weight, bias = (BASES[base][0], given[4]) if base == "plain" else (None, None)
        return weighted_low_rank(*given[:4], 0.3, p, weight, bias, again)

    assert torch.autograd.gradcheck(run, (*leaves((2, 3)), shift))


@pytest.mark.parametrize("left", range(4))
def test_only_the_gradients_that_are_needed(left: int) -> None:
    given = leaves((4,))
    wanted = torch.autograd.grad(plain(*given, 1.0).square().sum(), given)
    for i, leaf in enumerate(given):
        leaf.requires_grad_(i == left)
    weighted_low_rank(*given, 1.0).square().sum().backward()
    assert [leaf.grad is not None for leaf in given] == [i == left for i in range(4)]
    found = given[left].grad
    assert found is not None
    assert torch.allclose(found, wanted[left])


def test_the_operator_says_what_it_returns() -> None:
    x, w, a, b = (leaf.detach() for leaf in leaves((4,)))
    for seed, base in ((None, BASES["plain"]), (torch.tensor(3), (None, None))):
        given = (x, w, a, b, *base, 0.5, 0.5 if seed is not None else 0.0, seed)
        torch.library.opcheck(torch.ops.adapterlab.weighted_low_rank.default, given)


def test_scores_are_those_of_float32() -> None:
    x, router = torch.randn(2, 6, 16).bfloat16().requires_grad_(), torch.randn(3, 16, requires_grad=True)
    z = scores(x, router)
    assert torch.equal(z, x.float() @ router.T)
    gx, grouter = torch.autograd.grad(z.square().sum(), (x, router))
    exact = x.detach().float().requires_grad_()
    wanted = torch.autograd.grad((exact @ router.T).square().sum(), (exact, router))
    assert (gx.dtype, grouter.dtype) == (torch.bfloat16, torch.float32)
    for found, right in zip((gx.float(), grouter), wanted, strict=True):
        assert (found - right).abs().max() < 0.02 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_layer_keeps_its_input_the_thin_product_and_the_weights(dtype: torch.dtype, top_k: int, tiny: Any) -> None:
    model = tiny("llama").to(dtype).train()
    host = al.attach(model, MoLoRA(experts=5, r=4, top_k=top_k, dropout=0.1, targets=["up"]))
    site = host.sites(al.Targets(include=["up"]))[0]
    x = torch.randn(10, 32, dtype=dtype, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = saved_bytes(lambda: site.module(x), parameters)
    weights = [10 * 5 * 4] if top_k is None else [10 * 5 * 4, 10 * 5 * 4, 10 * 5]  # p, what is left of it, and which
    assert sorted(kept.values()) == sorted([10 * 32 * dtype.itemsize, 10 * 20 * dtype.itemsize, 8, *weights])
    assert x.untyped_storage().data_ptr() in kept  # the input itself, not a copy


def test_half_precision_input_with_float32_experts(tiny: Any, randomise: Any) -> None:
    x, w, a, b = (leaf.detach().float() for leaf in leaves((6,)))
    low = x.bfloat16().requires_grad_()
    given = [low, *(leaf.requires_grad_() for leaf in (w, a, b))]
    y = weighted_low_rank(*given, 0.5)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), given)
    exact = [leaf.detach().double().requires_grad_() for leaf in given]
    wanted = torch.autograd.grad(plain(*exact, 0.5).square().sum(), exact)
    assert [g.dtype for g in found] == [torch.bfloat16, *[torch.float32] * 3]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() < 0.05 * other.abs().max()


@pytest.mark.parametrize("base", ["fused", "apart", "autocast"])
def test_the_layer_is_the_same_with_the_base_and_apart(
    base: str, tiny: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen2").train()
    host = al.attach(model, MoLoRA(experts=3, r=2, targets=["q"]))
    randomise(host)
    layer: Any = host.adapters("default")["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 5, 32, requires_grad=True)
    site, p = layer.site, torch.softmax(x @ layer.router.T, -1)
    wanted = plain(x, p, layer.A, layer.B, layer.scale, site.module.weight, site.module.bias)
    if base == "apart":
        monkeypatch.setattr("adapterlab.engine.fusion.may_fuse", lambda adapter, x: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=base == "autocast"):
        found = site.module(x)
    trained = [x, *host.parameters("default")[:3]]
    grads = [torch.autograd.grad(y.float().square().sum(), trained) for y in (wanted, found)]
    close = 0.05 if base == "autocast" else 1e-5
    for right, ours in zip((wanted, *grads[0]), (found.float(), *grads[1]), strict=True):
        assert (right - ours).abs().max() <= close * right.abs().max()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("heads", [1, 2])
def test_scales(shape: tuple[int, ...], heads: int) -> None:
    u, scales = normal(*shape, heads, 4, seed=1), 1 + normal(EXPERTS, heads, 4, seed=2)
    w = normal(*shape, heads, EXPERTS, seed=3).softmax(-1)
    given = tuple(t.requires_grad_() for t in (u, w, scales))
    assert torch.allclose(weighted_scales(*given), u * torch.einsum("...he,ehd->...hd", w, scales))
    assert torch.autograd.gradcheck(weighted_scales, given)


def test_scales_keep_no_mean() -> None:
    u, w, scales = torch.randn(7, 1, 16), torch.rand(7, 1, 3), torch.randn(3, 1, 16)
    leaves = [t.requires_grad_() for t in (u, w, scales)]
    kept = saved_bytes(lambda: weighted_scales(*leaves), set())
    assert sorted(kept.values()) == sorted(t.nbytes for t in leaves)
