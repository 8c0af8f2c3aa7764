"""SHiRA: as many numbers as a LoRA of rank two make an update of nearly full rank, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, FormatError, NotTrainingError
from adapterlab.methods.structured import shira
from adapterlab.methods.structured.shira import SHiRA
from adapterlab.ops import sparse_update

MASKS = ["random", "magnitude", "structured"]


def layer_of(**fields: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    host = al.attach(nn.Sequential(nn.Linear(64, 64)), SHiRA(r=2, targets=["0"], **fields))
    return host, host.adapters("default")["0"]


def measure(**fields: Any) -> dict[str, bool]:
    """What must be true of a trained adapter of 256 entries."""
    host, layer = layer_of(**fields)
    model, x = host.model, torch.randn(200, 64)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    target = x @ torch.randn(64, 64)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.01)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows, columns = layer.indices.long()
    dense = torch.zeros(64, 64)
    for row, column, value in zip(rows, columns, layer.values.detach(), strict=True):
        dense[row, column] = layer.scale * value
    live, wanted = model(x).detach(), x @ (weight + dense).T + bias
    kept = max(p.numel() for state in optimizer.state.values() for p in state.values())
    host.merge()
    merged = model[0].weight.detach()
    untouched = torch.ones(64, 64, dtype=torch.bool)
    untouched[rows, columns] = False
    answer = (model(x) - live).abs().max() < 1e-4
    host.restore("default")
    return {
        "learns": losses[-1] < 0.98 * losses[0],
        "rank": int(torch.linalg.matrix_rank(merged - weight)) >= 60,
        "size": layer.values.numel() == kept == int((~untouched).sum()) == 2 * (64 + 64),
        "live": bool((live - wanted).abs().max() < 1e-4),
        "merged": bool(answer),
        "the rest": torch.equal(merged[untouched], weight[untouched]),
        "undone": torch.equal(model[0].weight, weight),
    }


def holds(**fields: Any) -> bool:
    return all(measure(**fields).values())


@pytest.mark.parametrize("fields", [*({"mask": mask} for mask in MASKS), {"scale": 0.5}])
def test_few_entries_have_full_rank(fields: dict[str, Any]) -> None:
    assert holds(**fields)
    lora = al.attach(nn.Sequential(nn.Linear(64, 64)), al.LoRA(r=2, targets=["0"]))
    assert lora.summary().trainable == layer_of()[0].summary().trainable


def _block(method: SHiRA, site: Any, count: int) -> Tensor:
    return shira._rows_and_columns(torch.arange(count), site.shape[1])


def _gradient_of_transposed(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return (x.T @ g).view(-1)[indices.long()[0] * g.shape[1] + indices.long()[1]]


def _written(update: Tensor, weight: Tensor) -> Tensor:
    return torch.where(update != 0, update, weight)


PLACED = sparse_update.placed
BROKEN: dict[str, tuple[Any, str, Any]] = {
    "entries of few rows": (shira, "_first_choice", _block),
    "fewer entries": (SHiRA, "count", lambda self, out, in_: 200),
    "entries that stand twice": (shira, "_rows_and_columns", lambda flat, width: torch.stack([flat // 64, flat % 8])),
    "rows and columns exchanged": (sparse_update, "placed", lambda v, i, *rest: PLACED(v, i.flip(0), *rest)),
    "the gradient of other entries": (sparse_update, "entries_of_product", _gradient_of_transposed),
    "s left out": (SHiRA.Layer, "scaled", lambda self: self.values),
    "s twice": (SHiRA.Layer, "scaled", lambda self: self.scale**2 * self.values),
    "no base": (SHiRA.Layer, "whole", lambda self, x: self.forward(x)),
    "merged by writing, not adding": (SHiRA.Layer, "merged", lambda self, w, b: (_written(self.delta(), w), b)),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_the_claim_fails_when_a_line_is_broken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not holds(scale=0.5)


def chosen(mask: str) -> tuple[Tensor, Tensor]:
    """(entries that the mask takes, weight) of a small layer of a model, as booleans."""
    _, layer = layer_of(mask=mask)
    found = torch.zeros(64, 64, dtype=torch.bool)
    found[tuple(layer.indices.long())] = True
    return found, layer.site.weight().detach()


def test_magnitude_takes_the_largest() -> None:
    found, weight = chosen("magnitude")
    assert weight[found].abs().min() >= weight[~found].abs().max()


def test_structured_takes_diagonal_rows_and_columns() -> None:
    found, _ = chosen("structured")
    assert found.diagonal().all()
    assert (found.sum(1) == 64).any()
    assert (found.sum(0) >= 63).any()


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (6, 6), (7, 9)])
def test_structured_has_its_number_of_entries_in_any_shape(shape: tuple[int, int]) -> None:
    for count in range(1, shape[0] * shape[1] + 1):
        indices = shira._lines(*shape, count)
        assert len({*zip(*indices.tolist(), strict=True)}) == count


def test_random_masks_differ_by_seed_and_module_and_meet_by_chance(tiny: Any) -> None:
    hosts = [al.attach(tiny("llama"), SHiRA(r=4, seed=seed, targets=["q"])) for seed in (0, 0, 1)]
    masks = [[layer.indices for layer in host.adapters("default").values()] for host in hosts]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    sets = [{*zip(*i.tolist(), strict=True)} for i in (masks[0][0], masks[0][1], masks[2][0])]
    expected = (4 * 64) ** 2 / 32**2
    assert all(0.5 * expected < len(sets[0] & other) < 1.5 * expected for other in sets[1:])


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_data_chooses_the_entries(mask: str, tiny: Any, batch_for: Any, tmp_path: Any, logits: Any) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    model.requires_grad_(True)
    model(**batch).loss.backward()
    wanted = {}
    for path, module in model.named_modules():
        if path.endswith("v_proj"):
            score = module.weight.grad * (module.weight if mask == "snip" else 1)
            wanted[path] = score.abs().flatten().topk(4 * (32 + 16)).indices.sort().values
    model.zero_grad()
    host = al.attach(model, SHiRA(r=4, mask=mask, targets=["v"]))
    with pytest.raises(NotTrainingError, match="prepare"):
        host.methods["default"].before_step(host, "default", 0, None)
    host.methods["default"].prepare(host, "default", [batch])
    host.methods["default"].before_step(host, "default", 0, None)
    for path, layer in host.adapters("default").items():
        rows, columns = layer.indices.long()
        assert torch.equal(rows * 32 + columns, wanted[path])
    with torch.no_grad():
        for p in host.parameters("default"):
            p.normal_()
    before = host.state_dict("default")
    host.save(tmp_path / "adapter")
    again = al.load(tiny("llama"), tmp_path / "adapter")
    again.methods["default"].prepare(again, "default", [batch])  # keeps what it has
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict("default").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_update(dtype: torch.dtype) -> None:
    host, layer = layer_of()
    host.model.to(dtype)
    layer.float()
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        layer.values.normal_(std=0.1)
    seed = torch.randn(2, 3, 64, dtype=dtype)
    found = torch.autograd.grad(host.model(x), [x, layer.values], seed)
    weight = host.model[0].weight.float() + layer.delta()
    wanted = torch.autograd.grad(x.float() @ weight.T, [x, layer.values], seed.float())
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).abs().max() < (1e-4 if dtype == torch.float32 else 0.02) * b.float().abs().max()


def test_mistakes_are_named(tiny: Any) -> None:
    with pytest.raises(
        AttachError, match=r"r = 32 would train 1536 entries of .*k_proj, which has 512. Choose r <= 10"
    ):
        al.attach(tiny("llama"), SHiRA(targets=["k"]))
    with pytest.raises(AttachError, match=r"fewer entries than r = 1 trains"):
        al.attach(nn.Sequential(nn.Linear(1, 4)), SHiRA(targets=["0"]))


def test_entries_of_another_base_are_refused(tmp_path: Any) -> None:
    host, layer = layer_of()
    layer.indices[0, -1] = 64
    host.save(tmp_path / "adapter")
    with pytest.raises(FormatError, match="do not lie in its weight"):
        al.load(nn.Sequential(nn.Linear(64, 64)), tmp_path / "adapter")
