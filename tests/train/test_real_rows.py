"""The example for GSM8K on real rows: the loss of the real model falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adapterlab.foreign.processor import slow_in
from adapterlab.train import fit, load_config

ROOT = Path(__file__).parents[2]
ROWS = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not ROWS.is_file(), reason="the GSM8K rows are not there")
def test_the_gsm8k_example_learns_from_real_rows(tmp_path: Path) -> None:
    overrides = [
        f"data.path={ROWS}", "data.limit=60", "data.eval_size=12", "training.steps=6", "training.batch_size=4",
        "training.accumulation=1", "training.eval_every=3", "training.warmup=1", "training.lr=1e-3",
        "training.schedule=constant", f"output={tmp_path / 'run'}",
        f"precision={'fp32' if slow_in(torch.bfloat16) else 'bf16'}",
    ]  # fmt: skip
    config, _ = load_config(ROOT / "examples" / "gsm8k_lora.yaml", overrides)
    result = fit(config, quiet=True)
    assert result is not None
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    first = next(line["loss"] for line in lines if "loss" in line)
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0] < first
    assert result.proven == 420
