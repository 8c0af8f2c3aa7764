"""LoRA of bare parameters against HF PEFT's `target_parameters`, both ways, to the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al
from adapterlab.errors import FormatError

TOLERANCE = 1e-5
UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"

# id -> (our fields, PEFT's options)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "both": ({"parameters": [UP, DOWN], "targets": "none"}, {"target_parameters": [UP, DOWN], "target_modules": []}),
    "reversed": ({"parameters": [DOWN, UP], "targets": "none"}, {"target_parameters": [DOWN, UP]}),
    "one": ({"parameters": ["down_proj"], "targets": "none"}, {"target_parameters": ["down_proj"]}),
    "beside modules": (
        {"parameters": [UP, DOWN], "targets": ["q", "o"]},
        {"target_parameters": [UP, DOWN], "target_modules": ["q_proj", "o_proj"]},
    ),
    "router": (
        {"parameters": [ROUTER, UP], "targets": ["v"], "scale": "sqrt"},
        {"target_parameters": [ROUTER, UP], "target_modules": ["v_proj"], "use_rslora": True},
    ),
    "one layer": (
        {"parameters": [f"layers.1.{UP}", f"model.layers.0.{DOWN}"], "targets": "none"},
        {"target_parameters": [f"layers.1.{UP}", f"model.layers.0.{DOWN}"]},
    ),
    "patterns": (
        {"parameters": [UP, DOWN], "targets": ["q"], "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
         "alpha_pattern": {"gate_up_proj": 5}},
        {"target_parameters": [UP, DOWN], "target_modules": ["q_proj"],
         "rank_pattern": {"experts.down_proj": 2, "q_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}},
    ),
}  # fmt: skip

# PEFT looks for patterns among modules only, and says that it ignores those of parameters, which it applies.
REMARK = "did not match any targeted module"


def peft_loads(model: Any, folder: Path) -> Any:
    """Load with PEFT; a warning about the folder is a failure."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    said = [str(w.message) for w in seen if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    assert not [text for text in said if REMARK not in text]
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write(
    case: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("mixtral")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRA(r=4, alpha=6, **CASES[case][0]))
    randomise(host, size=0.1)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.01
    host.save(tmp_path / "adapter")

    theirs = peft_loads(tiny("mixtral"), tmp_path / "adapter")
    assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE

    again = al.load(tiny("mixtral"), tmp_path / "adapter")
    assert torch.equal(logits(again.model, batch), expected)
    (tmp_path / "adapter" / "method.json").unlink()
    as_peft = al.load(tiny("mixtral"), tmp_path / "adapter")
    assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE


def trained_by_peft(model: Any, options: dict[str, Any]) -> Any:
    """A PEFT model whose trainable tensors all have random values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{REMARK}")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return wrapped.eval()


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_writes(case: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    theirs = trained_by_peft(tiny("mixtral"), CASES[case][1])
    batch = batch_for(tiny("mixtral"))
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny("mixtral")
    assert (expected - logits(model, batch)).abs().max() > 0.01
    host = al.load(model, tmp_path / "theirs")
    assert (logits(model, batch) - expected).abs().max() < TOLERANCE
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in host.parameters("default")) == trained

    host.save(tmp_path / "ours")
    back = peft_loads(tiny("mixtral"), tmp_path / "ours")
    assert (logits(back, batch) - expected).abs().max() < TOLERANCE


def test_gradients_are_pefts(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    options = {"target_parameters": [UP, DOWN], "target_modules": []}
    theirs = trained_by_peft(tiny("mixtral"), options)
    theirs.save_pretrained(tmp_path)
    batch = batch_for(tiny("mixtral"))
    theirs(**batch).loss.backward()
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    model = tiny("mixtral")
    host = al.load(model, tmp_path)
    model(**batch).loss.backward()
    for layer in (0, 1):
        pair = host.adapters("default")[f"model.layers.{layer}.mlp.experts"].factors["gate_up_proj"]
        path = f"base_model.model.model.layers.{layer}.mlp.experts.base_layer.lora"
        a, b = expected[f"{path}_A.default.weight"], expected[f"{path}_B.default.weight"]
        assert torch.allclose(pair.A.grad.flatten(0, 1), a, atol=1e-6)
        assert torch.allclose(pair.B.grad.permute(1, 2, 0).flatten(1), b, atol=1e-6)


def test_a_name_that_this_model_lacks_is_refused(tiny: Any, tmp_path: Path) -> None:
    trained_by_peft(tiny("mixtral"), {"target_parameters": [DOWN]}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.down_projection"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"mlp\.experts\.down_projection"):
        al.load(tiny("mixtral"), tmp_path)
