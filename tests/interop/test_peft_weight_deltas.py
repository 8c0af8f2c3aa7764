"""LoKr, LoHa, VB-LoRA, FourierFT, MiSS and KronA against HF PEFT: what one writes the other reads, to equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al
from adapterlab.errors import FormatError
from adapterlab.methods.structured.fourierft import FourierFT
from adapterlab.methods.structured.krona import KronA
from adapterlab.methods.structured.loha import LoHa
from adapterlab.methods.structured.lokr import LoKr
from adapterlab.methods.structured.miss import MiSS
from adapterlab.methods.structured.vblora import VBLoRA

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set")

VB = {"num_vectors": 16, "vector_length": 8, "bank_bound": 0.3}
OURS: list[tuple[str, Any]] = [
    ("llama", LoKr(r=2, alpha=3, targets=["q", "down"])),
    ("qwen2", LoKr(r=2, decompose_both=True, factor=16, rank_pattern={"v_proj": 1}, alpha_pattern={"0.*up_proj": 1})),
    ("bert-classes", LoKr(r=50, factor=4, modules_to_save=["classifier"])),
    ("llama", KronA(scale=0.5)),
    ("llama", KronA(a=(8, 8), targets=["q", "v", "gate"])),
    ("llama", LoHa(r=3, alpha=5)),
    ("t5", LoHa(r=2, targets=["q", "v"], rank_pattern={"v": 4})),
    ("llama", VBLoRA(**VB)),
    ("gpt2", VBLoRA(**VB, r=2, topk=3, targets=["qkv", "down"])),
    ("llama", VBLoRA(**VB, save_topk=True)),
    ("llama", FourierFT(n=60, alpha=30)),
    ("gpt2", FourierFT(n=60, alpha=30, seed=5, start="zeros", n_pattern={"c_attn": 90})),
    ("llama", MiSS(r=8)),
    ("llama", MiSS(r=5, targets=["q", "down"])),
    ("qwen2", MiSS(r=8, variant="mini", mini_r=4)),
    ("llama", MiSS(r=16, variant="bat")),
]  # fmt: skip
QV = ["q_proj", "v_proj", "down_proj"]
THEIRS: list[tuple[str, str, Any]] = [
    ("lokr", "llama", peft.LoKrConfig(r=2, alpha=3, target_modules=QV)),
    ("lokr", "llama", peft.LoKrConfig(r=2, decompose_both=True, decompose_factor=16, target_modules=QV)),
    ("lokr", "qwen2", peft.LoKrConfig(
        r=99, alpha=9, decompose_factor=5, target_modules=QV, rank_pattern={"v_proj": 2}, init_weights=False)),
    ("lokr", "t5", peft.LoKrConfig(r=2, target_modules=["q", "v"], init_weights="lycoris", rank_dropout=0.1)),
    ("loha", "llama", peft.LoHaConfig(r=3, alpha=2, target_modules=QV, alpha_pattern={"q_proj": 5}, rank_dropout=.1)),
    ("vblora", "llama", peft.VBLoRAConfig(
        num_vectors=16, vector_length=8, init_vector_bank_bound=0.3, target_modules=QV)),
    ("vblora", "gpt2", peft.VBLoRAConfig(
        num_vectors=300, vector_length=16, init_vector_bank_bound=0.3, topk=3, target_modules=["c_attn"],
        save_only_topk_weights=True, fan_in_fan_out=True)),
    ("fourierft", "llama", peft.FourierFTConfig(n_frequency=70, scaling=30, target_modules=QV)),
    ("fourierft", "gpt2", peft.FourierFTConfig(
        n_frequency=70, scaling=30, random_loc_seed=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
        n_frequency_pattern={"c_fc": 41}, init_weights=True)),
    ("miss", "llama", peft.MissConfig(r=8, target_modules=QV, init_weights=False)),
    ("miss", "bert-classes", peft.MissConfig(r=5, target_modules=["query", "value"])),
    ("miss", "llama", peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=QV)),
    ("miss", "llama", peft.MissConfig(r=16, init_weights="bat", target_modules=QV)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method"), OURS, ids=lambda value: getattr(value, "id", value))
def test_peft_reads_what_we_write(
    family: str, method: Any, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    torch.manual_seed(0)
    host = al.attach(model, method)
    randomise(host, size=0.2)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01
    host.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)
    again = al.load(tiny(family), tmp_path / "adapter")
    assert again.methods["default"] == method
    assert (logits(again.model, batch) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny(family), tmp_path / "adapter")
    assert as_peft.methods["default"].id == ("lokr" if method.id == "krona" else method.id)
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(("id", "family", "config"), THEIRS)
def test_we_read_what_peft_writes(
    id: str, family: str, config: Any, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    base = tiny(family)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    model = tiny(family)
    batch = batch_for(model)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    assert (expected - logits(model, batch)).abs().max() > 0.01
    assert al.load(model, tmp_path).methods["default"].id == id
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(("method", "option", "value"), [
    (LoKr(r=2), "use_scalar", True),
    (LoHa(r=2), "init_weights", "other"),
    (VBLoRA(**VB), "bias", "all"),
    (FourierFT(n=9), "bias", "fourier_only"),
    (MiSS(r=8), "init_weights", "new"),
])  # fmt: skip
def test_options_that_would_change_the_outputs_are_refused(
    method: Any, option: str, value: Any, tiny: Any, tmp_path: Path
) -> None:
    al.attach(tiny("llama"), method).save(tmp_path / "adapter")
    (tmp_path / "adapter" / "method.json").unlink()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.raises(FormatError, match=rf"{option}={value!r}.*Load it with PEFT itself"):
        al.load(tiny("llama"), tmp_path / "adapter")


def test_krona_sizes_that_peft_cannot_make_are_saved_in_our_own_form(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    host = al.attach(model, KronA(a=(2, 16), targets=["q", "embed"]))
    randomise(host)
    host.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    batch = batch_for(model)
    again = al.load(tiny("llama"), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), logits(model, batch))


@pytest.mark.parametrize("method", [LoKr(r=2), LoHa(r=2), KronA(), MiSS(r=8)], ids=lambda method: method.id)
def test_what_peft_cannot_load_is_saved_in_our_own_form(
    method: Any, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    """PEFT has none of these for GPT-2's `Conv1D`."""
    model = tiny("gpt2")
    host = al.attach(model, method)
    randomise(host, size=0.1)
    host.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    batch = batch_for(model)
    assert torch.equal(logits(al.load(tiny("gpt2"), tmp_path).model, batch), logits(model, batch))
