"""Both directions of the interchange with HF PEFT, for any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al

TOLERANCE = 1e-5


@pytest.fixture
def peft_reads(tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path) -> Callable[..., None]:
    """Save `method` on a family: PEFT, we, and we without our own file answer as the live adapter does."""

    def check(family: str, method: al.Method, effect: float) -> None:
        model = tiny(family)
        batch = batch_for(model)
        base = logits(model, batch)
        host = al.attach(model, method)
        randomise(host, size=0.1)
        expected = logits(model, batch)
        assert (expected - base).abs().max() > effect
        host.save(tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
        assert (logits(theirs, batch) - expected).abs().max() < TOLERANCE
        assert torch.equal(logits(al.load(tiny(family), tmp_path / "adapter").model, batch), expected)
        (tmp_path / "adapter" / "method.json").unlink()
        as_peft = al.load(tiny(family), tmp_path / "adapter")
        assert as_peft.methods["default"].id == method.id
        assert (logits(as_peft.model, batch) - expected).abs().max() < TOLERANCE

    return check


@pytest.fixture
def we_read(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> Callable[..., None]:
    """Save a PEFT model with moved tensors: we load it as the method `id` and answer the same."""

    def check(family: str, config: Any, id: str, effect: float) -> None:
        theirs = peft.get_peft_model(tiny(family), config).eval()
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        model = tiny(family)
        batch = batch_for(model)
        expected = logits(theirs, batch)
        theirs.save_pretrained(tmp_path)
        assert (expected - logits(model, batch)).abs().max() > effect
        assert al.load(model, tmp_path).methods["default"].id == id
        assert (logits(model, batch) - expected).abs().max() < TOLERANCE

    return check
