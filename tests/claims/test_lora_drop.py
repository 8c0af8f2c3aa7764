"""LoRA-drop: modules keep their own LoRA by the size of its output; the others share one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import NotTrainingError
from adapterlab.methods.low_rank import lora_drop

LOUD = {1, 2, 5, 7}


class Parallel(nn.Module):
    """Eight alike layers, of which four see inputs ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(8))

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        outputs = [f(input_ids * (10 if i in LOUD else 1)) for i, f in enumerate(self.layers)]
        return SimpleNamespace(loss=sum((y - labels).square().mean() for y in outputs))


def prepared(**fields: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Parallel()
    host = al.attach(model, al.LoRADrop(r=2, steps=3, share=1.0, targets=[r"layers\.\d"], **fields))
    batches = [{"input_ids": torch.randn(4, 5, 12), "labels": torch.randn(4, 5, 12)} for _ in range(3)]
    host.methods["default"].prepare(host, "default", batches)
    return model, host


def measure() -> tuple[set[int], float]:
    """Which layers keep their own LoRA, and the trainable share of a full one."""
    _, host = prepared()
    own = {i for i, layer in enumerate(host.adapters("default").values()) if layer.__dict__["pair"] is None}
    return own, host.summary().trainable / (8 * 2 * 24)


def test_the_loud_layers_keep_theirs() -> None:
    assert measure() == (LOUD, 5 / 8)


def test_the_claim_fails_when_weights_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def norms(host: Any, layers: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, float]:
        return {path: float(layer.delta().square().sum()) for path, layer in layers.items()}

    monkeypatch.setattr(lora_drop, "measure", norms)
    assert measure() != (LOUD, 5 / 8)


def test_scores_are_sums_of_squares_without_padding() -> None:
    _, host = prepared(threshold=1.0)
    layers = host.methods["default"].layers(host, "default")
    for layer in layers.values():
        nn.init.normal_(layer.B)
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"input_ids": x, "labels": torch.zeros(2, 5, 12), "attention_mask": mask}
    found = lora_drop.measure(host, layers, [batch])
    for i, (path, layer) in enumerate(layers.items()):
        y = (x * (10 if i in LOUD else 1)).double() @ layer.delta().double().T
        expected = float(y[mask.bool()].square().sum())
        assert abs(found[path] / expected - 1) < 1e-5


def test_selection_is_the_smallest_prefix() -> None:
    assert lora_drop.select([5.0, 1.0, 3.0, 1.0], 0.8) == [0, 2]
    assert lora_drop.select([5.0, 1.0, 3.0, 1.0], 0.81) == [0, 2, 1]
    assert lora_drop.select([1.0, 1.0], 1.0) == [0, 1]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0])
def test_a_share_of_the_batches_decides(share: float) -> None:
    chosen = list(lora_drop.part(range(100), share))  # type: ignore[arg-type]
    assert len(chosen) == round(100 * share)
    assert chosen[0] == 0
    gaps = [later - earlier for earlier, later in itertools.pairwise([*chosen, 100])]
    assert max(gaps) - min(gaps) <= 1
    assert list(lora_drop.part(range(3), share))[:1] == [0]  # type: ignore[arg-type]


def test_the_shared_pair_is_one_parameter_in_optimizer_and_file(
    tiny: Any, batch_for: Any, logits: Any, randomise: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRADrop(r=2, steps=2, share=1.0, threshold=0.3, targets=["q", "v", "down"]))
    host.methods["default"].prepare(host, "default", [batch])
    assert torch.equal(logits(model, batch), base), "the measured LoRAs are gone"
    assert (
        len([n for n in host.named_parameters("default") if n.startswith("shared.")]) == 6
    )  # A and B of each of three kinds
    assert len(host.parameters("default")) == 12
    randomise(host)
    expected = logits(model, batch)
    host.save(tmp_path / "a")
    again = al.load(tiny("llama"), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), expected)
    # In the same order, by which the state of an optimizer is given back to its tensors.
    assert list(again.named_parameters("default")) == list(host.named_parameters("default"))
    host.merge()
    assert (logits(model, batch) - expected).abs().max() < 1e-4


def test_training_before_the_choice_is_refused(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.LoRADrop(targets=["q"]))
    with pytest.raises(NotTrainingError, match="prepare"):
        host.methods["default"].before_step(host, "default", 0, torch.optim.SGD(host.parameters("default"), lr=0.1))


def test_a_plan_prepares_in_one_step_and_keeps_the_rest() -> None:
    method = al.LoRADrop(r=3, steps=50, threshold=0.5)
    assert method.brief() == al.LoRADrop(r=3, steps=1, share=1.0, threshold=0.5)
