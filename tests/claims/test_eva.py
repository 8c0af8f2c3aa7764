"""EVA's claim: A that looks where the inputs vary catches more of them, and B learns faster from the first step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, DataError
from adapterlab.methods.low_rank import _shown_data
from adapterlab.methods.low_rank._starts import Start
from adapterlab.methods.low_rank.eva import Components, EVAStart


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 24, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        y = self.layer(x)
        return type("Output", (), {"loss": (y - labels).square().mean()})


def data(count: int = 6) -> list[dict[str, Tensor]]:
    """Inputs whose variances fall linearly, around a large mean."""
    draw = torch.Generator().manual_seed(1)
    scales = torch.linspace(2, 0.05, 48)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=draw)).Q
    rows = [(torch.randn(40, 48, generator=draw) * scales) @ turn.T + 3 for _ in range(count)]
    return [{"x": x, "labels": torch.randn(40, 24, generator=draw)} for x in rows]


def caught(a: Tensor) -> float:
    """The share of the inputs' variance within the rows of A."""
    x = torch.cat([batch["x"] for batch in data()])
    x = x - x.mean(0)
    return float((x @ torch.linalg.qr(a.T).Q).norm() ** 2 / x.norm() ** 2)


def measure() -> tuple[float, float]:
    """The variance that EVA and a random A of the same rank catch."""
    torch.manual_seed(0)
    host = al.attach(Net(), al.EVA(r=4, targets=["layer"], init={"name": "eva", "rho": 1}))
    host.methods["default"].prepare(host, "default", data())
    return caught(host.adapters("default")["layer"].A.detach()), caught(torch.randn(4, 48))


def holds() -> bool:
    ours, random = measure()
    return ours > 0.2 > 2 * random


def test_more_of_the_inputs_is_caught() -> None:
    assert holds()


def test_components_batch_by_batch_are_those_of_all_rows() -> None:
    rows = [batch["x"].double() for batch in data()]
    found = None
    for x in rows:
        found = Components.of(found, x, 48)
    assert found is not None
    x = torch.cat(rows)
    centred = x - x.mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    assert found.strengths.shape == s.shape
    assert torch.allclose(found.strengths, s, atol=1e-8)
    assert torch.allclose((found.axes[:5] @ vh[:5].T).abs(), torch.eye(5, dtype=torch.double), atol=1e-6)
    assert float(found.shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_ranks_are_shared_out_and_come_back(
    family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.EVA(r=4))
    before = host.adapters("default")
    method = host.methods["default"]
    method.prepare(host, "default", [batch, batch_for(model, seed=4)])
    after = host.adapters("default")
    ranks = {path: len(a.A) for path, a in after.items()}
    assert sum(ranks.values()) == 4 * len(before)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert host.summary().trainable == sum(r * sum(after[p].site.shape) for p, r in ranks.items())
    assert torch.equal(logits(model, batch), base)
    assert {a.scale for a in after.values()} == {4.0}
    kept = {path: a.A.clone() for path, a in after.items()}
    method.prepare(host, "default", [batch])  # chosen already
    assert all(torch.equal(kept[path], a.A) for path, a in host.adapters("default").items())
    with torch.no_grad():
        for a in after.values():
            a.B.normal_(std=0.1)
    live = logits(model, batch)
    host.save(tmp_path / "a")
    again = al.load(tiny(family), tmp_path / "a")  # no data
    assert {path: len(a.A) for path, a in again.adapters("default").items()} == ranks
    assert torch.equal(logits(again.model, batch), live)
    saved = host.state_dict("default")
    other = al.host(tiny(family)) or al.attach(tiny(family), al.LoRA(r=1), "first")
    other.attach(al.EVA(r=3), "second", saved=saved)
    assert all(torch.equal(v, saved[k]) for k, v in other.state_dict("second").items())


def test_masked_tokens_do_not_count(tiny: Any, batch_for: Any) -> None:
    found = []
    for noise in (0, 1):
        model = tiny("llama")
        batch = batch_for(model)
        batch["input_ids"][:, -1] += noise  # bears no label in the last row's padding; here nowhere
        batch["labels"][:, -1] = -100
        host = al.attach(model, al.EVA(r=2, targets={"include": ["q"], "layers": "0"}))
        host.methods["default"].prepare(host, "default", [batch])
        found.append(next(iter(host.adapters("default").values())).A)
    assert torch.equal(*found)


def test_an_embedding_is_refused_and_no_data_is_noticed(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"embed_tokens.*kaiming"):
        al.attach(tiny("llama"), al.EVA(r=2, targets=["embed"]))
    host = al.attach(tiny("llama"), al.EVA(r=2))
    with pytest.raises(DataError, match="prepare"):
        host.methods["default"].prepare(host, "default", [])


class Two(nn.Module):
    """Two layers whose inputs have variances of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.flat = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.steep(x[:, :16]) + self.flat(x[:, 16:]) - labels).square().mean())


def test_ranks_go_where_they_explain_most() -> None:
    """Not to the largest variances, which are those of the layer whose inputs vary alike in all directions."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, generator=draw) * torch.cat([0.1 * 0.8 ** torch.arange(16), torch.linspace(11, 10, 16)])
    host = al.attach(Two(), al.EVA(r=3, targets=["steep", "flat"]))
    host.methods["default"].prepare(host, "default", [{"x": x, "labels": torch.randn(400, 8, generator=draw)}])
    axes, pool = {}, []
    for path, part in (("steep", x[:, :16]), ("flat", x[:, 16:])):
        values, vectors = torch.linalg.eigh(torch.cov(part.double().T))
        axes[path] = vectors.flip(1).T
        pool += [(float(value / values.sum()), path) for value in values.flip(0)[:6]]
    winners = [path for _, path in sorted(pool)[-6:]]
    assert 1 <= winners.count("flat") < 3
    for path, layer in host.adapters("default").items():
        assert len(layer.A) == layer.B.shape[1] == winners.count(path)
        overlap = (layer.A.double() @ axes[path][: len(layer.A)].T).abs()
        assert torch.allclose(overlap, torch.eye(len(layer.A)).double(), atol=1e-4)


def test_dropout_is_off_while_it_looks() -> None:
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = Net()
        model.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(48, 24))
        host = al.attach(model.train(training), al.EVA(r=4, targets=["layer.1"]))
        host.methods["default"].prepare(host, "default", data())
        found.append(host.adapters("default")["layer.1"].A)
        assert model.layer[0].training == training
    assert torch.equal(*found)


OF, SHARES, START = Components.of, Components.shares.fget, EVAStart._start  # type: ignore[attr-defined]


def _weakest(before: Any, x: Tensor, k: int) -> Components:
    found = OF(None, x, x.shape[1])
    return replace(found, axes=found.axes[-k:], strengths=found.strengths[-k:])


def _no_shift(before: Any, x: Tensor, k: int) -> Components:
    return OF(before and replace(before, mean=x.mean(0)), x, k)


def _not_zero(self: Any, *args: Any) -> Start | None:
    start = START(self, *args)
    return start and replace(start, B=start.B + 1)


BROKEN: dict[str, Mutation] = {
    "the weakest components": (Components, "of", _weakest),
    "the last batch alone": (Components, "of", lambda before, x, k: OF(None, x, k)),
    "not centred": (Components, "of", lambda before, x, k: OF(before, torch.cat([x, -x]), k)),
    "the shift of the mean left out": (Components, "of", _no_shift),
    "ranks to the smallest shares": (Components, "shares", property(lambda self: -SHARES(self))),
    "ranks to the largest variances": (Components, "shares", property(lambda self: self.strengths.square())),
    "ranks by strength, not variance": (Components, "shares", property(lambda self: SHARES(self).sqrt())),
    "ranks left as they are": (EVAStart, "_ranks", lambda self, places, seen: {p: places[p].r for p in seen}),
    "B not zero": (EVAStart, "_start", _not_zero),
    "dropout on while it looks": (_shown_data, "evaluating", lambda model: torch.no_grad()),
}
CLAIMS: list[Callable[..., None]] = [
    test_more_of_the_inputs_is_caught, test_components_batch_by_batch_are_those_of_all_rows,
    test_ranks_go_where_they_explain_most, test_dropout_is_off_while_it_looks,
    functools.partial(test_ranks_are_shared_out_and_come_back, "llama"),
]  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(*CLAIMS, lines=BROKEN)
