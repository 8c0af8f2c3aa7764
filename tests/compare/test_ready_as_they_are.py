"""Methods that train nothing, or search without gradients, in a comparison with those that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import adapterlab as al
from adapterlab.compare import CompareConfig, compare
from adapterlab.compare.report.write import write
from adapterlab.models import load_model


def test_rows_without_steps_and_without_rates(fields: dict[str, Any], inline: Callable[..., Any]) -> None:
    """They are examined like all others; no rate is looked for, and what they do not have is not made up."""
    inline()
    root = fields["output"].parent
    model, _ = load_model(fields["model"], precision="fp32", device="cpu")
    host = al.attach(model, al.LoRA(r=2))
    adapters = {}
    for seed, part in enumerate(("one", "two")):
        draw = torch.Generator().manual_seed(seed)
        for p in host.parameters("default"):
            p.data = 0.3 * torch.randn(p.shape, generator=draw)
        adapters[part] = str(host.save(root / part))
    given = {"adapters": adapters}
    methods = ["lora", {"lora_average": given}, {"arrow": given}, {"lorahub": {**given, "budget": 5}}]
    search = {"rates": 2, "fractions": [0.5], "extend": 0}
    found = compare(
        CompareConfig(**{**fields, "methods": methods, "lr": "auto", "search": search, "budget": {"steps": 6}})
    )
    runs = {run.method: run for run in found.runs}
    assert {run.status for run in runs.values()} == {"finished"}, [run.reason for run in runs.values()]
    assert {run.method: run.steps for run in runs.values()} == {
        "untrained": 0, "lora": 6, "lora_average": 0, "arrow": 0, "lorahub": 5
    }  # fmt: skip
    assert [search.auto for search in found.searches] == [True, False, False, False]
    for id in ("lora_average", "arrow", "lorahub"):
        run = runs[id]
        assert run.trainable == 0
        assert run.best is not None
        assert run.best_loss is not None
        assert run.inference is not None
        assert (run.inference.merged is None) == (id == "arrow")
    assert {standing.label for standing in found.standings} == {*runs}
    write(found, root / "report")
