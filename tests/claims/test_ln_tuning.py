"""LN tuning: a model moved to another domain by its norms is recovered by them, not by as many other scalars."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
from adapterlab.errors import AttachError, TargetError
from adapterlab.methods.in_place.ln_tuning import LNTuning

NORM = re.compile(r"norm|ln_|layer_norm", re.IGNORECASE)


def norms(model: nn.Module) -> dict[str, Tensor]:
    """What the norms have, found by the names that these models give them."""
    return {path: p for path, p in model.named_parameters() if NORM.search(path)}


def measure(make: Any, method: Any, steps: int = 120) -> float:
    """Share of the distance to a teacher with other norms that is left after training."""
    teacher, student = make("llama"), make("llama")
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (24, 12), generator=draw)
    with torch.no_grad():
        for p in norms(teacher).values():
            p.mul_(1 + 0.5 * torch.randn(p.shape, generator=draw))
        goal = teacher.model(ids)[0]
    host = al.attach(student, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=3e-2)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(student.model(ids)[0], goal)
        loss.backward()
        optimizer.step()
        plan.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


def claim(left: float) -> bool:
    return left <= 0.01


@pytest.mark.slow
def test_claim_and_as_many_random_scalars_do_not(tiny: Any) -> None:
    assert claim(measure(tiny, al.LNTuning()))
    model = tiny("llama")
    density = (sum(p.numel() for p in norms(model).values()) + 0.5) / sum(p.numel() for p in model.parameters())
    assert measure(tiny, al.FishMask(selection="random", density=density)) >= 0.1


def test_the_published_share_of_a_model_of_7b_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    summary = al.attach(model, al.LNTuning()).summary()
    assert summary.trainable == 65 * 4096
    assert round(100 * summary.trainable / sum(p.numel() for p in model.parameters()), 3) == 0.004


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "bert-classes", "t5", "vit"])
def test_all_norms_and_nothing_else_train(family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    model = tiny(family)
    batch, expected = batch_for(model), set(norms(model))
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    base = logits(model, batch)
    host = al.attach(model, al.LNTuning())
    assert {key.removeprefix("base.") for key in host.named_parameters("default")} == expected
    assert torch.equal(logits(model, batch), base)
    optimizer = torch.optim.AdamW(host.parameters("default"), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    changed = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert changed == expected
    live = logits(model, batch)
    host.save(tmp_path / "a")
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), live)
    host.merge()
    assert torch.equal(logits(model, batch), live)
    host.restore()
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_chosen_norms_and_saved_modules(tiny: Any) -> None:
    host = al.attach(tiny("llama"), al.LNTuning(targets={"include": ["input_layernorm"], "layers": "1"}))
    assert set(host.named_parameters("default")) == {"base.model.layers.1.input_layernorm.weight"}
    host = al.attach(tiny("bert-classes"), al.LNTuning(modules_to_save=("classifier",)))
    owned = [key for key in host.named_parameters("default") if key.startswith("base.")]
    assert len(owned) == 2 * 5
    assert "adapter.classifier.copy.weight" in host.named_parameters("default")


def test_what_has_no_norms_is_refused_with_the_next_step(tiny: Any) -> None:
    with pytest.raises(AttachError, match="Sequential has no normalisation layer with a weight"):
        al.attach(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False)), al.LNTuning())
    with pytest.raises(TargetError, match="q_proj"):
        al.attach(tiny("llama"), al.LNTuning(targets=["q_proj"]))


def _parameters(change: Any) -> Mutation:
    every: Any = LNTuning.parameters
    return (LNTuning, "parameters", lambda self, host: change(every(self, host)))


BROKEN: dict[str, Mutation] = {
    "weights only": _parameters(lambda paths: [p for p in paths if p.endswith("weight")]),
    "biases only": _parameters(lambda paths: [p for p in paths if p.endswith("bias")]),
    "inside the blocks only": _parameters(lambda paths: [p for p in paths if "ln_f" not in p]),
    "the last one only": _parameters(lambda paths: [p for p in paths if "ln_f" in p]),
    "a matrix too": _parameters(lambda paths: [*paths, "transformer.h.0.attn.c_proj.weight"]),
}


test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_all_norms_and_nothing_else_train, "gpt2"), lines=BROKEN
)


@pytest.mark.parametrize("kept", ["model.norm", "input_layernorm"])
@pytest.mark.slow
def test_some_norms_do_not_solve_the_task(kept: str, tiny: Any) -> None:
    assert not claim(measure(tiny, al.LNTuning(targets=[kept])))
