"""Weights that torchao packs are tensor subclasses in ordinary modules; adapters stand beside them all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.convert.merging import merge_into_base
from adapterlab.errors import AttachError, MergeError, NotTrainingError
from adapterlab.foreign.quantized import compute_dtype, dense, is_quantized
from adapterlab.hosts import load
from adapterlab.registry import method
from adapterlab.testing import Case, batch, tiny
from adapterlab.testing.case import gradients, logits, perturb
from adapterlab.testing.models import token_rows
from adapterlab.train import Training
from adapterlab.train.hf_callback import AdapterlabCallback
from adapterlab.train.loop import Loop

torchao = pytest.importorskip("torchao.quantization")

BESIDE = ("lora", "dora", "hra", "adapter_pfeiffer", "ia3", "prefix_tuning", "mam_adapter")
INSIDE = ("full", "galore", "lisa")
MERGES = ("lora", "dora", "hra", "ia3")


def base(precision: str = "fp32", config: Any = None) -> Any:
    """A tiny Llama whose backbone torchao has packed."""
    model = tiny("llama", precision)
    torchao.quantize_(model.model, config or torchao.Int8WeightOnlyConfig())
    return model


def unpacked(precision: str = "fp32") -> Any:
    """The same model with plain weights of the values that the packed ones stand for."""
    packed, model = base(precision), tiny("llama", precision)
    for path, module in packed.named_modules():
        if is_quantized(module):
            model.get_submodule(path).weight.data = dense(module)
    return model


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {path: m.weight.qdata.clone() for path, m in model.named_modules() if is_quantized(m)}  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 48).to(dtype)
    before = layer.weight.detach().clone()
    assert not is_quantized(layer)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert is_quantized(layer)
    assert compute_dtype(layer) == dtype
    seen = dense(layer)
    assert (type(seen), seen.dtype, seen.requires_grad) == (Tensor, dtype, False)
    step = before.float().abs().amax(1, keepdim=True) / 127
    assert ((seen - before).float().abs() <= 0.51 * step + 0.01 * before.float().abs()).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_codes_are_not_taken_for_numbers(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    assert is_quantized(layer)
    with pytest.raises(TypeError, match=str(dtype)):
        dense(layer)


@pytest.mark.parametrize("id", BESIDE)
def test_methods_beside_the_weight(id: str, tmp_path: Path) -> None:
    model = base()
    rows, before, plain = batch(model), codes(model), logits(model, batch(model))
    classes = {path: type(m) for path, m in model.named_modules()}
    found = Case(method(id)).attach(model=model)
    # An independent reference: the same adapter on plain weights of the same values.
    twin = Case(method(id)).attach(model=unpacked())
    twin.load_state_dict("one", found.state_dict("one"))
    assert torch.allclose(logits(model, rows), logits(twin.model, rows), atol=1e-4)
    assert not torch.allclose(logits(model, rows), plain, atol=1e-3)
    wanted = gradients(twin, "one", [rows])
    for key, grad in gradients(found, "one", [rows]).items():
        assert grad is not None, key
        assert torch.allclose(grad, wanted[key], atol=1e-4, rtol=1e-3), key  # type: ignore[arg-type]

    found.save(tmp_path / "adapter")
    assert torch.equal(logits(load(base(), tmp_path / "adapter").model, rows), logits(model, rows))
    found.detach("one")
    assert torch.equal(logits(model, rows), plain)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    after = codes(model)
    assert all(torch.equal(after[path], value) for path, value in before.items())


@pytest.mark.parametrize("id", INSIDE)
def test_methods_that_train_the_weight_are_refused(id: str) -> None:
    model = base()
    with pytest.raises(AttachError, match="stored packed"):
        al.attach(model, method(id)(**method(id).example(model)))
    assert al.host(model) is None


def test_own_and_copies_are_refused() -> None:
    model = base()
    found = al.attach(model, al.LoRA(r=2))
    path = "model.layers.0.mlp.up_proj"
    with pytest.raises(AttachError, match=rf"{path}\.weight is stored packed.*beside the weight"):
        found.own("default", f"{path}.weight")
    with pytest.raises(AttachError, match=f"{path} is to be trained whole and has packed weights"):
        al.attach(base(), al.LoRA(r=2, targets="q", modules_to_save=(path,)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("id", MERGES)
def test_merge(id: str, precision: str) -> None:
    model = base(precision)
    rows, before = batch(model), codes(model)
    plain = logits(model, rows)
    found = Case(method(id)).attach(model=model)
    perturb(found, "one", seed=7, size=0.3)
    live = logits(model, rows)
    with pytest.raises(MergeError, match="quantized='dequantize'"):
        found.merge()
    assert torch.equal(logits(model, rows), live)
    found.merge(quantized="dequantize")
    path = next(iter(found.adapters("one")))
    assert model.get_submodule(path).weight.dtype == model.dtype
    assert not is_quantized(model.get_submodule(path))
    merged, effect = logits(model, rows), float((live - plain).float().norm())
    assert float((merged - live).float().norm()) < (1e-4 if precision == "fp32" else 0.25) * effect
    found.restore()
    assert torch.equal(logits(model, rows), live)
    assert all(torch.equal(value, before[path]) for path, value in codes(model).items())


def test_merge_keeps_dtype_and_class() -> None:
    """In a model that names no dtype, and at a packed table, which must not become a linear layer."""
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32)).bfloat16()
    torchao.quantize_(model, config, filter_fn=lambda module, _: hasattr(module, "weight"))
    found = al.attach(model, al.LoRA(r=2, targets=["0", "1"]))
    perturb(found, "default", seed=0, size=0.3)
    ids = torch.arange(16)
    live = model(ids)
    found.merge(quantized="dequantize")
    assert not any(is_quantized(m) for m in model)
    assert model[0].weight.dtype == model[1].weight.dtype == torch.bfloat16
    assert isinstance(model[0], nn.Embedding)
    assert torch.allclose(model(ids), live, atol=0.3, rtol=0.05)


def test_folder(tmp_path: Path) -> None:
    found = al.attach(base(), al.LoRA(r=2, targets=["up", "q"]))
    perturb(found, "default", seed=0, size=0.3)
    rows = batch(found.model, padding=False)
    samples = [{key: value[0] for key, value in rows.items()}]
    with pytest.raises(MergeError, match="quantization_config"):
        merge_into_base(found, None, tmp_path / "a", samples=samples, quantized="requantize")
    merge_into_base(found, None, tmp_path / "b", samples=samples, quantized="dequantize")
    again = type(found.model).from_pretrained(tmp_path / "b").eval()
    assert torch.allclose(logits(again, rows), logits(found.model, rows), atol=1e-4)
    assert is_quantized(found.model.model.layers[0].mlp.up_proj)


def test_packed_activations_that_stop_the_gradient_are_noticed() -> None:
    """Rounding activations too, torchao gives the input no gradient: training past such layers would be wrong."""
    model = base(config=torchao.Int8DynamicActivationInt8WeightConfig())
    found = al.attach(model, al.LoRA(r=2))
    starts: list[Callable[[], Any]] = [
        lambda: found.verify(batch(model)),
        lambda: Loop(found, "default", token_rows()),
        lambda: AdapterlabCallback(found, "default"),
    ]
    said = r"14 packed layers .* model\.layers\.0\.self_attn\.q_proj.*Int8WeightOnlyConfig"
    for start in starts:
        with pytest.raises(NotTrainingError, match=said):
            start()


@pytest.mark.parametrize("id", BESIDE)
def test_loss_falls(id: str) -> None:
    found = Case(method(id)).attach(model=base(), fresh=True)
    settings = Training(steps=10, batch_size=4, lr=1e-2, schedule="constant", warmup=0, clip=None)
    loop = Loop(found, "one", token_rows(), settings)
    losses = [loop.step()["loss"] for _ in range(10)]
    assert losses[-1] < 0.99 * losses[0]
    found.verify(batch(found.model))
