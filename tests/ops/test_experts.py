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
from adapterlab.ops.experts import mixture, routed_low_rank, scores, selection, weighted_scales

EXPERTS, RANK, IN, OUT = 3, 2, 5, 4


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FORMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "cut": {"top_k": 2},
    "renormalised": {"top_k": 2, "renormalised": True},
}


def plain(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, shift: Tensor, scale: float, *base: Any, **form: Any
) -> tuple[Tensor, Tensor]:
    """One expert after the other."""
    z = x @ router.T + shift
    w = mixture(z, selection(z, form.get("top_k")), form.get("renormalised", False))
    y = F.linear(x, *base) if base else 0
    return y + scale * sum(w[..., e, None] * (x @ a[e].T @ b[e].T) for e in range(len(a))), z


def leaves(shape: tuple[int, ...]) -> list[Tensor]:
    sizes = [(*shape, IN), (EXPERTS, RANK, IN), (EXPERTS, OUT, RANK), (EXPERTS, IN), (EXPERTS,)]
    return [normal(*size, seed=i + 1).requires_grad_() for i, size in enumerate(sizes)]


def loss(y: Tensor, z: Tensor) -> Tensor:
    """One that asks for the scores as well."""
    return y.sin().sum() + z.square().sum()


BASES: dict[str, tuple[Tensor, ...]] = {
    "none": (),
    "plain": (normal(OUT, IN, seed=5), normal(OUT, seed=6)),
    "transposed": (normal(IN, OUT, seed=5).T,),
}


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients(shape: tuple[int, ...], base: str, form: str) -> None:
    given = leaves(shape)
    more = dict(zip(("weight", "bias"), BASES[base], strict=False))
    wanted = plain(*given, 1.7, *BASES[base], **FORMS[form])
    found = routed_low_rank(*given, scale=1.7, **more, **FORMS[form])
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other)
    grads = [torch.autograd.grad(loss(*result), given) for result in (wanted, found)]
    assert all(torch.allclose(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("base", ["none", "plain"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(p: float, base: str, packed: bool) -> None:
    again = (lambda: BASES["plain"][0].clone()) if packed and base == "plain" else None
    shift = normal(OUT, seed=6).requires_grad_()

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        more = {"weight": BASES[base][0], "bias": given[5], "again": again} if base == "plain" else {}
        return routed_low_rank(*given[:5], scale=0.3, p=p, **more)

    assert torch.autograd.gradcheck(run, (*leaves((2, 3)), shift))


@pytest.mark.parametrize("left", range(5))
def test_only_the_gradients_that_are_needed(left: int) -> None:
    given = leaves((4,))
    wanted = torch.autograd.grad(loss(*plain(*given, 1.0)), given)
    for i, leaf in enumerate(given):
        leaf.requires_grad_(i == left)
    loss(*routed_low_rank(*given)).backward()
    assert [leaf.grad is not None for leaf in given] == [i == left for i in range(5)]
    found = given[left].grad
    assert found is not None
    assert torch.allclose(found, wanted[left])


def test_the_operator_says_what_it_returns() -> None:
    given = [leaf.detach() for leaf in leaves((4,))]
    low = (given[0].bfloat16(), *(t.float() for t in given[1:]), None, None)
    for tensors, dtype, seed in (
        ((*given, normal(OUT), normal(OUT, IN)), torch.float64, None),
        (low, torch.bfloat16, torch.tensor(3)),
    ):
        form = (dtype, 0.5, 2, True, 0.5 if seed is not None else 0.0, seed)
        torch.library.opcheck(torch.ops.adapterlab.routed_low_rank.default, (*tensors, *form))


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
    sizes = [10 * 32 * dtype.itemsize, 10 * 20 * dtype.itemsize, 10 * 5 * 4, 8]  # x, x Aᵀ, the weights, the seed
    assert sorted(kept.values()) == sorted(sizes if top_k is None else [*sizes, 10 * 5 * 4])  # and the scores
    assert x.untyped_storage().data_ptr() in kept  # the input itself, not a copy


def test_half_precision_input_with_float32_experts() -> None:
    x, *rest = (leaf.detach().float() for leaf in leaves((6,)))
    given = [x.bfloat16().requires_grad_(), *(leaf.requires_grad_() for leaf in rest)]
    y, z = routed_low_rank(*given, scale=0.5)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    found = torch.autograd.grad(loss(y.float(), z), given)
    exact = [leaf.detach().double().requires_grad_() for leaf in given]
    wanted = torch.autograd.grad(loss(*plain(*exact, 0.5)), exact)
    assert [g.dtype for g in found] == [torch.bfloat16, *[torch.float32] * 4]
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
    site = layer.site
    given = (x, layer.A, layer.B, layer.router, torch.zeros(3), layer.scale)
    wanted, _ = plain(*given, site.module.weight, site.module.bias)
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
