"""bitsandbytes lays 4-bit weights out anew for CPU inference; attaching puts them back, so that training is right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adapterlab.foreign.quantized import dense, keep_layout
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
