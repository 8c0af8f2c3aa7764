"""bitsandbytes lays 4-bit weights out anew for CPU inference; attaching puts them back, so that training is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError
from adapterlab.foreign import quantized
from adapterlab.foreign.quantized import dense, keep_layout, misread
from adapterlab.testing import models
from adapterlab.testing.models import packed

bnb = pytest.importorskip("bitsandbytes")


def test_weights_laid_out_for_inference_are_put_back() -> None:
    torch.manual_seed(0)
    layer = packed(nn.Linear(128, 64), "nf4")
    layer.bias.requires_grad_(False)
    x = torch.randn(3, 128, requires_grad=True)
    weight, answer = dense(layer), layer(x)
    (wanted,) = torch.autograd.grad(answer.sum(), x)

    changed = copy.deepcopy(layer)
    changed.weight.data, changed.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        changed.weight.data, changed.weight.quant_state
    )
    changed.support_avx512bf16_for_cpu = True
    assert not torch.allclose(dense(changed).float(), weight, atol=1e-2)  # what would be merged into, or decomposed

    keep_layout(changed)
    assert not changed.support_avx512bf16_for_cpu
    assert torch.allclose(dense(changed).float(), weight.float(), atol=1e-2)  # the scales were rounded to bfloat16
    assert torch.allclose(changed(x), answer, atol=0.05)
    (got,) = torch.autograd.grad(changed(x).sum(), x)
    assert torch.allclose(got, wanted, atol=0.1)


def test_other_layers_are_left_alone() -> None:
    plain = nn.Linear(4, 4)
    before = dict(plain.__dict__)
    keep_layout(nn.Sequential(plain, packed(nn.Linear(32, 32), "int8")))
    assert plain.__dict__ == before


@pytest.fixture
def rows_taken_for_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the kernel of bitsandbytes 0.50.2 for AVX-512 does: the scales of a row begin at row · (in // block)."""
    right = bnb.functional.dequantize_4bit

    def wrong(packed: Tensor, state: Any, **options: Any) -> Tensor:
        weight = right(packed, state, **options)
        blocks = torch.arange(weight.numel()).view(weight.shape) // state.blocksize
        rows, columns = torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij")
        taken = rows * (weight.shape[1] // state.blocksize) + columns // state.blocksize
        scales = state.absmax
        if state.nested:
            scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return weight / scales[blocks] * scales[taken]

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong)
    quantized._unpacks.cache_clear()
    yield
    quantized._unpacks.cache_clear()


def error(layer: nn.Module, weight: Tensor) -> float:
    return float((dense(layer) - weight).norm() / weight.norm())


def test_weights_that_bitsandbytes_unpacks_wrongly_are_refused(rows_taken_for_blocks: None) -> None:
    torch.manual_seed(0)
    for width, right in ((96, False), (64, True), (128, True)):
        layer = nn.Linear(width, 64, bias=False)
        with torch.no_grad():
            layer.weight *= torch.rand(64, 1)
        made = packed(layer, "nf4")
        assert (error(made, layer.weight) < 0.12) == right
        model = nn.Sequential(made)
        if right:
            assert not misread(model)
            al.attach(model, al.LoRA(r=2, targets=["0"]))
            continue
        with pytest.raises(AttachError, match=r"0 is stored in 4 bits in blocks of 64 along rows of 96.*GPU"):
            al.attach(model, al.LoRA(r=2, targets=["0"]))
        assert al.host(model) is None
    for family in models.FAMILIES:
        assert not misread(models.tiny(family, "nf4")), family


def test_where_bitsandbytes_unpacks_them_rightly_nothing_is_refused() -> None:
    """Which it is depends on the processor; blocks of unlike sizes tell a scale from another one."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=False)
    with torch.no_grad():
        layer.weight *= torch.rand(64, 1)
    made = packed(layer, "nf4")
    assert bool(misread(nn.Sequential(made))) == (error(made, layer.weight) > 0.12)
