"""BitFit: a task that differs from the base by its biases is solved by the biases, not by as many other scalars."""

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
from transformers import BertConfig, BertModel

import adapterlab as al
from adapterlab.errors import AttachError, TargetError
from adapterlab.methods.in_place.bitfit import BitFit


def measure(make: Any, method: Any, steps: int = 350) -> float:
    """Share of the distance to a teacher with shifted biases that is left after training.

    The mean of the distance over tokens is taken out first: any bias of the last layer fits that part by itself, and
    it is most of the whole. A teacher with another last bias still has exactly this goal.
    """
    teacher, student = make("gpt2").eval(), make("gpt2").eval()
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (24, 12), generator=draw)
    with torch.no_grad():
        for path, p in teacher.named_parameters():
            if path.endswith(".bias"):
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
        goal = teacher.transformer(ids)[0]
        goal -= (goal - student.transformer(ids)[0]).mean((0, 1))
    host = al.attach(student, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=3e-2)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(student.transformer(ids)[0], goal)
        loss.backward()
        optimizer.step()
        plan.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


def claim(left: float) -> bool:
    return left <= 0.04


def biases(model: Any) -> dict[str, Tensor]:
    return {path: p for path, p in model.named_parameters() if path.endswith("bias")}


@pytest.mark.slow
def test_claim_and_as_many_random_scalars_do_not(tiny: Any) -> None:
    assert claim(measure(tiny, al.BitFit()))
    model = tiny("gpt2")
    count = sum(p.numel() for p in biases(model).values())
    density = (count + 0.5) / sum(p.numel() for p in model.parameters())
    assert measure(tiny, al.FishMask(selection="random", density=density)) >= 0.15


def test_the_published_count_for_bert_base() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert al.attach(model, al.BitFit()).summary().trainable == 102_912


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert-classes", "bert-masked", "vit"])
def test_all_biases_and_nothing_else_train(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    batch, expected = batch_for(model), set(biases(model))
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    base = logits(model, batch)
    host = al.attach(model, al.BitFit())
    assert {key.removeprefix("base.") for key in host.named_parameters("default")} == expected
    assert torch.equal(logits(model, batch), base)
    optimizer = torch.optim.AdamW(host.parameters("default"), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    changed = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert changed == expected
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_targets_saved_modules_and_gains(tiny: Any) -> None:
    host = al.attach(tiny("bert-classes"), al.BitFit(targets=["q"], modules_to_save=("classifier",)))
    names = set(host.named_parameters("default"))
    assert {n for n in names if n.startswith("base.")} == {
        f"base.bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)
    }
    assert {n for n in names if n.startswith("adapter.")} == {
        "adapter.classifier.copy.weight", "adapter.classifier.copy.bias",
    }  # fmt: skip
    gains = al.attach(tiny("llama"), al.BitFit(bias_mode="add", targets=["v"], norm_gain=True))
    assert gains.summary().trainable == 2 * 16 + 5 * 32


def test_a_model_without_biases_is_refused_with_the_next_step(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(AttachError, match=r"LlamaForCausalLM has no bias, .* bias_mode='add'"):
        al.attach(model, al.BitFit())
    assert al.host(model) is None
    with pytest.raises(AttachError, match=r"no bias at targets=\['o'\]"):
        al.attach(tiny("qwen2"), al.BitFit(targets=["o"]))
    with pytest.raises(TargetError, match="q_porj"):
        al.attach(tiny("qwen2"), al.BitFit(targets=["q_porj"]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5", "mixtral"])
def test_added_biases_equal_the_formula_and_merge(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.BitFit(bias_mode="add"))
    sites = host.sites(al.Targets(include=("all-linear",)))
    assert host.summary().trainable == sum(s.shape[0] for s in sites)
    assert torch.equal(logits(model, batch), base)
    randomise(host)
    site = sites[0]
    x = torch.randn(3, site.shape[1], dtype=torch.float32)
    with torch.no_grad():
        y = site.module(x)
    bias = 0 if site.bias is None else site.bias.double()
    added = host.adapters("default")[site.path].b.double()
    torch.testing.assert_close(y.double(), x.double() @ site.weight().double().T + bias + added, rtol=1e-5, atol=1e-5)
    live = logits(model, batch)
    assert not torch.allclose(live, base, atol=1e-2)
    host.save(tmp_path / "a")
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), live)
    host.merge()
    torch.testing.assert_close(logits(model, batch), live, rtol=1e-4, atol=1e-4)
    host.restore()
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_added_biases_work_on_bf16_and_packed_weights(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").bfloat16()
    host = al.attach(model, al.BitFit(bias_mode="add"))
    assert {p.dtype for p in host.parameters("default")} == {torch.float32}
    host.verify(batch_for(model))
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def _biases(change: Any) -> Mutation:
    """Other biases in place of all."""
    every: Any = BitFit._biases
    return (BitFit, "_biases", lambda self, host, base: change(every(self, host, base)))


BROKEN: dict[str, Mutation] = {
    "norms only": _biases(lambda paths: [p for p in paths if re.search("ln_|Norm", p)]),
    "no norms": _biases(lambda paths: [p for p in paths if not re.search("ln_|Norm", p)]),
    "the last layer only": _biases(lambda paths: [p for p in paths if re.search(r"h\.1\.|ln_f", p)]),
    "weights of norms too": _biases(
        lambda paths: [*paths, *(p.replace("bias", "weight") for p in paths if "ln_f" in p)]
    ),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_all_biases_and_nothing_else_train, "gpt2"), lines=BROKEN
)


@pytest.mark.parametrize("line", ["norms only", "the last layer only"])
@pytest.mark.slow
def test_missing_biases_do_not_solve_the_task(line: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    assert not claim(measure(tiny, al.BitFit()))
