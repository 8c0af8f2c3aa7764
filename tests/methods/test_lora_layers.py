"""LoRA's kinds of layers: convolutions of every sort, and fused modules with factors for each block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, TargetError


def randomise(host: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in host.parameters("default"):
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 9, 7)),
    "same": (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 9, 7)),
    "dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, bias=False), (2, 6, 9, 9)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "reflect": (lambda: nn.Conv1d(6, 8, 5, padding=2, padding_mode="reflect"), (2, 6, 9)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (1, 2, 4, 4, 4)),
    "one row": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 5)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_computes_with_its_kernel_changed(case: str) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[case]
    conv, x = make(), torch.randn(shape)
    changed = copy.deepcopy(conv)
    base = conv(x)
    model = nn.Sequential(conv)
    host = al.attach(model, al.LoRA(r=3, alpha=5, targets=["0"]))
    assert torch.equal(model(x), base)
    randomise(host)
    layer: Any = host.adapters("default")["0"]
    out, in_ = conv.weight.shape[0], conv.weight[0].numel()
    assert host.summary().trainable == 3 * (out + in_)
    with torch.no_grad():
        changed.weight += (5 / 3 * layer.B @ layer.A).view_as(conv.weight)
    live = model(x)
    assert torch.allclose(live, changed(x), atol=1e-4)
    assert (live - base).abs().max() > 1e-2
    wanted = torch.autograd.grad(live.square().sum(), [layer.A, layer.B])
    a, b = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    weight = (
        changed.weight.detach() - (5 / 3 * b @ a).detach().view_as(conv.weight) + (5 / 3 * b @ a).view_as(conv.weight)
    )
    found = torch.autograd.grad(changed._conv_forward(x, weight, changed.bias).square().sum(), [a, b])
    for ours, plain in zip(wanted, found, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)
    host.merge()
    assert torch.allclose(model(x), live, atol=1e-4)
    host.restore()
    with host.using():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_a_convolution_gives_up_directions_too(init: str) -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    x, weight = torch.randn(2, 6, 5, 5), conv.weight.detach().clone()
    base = conv(x)
    model = nn.Sequential(conv)
    host = al.attach(model, al.LoRA(r=3, targets=["0"], init=init))
    assert torch.allclose(model(x), base, atol=1e-5)
    assert not torch.equal(conv.weight, weight)
    host.detach("default")
    assert torch.equal(conv.weight, weight)


def test_a_bias_of_b_works_and_groups_have_none() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 5, 5)
    base = model(x)
    host = al.attach(model, al.LoRA(r=2, alpha=6, targets=["0"], lora_bias=True))
    layer: Any = host.adapters("default")["0"]
    with torch.no_grad():
        layer.bias.copy_(torch.arange(6.0))
    assert torch.allclose(model(x) - base, 3 * torch.arange(6.0).view(1, 6, 1, 1).expand_as(base), atol=1e-5)
    with pytest.raises(AttachError, match="groups"):
        al.attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), al.LoRA(targets=["0"], lora_bias=True))


def test_rows_of_a_batch_have_their_own_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    host = al.attach(model, al.LoRA(r=2, targets=["0"]))
    randomise(host)
    x = torch.randn(3, 4, 5, 5)
    live = model(x)
    with host.using():
        base = model(x)
    with host.rows(["default", None, "default"]):
        mixed = model(x)
    assert torch.allclose(mixed, torch.stack([live[0], base[1], live[2]]), atol=1e-5)


# ---------------------------------------------------------------------- fused modules

BLOCKS, R = (8, 4, 4), 3  # as under grouped-query attention: query rows, key rows, value rows


def fused(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 10))
    return model, *_attached(model, al.LoRA(r=R, alpha=7, targets=["0"], **options))


def _attached(model: Any, method: Any) -> tuple[Any, Any]:
    host = al.attach(model, method)
    randomise(host)
    return host, host.adapters("default")["0"]


@pytest.mark.parametrize("enable", [(), (True, False, True), (False, False, True), (True, True, True)])
def test_each_block_has_factors_of_its_own(enable: tuple[bool, ...]) -> None:
    model, host, layer = fused(blocks=BLOCKS, enable=enable)
    on = enable or (True,) * 3
    rows = sum(size for size, yes in zip(BLOCKS, on, strict=True) if yes)
    assert host.summary().trainable == R * (sum(on) * 10 + rows)
    x = torch.randn(5, 10)
    with host.using():
        base = model[0](x)
    pieces, a, b = (
        [],
        list(layer.A.split(R)),
        list(layer.B.split([size for size, yes in zip(BLOCKS, on, strict=True) if yes])),
    )
    for size, yes in zip(BLOCKS, on, strict=True):
        pieces.append(x @ (7 / R * b.pop(0) @ a.pop(0)).T if yes else torch.zeros(5, size))
    assert torch.allclose(model[0](x), base + torch.cat(pieces, -1), atol=1e-5)
    live = model(x)
    host.merge()
    assert torch.allclose(model(x), live, atol=1e-5)


def test_equal_blocks_are_those_of_loralib() -> None:
    """loralib computes the update as a grouped convolution with kernels of size one."""
    _, _, layer = fused(blocks=(4, 4, 4, 4), enable=(True, False, False, True))
    grouped: Tensor = F.conv1d(layer.A[None], layer.B[:, :, None], groups=2)[0]
    wanted = torch.zeros(16, 10)
    wanted[:4], wanted[12:] = grouped[:4], grouped[4:]
    assert torch.allclose(layer.delta(), 7 / R * wanted, atol=1e-6)


def test_the_start_is_the_base_and_training_leaves_other_blocks() -> None:
    model = nn.Sequential(nn.Linear(10, 16))
    x = torch.randn(6, 10)
    base = model(x)
    host = al.attach(model, al.LoRA(r=R, targets=["0"], blocks=BLOCKS, enable=(True, False, True)))
    assert torch.equal(model(x), base)
    optimizer = torch.optim.SGD(host.parameters("default"), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    now = model(x)
    assert torch.equal(now[:, 8:12], base[:, 8:12])
    assert (now[:, :8] - base[:, :8]).abs().max() > 1e-3
    assert (now[:, 12:] - base[:, 12:]).abs().max() > 1e-3


def test_it_is_saved_as_it_is(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2, targets=["qkv", "o"], blocks=(32, 32, 32), enable=(True, False, True)))
    randomise(host)
    live = logits(model, batch)
    host.save(tmp_path / "a")
    again = al.load(tiny("gpt2"), tmp_path / "a")
    saved = host.state_dict("default")
    assert all(torch.equal(v, saved[k]) for k, v in again.state_dict("default").items())
    assert torch.equal(logits(again.model, batch), live)


def test_blocks_that_fit_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 16))
    with pytest.raises(TargetError, match=r"make 18 rows.*\[16\]"):
        al.attach(model, al.LoRA(targets=["0"], blocks=(8, 6, 4)))
    with pytest.raises(ConfigError, match="enable"):
        al.LoRA(blocks=(8, 8), enable=(True,))
    with pytest.raises(ConfigError, match="kaiming"):
        al.LoRA(blocks=(8, 8), init="pissa")
    with pytest.raises(ConfigError, match="blocks"):
        al.DoRA(blocks=(8, 8))


# ---------------------------------------------------------------------- choosing the start


def test_the_start_is_chosen_by_name() -> None:
    assert al.LoRA(init="gaussian").init.name == "gaussian"
    method = al.LoRA(init={"name": "pissa", "niter": 3})
    assert method.model_dump(mode="json")["init"] == {"name": "pissa", "niter": 3}
    assert al.LoRA(**method.model_dump(mode="json")) == method
    assert al.LoRA().model_dump(mode="json")["init"] == "kaiming"
    for value, said in (("pisa", "Nearest: pissa"), (3, "name such as 'pissa'"),
                        ({"name": "pissa", "niters": 3}, "niter"), ({"name": "eva", "rho": 0.5}, "rho")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            al.LoRA(init=value)
    with pytest.raises(ConfigError, match="dora"):
        al.DoRA(init="pissa")


def test_half_precision_is_decomposed_in_full(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama").to(torch.bfloat16)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    host = al.attach(model, al.LoRA(r=4, alpha=4, init="pissa"))
    for path, layer in host.adapters("default").items():
        assert layer.A.dtype is torch.float32
        s = torch.linalg.svdvals(weights[f"{path}.weight"].float())
        assert torch.allclose(torch.linalg.svdvals(layer.delta())[:4], s[:4], rtol=1e-4)
        assert layer.site.module.weight.dtype is torch.bfloat16
    host.detach("default")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_a_replaced_base_survives_copies_and_switching(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("qwen2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRA(r=4, init="pissa"), "default")
    randomise(host)
    live = logits(model, batch)
    other = copy.deepcopy(model)
    al.host(other).detach("default")
    assert torch.equal(logits(other, batch), base)
    assert torch.equal(logits(model, batch), live)
    for _ in range(2):
        with host.using():
            assert torch.equal(logits(model, batch), base)
        assert torch.equal(logits(model, batch), live)
    host.activate()
    host.attach(al.LoRA(r=2, init="olora"), "second")
    host.activate("default")
    assert torch.equal(logits(model, batch), live)
    assert not any(key.startswith("base.") for key in host.tensors("default"))
