from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from adapterlab.data import Collator
from adapterlab.errors import DataError
from adapterlab.evaluate.loss import evaluate_loss


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Rows of unequal length, with unequal shares of labels: a mean of batch means would be wrong."""
    made = []
    for length, labelled in ((4, 1), (9, 8), (17, 3), (30, 20), (6, 0), (12, 11)):
        ids = torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length - labelled) + ids[length - labelled :]})
    return made


@torch.no_grad()
def brute_force(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, int]:
    losses: list[float] = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"]):
            if position and label != -100:
                losses.append(float(F.cross_entropy(logits[position - 1], torch.tensor(label))))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_it_is_the_mean_over_all_tokens(model: Any, rows: Any, batch_size: int) -> None:
    expected = brute_force(model, rows)
    assert expected[1] == 43
    model.train()  # dropout of the training mode must not show, and the mode must come back
    loss, tokens = evaluate_loss(model, rows, Collator(0), batch_size)
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert (loss, tokens) == (pytest.approx(expected[0], rel=1e-5), 43)


def test_live_adapters_count(model: Any, rows: Any, adapted: Any) -> None:
    plain = brute_force(model, rows)[0]
    host = adapted(model, 1, ["q", "head"])
    live = brute_force(model, rows)[0]
    assert abs(live - plain) > 1e-2
    assert evaluate_loss(model, rows, Collator(0))[0] == pytest.approx(live, rel=1e-5)
    with host.using():
        assert evaluate_loss(model, rows, Collator(0))[0] == pytest.approx(plain, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_rows_without_labels(model: Any, rows: Any) -> None:
    with pytest.raises(DataError, match=r"None of the 1 evaluation rows.*data\.train_on"):
        evaluate_loss(model, [rows[4]], Collator(0))
