"""RandLoRA: full rank with fewer parameters than a LoRA of rank eight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.methods.structured import randlora

D = 64


class One(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def linear(method: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = One().to(dtype)
    host = al.attach(model, method)
    return model, host, host.adapters("default")["layer"]


def measure() -> tuple[int, int]:
    """Rank of a random update, and the number of parameters."""
    _, host, layer = linear(al.RandLoRA(r=8, alpha=8, targets=["layer"]), torch.float64)
    with torch.no_grad():
        nn.init.normal_(layer.lam)
        nn.init.normal_(layer.gamma)
    return int(torch.linalg.matrix_rank(layer.delta())), host.summary().trainable


def test_the_update_has_full_rank() -> None:
    assert measure() == (D, 8 * (8 + D))
    assert 8 * (8 + D) < 8 * 2 * D  # LoRA of rank 8


def test_the_claim_fails_when_all_products_share_a_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    def collapsed(a: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        return (lam[:, :, None] * a * gamma[:1]).flatten(0, 1)

    monkeypatch.setattr(randlora, "_scaled", collapsed)
    assert measure()[0] < D


def loss_of(method: Any, steps: int = 150) -> float:
    """The final loss as a share of the first when all singular values of the wanted change are equal."""
    model, host, _ = linear(method)
    x = torch.randn(2048, D)
    target = x @ (model.layer.weight.detach() + torch.linalg.qr(torch.randn(D, D))[0] / 8).T
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0]


def test_it_fits_a_change_of_full_rank_better_than_lora_at_equal_parameters() -> None:
    # r = 2 trains 32 (2 + 64) = 2112 numbers, a LoRA of rank 17 trains 2176.
    ours = loss_of(al.RandLoRA(r=2, alpha=8, targets=["layer"]))
    # The best update of rank 17 leaves 47/64 of such a change; where singular values fall fast, LoRA is ahead.
    assert ours < 0.6 < loss_of(al.LoRA(r=17, targets=["layer"]))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("turned", [True, False])
def test_gradients_are_those_of_the_formula(rows: int, turned: bool) -> None:
    torch.manual_seed(0)
    low, high, r, n = 6, 9, 2, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    a, b = draw(r, 1, low).detach(), draw(high, n * r).detach()
    inputs = (draw(rows, low if turned else high), draw(r, n), draw(n, low))
    assert randlora._many(inputs[0], b, torch.empty(n * r, low)) == (rows == 40)
    assert torch.autograd.gradcheck(
        lambda x, lam, gamma: randlora._Update.apply(x, a, b, lam, gamma, 0.5, turned), inputs
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_start_count_and_formula(family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.RandLoRA(r=5, alpha=10))
    assert torch.equal(logits(model, batch), base)
    layers = host.adapters("default").values()
    low = [min(a.site.shape) for a in layers]
    assert host.summary().trainable == sum(-(-lo // 5) * (5 + lo) for lo in low)
    assert not any(t.ndim == 3 for t in host.tensors("default").values()), "the bases are not saved"
    host.verify(batch)
    randomise(host)
    for layer in layers:
        site: Any = layer.site
        x = torch.randn(3, site.shape[1])
        expected = x.double() @ (site.weight() + layer.delta()).double().T
        expected = expected + (0 if site.bias is None else site.bias.double())
        assert (site.module(x) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("fields", [{"sparse": True}, {"very_sparse": True}])
def test_sparse_bases_have_three_values(fields: dict[str, Any]) -> None:
    a, b = al.RandLoRA(r=8, **fields).draw(64, 49)
    share = 1 / 3 if "sparse" in fields else 1 / 7
    for base in (a, b):
        assert len(base.unique()) == 3
        assert abs(float((base != 0).float().mean()) - share) < 0.05
