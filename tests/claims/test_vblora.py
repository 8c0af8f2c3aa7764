"""VB-LoRA: the stored mixes give the outputs of the logits at a tenth of the size; gradients reach chosen rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, TrainingError
from adapterlab.methods.structured import vblora
from adapterlab.methods.structured.vblora import VBLoRA

SMALL = {"num_vectors": 64, "vector_length": 8, "bank_bound": 0.3}


class Net(nn.Module):
    """Layers in a row, with room beside them for what adapters share."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def measure(tiny: Any, batch_for: Any, logits: Any, randomise: Any, folder: Path) -> tuple[float, float]:
    """(largest difference between outputs of both checkpoints, size of the logits over that of the mixes)."""
    found, sizes = [], []
    for small in (False, True):
        model = tiny("llama")
        torch.manual_seed(0)
        host = al.attach(model, VBLoRA(**SMALL, save_topk=small))
        randomise(host)
        host.save(folder / str(small))
        again = al.load(tiny("llama"), folder / str(small))
        found.append(logits(again.model, batch_for(model)))
        tensors = load_file(folder / str(small) / "adapter_model.safetensors")
        sizes.append(sum(t.nbytes for key, t in tensors.items() if "bank" not in key))
    assert (found[0] - logits(tiny("llama"), batch_for(model))).abs().max() > 0.01
    return float((found[0] - found[1]).abs().max()), sizes[0] / sizes[1]


def holds(*arguments: Any) -> bool:
    difference, ratio = measure(*arguments)
    return difference < 1e-5 and ratio > 10


def test_claim(tiny: Any, batch_for: Any, logits: Any, randomise: Any, tmp_path: Path) -> None:
    assert holds(tiny, batch_for, logits, randomise, tmp_path)


def test_gradients_reach_the_chosen_rows_only() -> None:
    torch.manual_seed(0)
    model = Net(nn.Linear(16, 8))
    host = al.attach(model, VBLoRA(**SMALL, r=1, targets=["body.0"]))
    layer, bank = host.adapters("default")["body.0"], host.shared("default")["bank"].vectors
    model(torch.randn(4, 16)).square().sum().backward()
    chosen = {int(i) for p in layer.parameters() for i in p.topk(2).indices.flatten()}
    assert set(bank.grad.abs().sum(1).nonzero()[:, 0].tolist()) == chosen
    assert len(chosen) < 10
    for p in layer.parameters():
        assert ((p.grad != 0).sum(-1) == 2).all()


def test_output_is_that_of_the_formula(randomise: Any) -> None:
    """Each piece of A and B mixed by hand in float64."""
    model = Net(nn.Linear(8, 12)).double()
    host = al.attach(model, VBLoRA(r=3, num_vectors=6, vector_length=4, topk=3, targets=["body.0"]))
    randomise(host)
    layer, bank = host.adapters("default")["body.0"], host.shared("default")["bank"].vectors.detach()

    def mix(logits: Tensor) -> Tensor:
        best = sorted(range(6), key=lambda i: -float(logits[i]))[:3]
        weights = torch.stack([logits[i].exp() for i in best])
        return sum(w * bank[i] for w, i in zip(weights / weights.sum(), best, strict=True))

    with torch.no_grad():
        a = torch.stack([torch.cat([mix(layer.logits_A[i, j]) for j in range(2)]) for i in range(3)])
        b = torch.stack([torch.cat([mix(layer.logits_B[j, i]) for j in range(3)]) for i in range(3)], 1)
        x = torch.randn(5, 8, dtype=torch.float64)
        expected = x @ (model.body[0].weight + b @ a).T + model.body[0].bias
        assert torch.allclose(model(x), expected, atol=1e-12)
        host.merge()
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_count_is_the_formula_and_the_bank_counts_once(tiny: Any) -> None:
    host = al.attach(tiny("llama"), VBLoRA(**SMALL, r=2))
    shapes = [a.site.shape for a in host.adapters("default").values()]
    assert host.summary().trainable == 64 * 8 + sum(2 * 64 * (out + in_) // 8 for out, in_ in shapes)


def test_logits_have_their_own_rate(tiny: Any) -> None:
    host = al.attach(tiny("llama"), VBLoRA(**SMALL, logits_lr_factor=7, modules_to_save=["lm_head"]))
    groups: list[dict[str, Any]] = []
    host.methods["default"].optimizer(host, "default", groups.extend)
    assert [g.get("lr_factor", 1) for g in groups] == [1, 7]
    assert [tuple(p.shape) for p in groups[0]["params"]] == [(128, 32), (64, 8)]
    assert sum(p.numel() for g in groups for p in g["params"]) == host.summary().trainable


def test_training_from_stored_mixes_is_refused(tiny: Any, tmp_path: Path) -> None:
    al.attach(tiny("llama"), VBLoRA(**SMALL, save_topk=True)).save(tmp_path / "adapter")
    host = al.load(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(TrainingError, match="save_topk=False"):
        host.methods["default"].optimizer(host, "default", lambda groups: None)


def test_mistakes_are_named(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"vector_length = 32 .*\(16, 32\) of .*k_proj.*Choose a divisor of 16"):
        al.attach(tiny("llama"), VBLoRA(vector_length=32))
    with pytest.raises(ConfigError, match="topk = 5 is more than num_vectors = 4"):
        VBLoRA(num_vectors=4, topk=5)


def test_where_it_starts() -> None:
    torch.manual_seed(0)
    host = al.attach(Net(nn.Linear(64, 64)), VBLoRA(r=4, num_vectors=32, vector_length=16, targets=["body.0"]))
    layer: Any = host.adapters("default")["body.0"]
    bank = host.shared("default")["bank"].vectors
    assert 0.019 < bank.abs().max() <= 0.02
    assert float(bank.std()) == pytest.approx(0.02 / 3**0.5, rel=0.1)
    for logits in (layer.logits_A, layer.logits_B):
        assert float(logits.std()) == pytest.approx(0.1, rel=0.1)


INWARD, MIXES, FACTORS = vblora._inward, VBLoRA.Layer.mixes, VBLoRA.Layer.factors


def _all(self: Any, logits: Tensor) -> Tensor:
    return logits.softmax(-1) @ self.bank.vectors


def _softmax_first(self: Any, logits: Tensor) -> Tensor:
    top, chosen = logits.softmax(-1).topk(self.k, dim=-1)
    return (top.unsqueeze(-2) @ self.bank.vectors[chosen]).squeeze(-2)


def _hard(self: Any, logits: Tensor) -> Tensor:
    return self.bank.vectors[logits.topk(self.k, dim=-1).indices].mean(-2)


LAYER = VBLoRA.Layer
BROKEN: dict[str, Mutation] = {
    "weights read as logits": (vblora, "_inward", lambda *given: {k: v.exp() for k, v in INWARD(*given).items()}),
    "all vectors mixed": (LAYER, "mixes", _all),
    "the softmax of all logits": (LAYER, "mixes", _softmax_first),
    "equal weights": (LAYER, "mixes", _hard),
    "the smallest logits": (LAYER, "mixes", lambda self, logits: MIXES(self, -logits)),
    "pieces of B in another order": (LAYER, "factors", lambda self: (FACTORS(self)[0], FACTORS(self)[1].flip(0))),
    "pieces of A in another order": (LAYER, "factors", lambda self: (FACTORS(self)[0].flip(1), FACTORS(self)[1])),
    "logits start at zero": begun(LAYER, lambda layer, method: layer.logits_A.zero_()),
    "the bank starts larger": begun(vblora._Bank, lambda bank, method: bank.vectors.mul_(2)),
    "the bank starts normal": begun(vblora._Bank, lambda bank, method: bank.vectors.normal_(std=0.02 / 3**0.5)),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_output_is_that_of_the_formula,
    test_gradients_reach_the_chosen_rows_only,
    test_where_it_starts,
    test_claim,
    lines=BROKEN,
)
