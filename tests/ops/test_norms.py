"""RMS norms that keep their input alone: the bits of foreign modules forward, float64 backward, and nothing kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import adapterlab as al
from adapterlab.engine.norms import lean_norms, rms_norms
from adapterlab.ops import rms_norm as ops

KINDS: dict[str, Callable[[int], nn.Module]] = {
    "llama": lambda d: LlamaRMSNorm(d, eps=1e-5),
    "gemma2": lambda d: Gemma2RMSNorm(d, eps=1e-6),
    "olmo2": lambda d: Olmo2RMSNorm(d, eps=1e-5),
    "t5": lambda d: T5LayerNorm(d, eps=1e-6),
}


class Subtracts(nn.Module):
    """Looks like an RMS norm, and is a layer norm without a bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def norm(kind: str, width: int = 48) -> Any:
    draw = torch.Generator().manual_seed(0)
    made: Any = KINDS[kind](width).bfloat16().requires_grad_(False)
    made.weight.copy_(torch.randn(width, generator=draw))
    return made


def exact(module: Any, form: ops.Form, x: Tensor) -> Tensor:
    wide = x.double()
    n = wide / (wide.square().mean(-1, keepdim=True) + form.eps).sqrt()
    return n * (module.weight.double() + form.offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 48), (1, 7, 2, 48)])
def test_forward_to_the_bit_and_backward_to_rounding(
    kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = norm(kind)
    ((_, form),) = rms_norms(module).items()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw).bfloat16().requires_grad_()
    grad = torch.randn(shape, generator=draw).bfloat16()
    wanted = module(x)
    plain = torch.autograd.grad(wanted, x, grad)[0]
    right = torch.autograd.grad(exact(module, form, x), x, grad.double())[0].double()
    for size in (16, 48 * 16, 2**18):
        monkeypatch.setattr(ops, "_NUMBERS", size)
        with lean_norms(module):
            found = module(x)
        assert torch.equal(found, wanted)
        own = torch.autograd.grad(found, x, grad)[0]
        assert own.dtype == x.dtype
        assert float((own - right).norm()) <= 1.05 * float((plain - right).norm()) + 1e-12


def test_what_computes_something_else_is_left_alone() -> None:
    layer, other = nn.LayerNorm(48, bias=False), Subtracts(48)
    assert rms_norms(nn.ModuleList([layer, other, nn.Linear(3, 4, bias=False), nn.Embedding(3, 4)])) == {}
    trained, wide = norm("llama").requires_grad_(True), norm("llama").float()
    for module, dtype in ((trained, torch.bfloat16), (wide, torch.float32), (wide, torch.bfloat16)):
        x = torch.randn(2, 48, dtype=dtype, requires_grad=True)
        wanted = module(x)
        with lean_norms(module):
            found = module(x)
        assert type(found.grad_fn) is type(wanted.grad_fn)
        assert found.dtype == wanted.dtype


def test_a_models_norms_keep_their_input_and_forget_the_context(tiny: Any) -> None:
    model = tiny("llama").bfloat16()
    al.attach(model, al.LoRA(r=2))
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    ids = torch.arange(3, 19).view(2, 8)

    def kept() -> tuple[int, Tensor]:
        held: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            held.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logits = model(input_ids=ids, use_cache=False).logits
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()), logits

    plain, wanted = kept()
    with lean_norms(model), lean_norms(model):
        assert len(rms_norms(model)) == 0  # they have another forward now
        lean, found = kept()
        twin = copy.deepcopy(model)
    assert torch.equal(found, wanted)
    assert torch.equal(twin(input_ids=ids, use_cache=False).logits, wanted)
    assert lean <= plain - 4 * 16 * 32 * 2  # half of the float32 copy of each norm with a gradient
    after = {key: dict(module.__dict__) for key, module in model.named_modules()}
    assert [k for k in before if before[k].keys() != after[k].keys()] == []


def test_an_adapter_on_a_norm_keeps_it_as_it_is(tiny: Any) -> None:
    model = tiny("llama").bfloat16()
    host = al.attach(model, al.BitFit(bias_mode="add"))
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    adapted = [m for m in norms if host.path_of(m) in host.adapters("default")]
    assert set(rms_norms(model)) == set(norms) - set(adapted)


def test_it_compiles(tiny: Any) -> None:
    module = norm("llama")
    x = torch.randn(2, 3, 48).bfloat16()
    with lean_norms(module):
        compiled = torch.compile(module, backend="eager")
        assert torch.equal(compiled(x), module(x))
