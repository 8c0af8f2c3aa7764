"""Full fine-tuning: the stored change, put on a fresh base, is the trained model to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterlab as al


def distance(tiny: Any, batch_for: Any, folder: Path) -> float:
    """Largest difference of a weight between a tuned model and a fresh base that the saved change was put on."""
    model = tiny("llama-tied")
    host, batch = al.attach(model, al.Full()), batch_for(model)
    optimizer = torch.optim.AdamW(host.parameters("default"), 1e-3)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    host.save(folder)
    fresh = tiny("llama-tied")
    al.load(fresh, folder)
    found = max(
        float((a - b).detach().abs().max()) for a, b in zip(fresh.parameters(), model.parameters(), strict=True)
    )
    host.detach("default")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama-tied").parameters(), strict=True))
    return found


def test_fifty_steps_come_back_to_the_bit(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    assert distance(tiny, batch_for, tmp_path / "a") == 0


def test_a_change_that_is_stored_in_half_precision_is_noticed(
    tiny: Any, batch_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = al.Host.load_state_dict

    def rounded(host: Any, name: str, tensors: Any) -> None:
        exact(host, name, {key: value.bfloat16().to(value.dtype) for key, value in tensors.items()})

    monkeypatch.setattr(al.Host, "load_state_dict", rounded)
    assert distance(tiny, batch_for, tmp_path / "a") > 0
