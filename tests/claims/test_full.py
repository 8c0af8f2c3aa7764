"""Full fine-tuning: the stored change, put on a fresh base, is the trained model to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import adapterlab as al


def test_fifty_steps_come_back_to_the_bit(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
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
    host.save(tmp_path / "a")
    fresh = tiny("llama-tied")
    al.load(fresh, tmp_path / "a")
    pairs = zip(fresh.parameters(), model.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) == 0
    host.detach("default")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama-tied").parameters(), strict=True))
