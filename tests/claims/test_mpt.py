"""Multitask prompt tuning: one prompt for several tasks, from which a further task is learned in fewer steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, DataError
from adapterlab.methods.prompt._input_prompt import layer_of
from adapterlab.methods.prompt.mpt import MPT
from adapterlab.methods.prompt.prompt_tuning import PromptTuning
from adapterlab.optim import adamw

P, TASKS = 4, 9
QUIET: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def true_prompts() -> Tensor:
    """Prompts of related tasks, each one prompt multiplied with a matrix of rank one: `[tasks, P, d]`."""
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(P, 32, generator=draw)
    u, v = (1 + 0.5 * torch.randn(TASKS, size, generator=draw) for size in (P, 32))
    return whole * u[:, :, None] * v[:, None]


def ids(seed: int, rows: int = 8) -> Tensor:
    return torch.randint(3, 128, (rows, 6), generator=torch.Generator().manual_seed(seed))


def said(host: al.Host, name: str, seed: int) -> Tensor:
    with host.using(name), torch.no_grad():
        return host.model(ids(seed)).logits.log_softmax(-1)


def batch_of(host: al.Host, name: str, seed: int) -> dict[str, Tensor]:
    """Rows whose labels are what the model says with a task's prompt."""
    best = said(host, name, seed).argmax(-1)
    return {"input_ids": ids(seed), "labels": torch.cat([torch.full_like(best[:, :1], -100), best[:, :-1]], 1)}


def apart(host: al.Host, wanted: Tensor, seed: int) -> Tensor:
    found = host.model(ids(seed)).logits.log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def learned(tiny: Any, tasks: int, steps: int) -> al.Host:
    """Teachers of single tasks, and the adapter that is learned from the first of them."""
    torch.manual_seed(1)
    host = al.attach(tiny("llama"), MPT(length=P, tasks=tasks), "shared")
    for task, prompt in enumerate(true_prompts()):
        host.attach(PromptTuning(length=P), f"teacher-{task}")
        with torch.no_grad():
            host.parameters(f"teacher-{task}")[0].copy_(prompt)
    names = [f"teacher-{task}" for task in range(tasks)]
    sources = {name: [batch_of(host, name, seed) for seed in range(3)] for name in names}
    host.learn_from(sources, "shared", steps=steps, lr=0.05)
    return host


def tune(host: al.Host, name: str, steps: int = 60) -> list[float]:
    """Divergence from the last task's model while an adapter is trained on it."""
    targets = [said(host, f"teacher-{TASKS - 1}", seed) for seed in range(3)]
    host.activate(name)
    optimizer = host.methods[name].optimizer(host, name, functools.partial(adamw, lr=0.02))
    found = []
    for step in range(steps):
        loss = apart(host, targets[step % 3], step % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def steps_to(losses: list[float], goal: float) -> int:
    return next((step for step, loss in enumerate(losses) if loss <= goal), len(losses))


@pytest.mark.slow
def test_a_ninth_task_is_learned_faster_from_the_shared_prompt(tiny: Any) -> None:
    host = learned(tiny, tasks=8, steps=160)
    host.attach(MPT(length=P, source="shared"), "informed")
    host.attach(MPT(length=P), "random")
    with torch.no_grad():
        layers: Any = [layer_of(host, name) for name in ("informed", "random")]
        layers[1].shared.normal_().mul_(layers[0].vectors().std())
    informed, random = tune(host, "informed"), tune(host, "random")
    goal = random[0] - 0.9 * (random[0] - min(random))
    assert steps_to(informed, goal) <= 0.5 * steps_to(random, goal)


def test_one_adapter_answers_for_every_task(tiny: Any) -> None:
    host = learned(tiny, tasks=3, steps=120)
    for task in range(3):
        wanted = said(host, f"teacher-{task}", 0)
        with host.using(), torch.no_grad():
            base = apart(host, wanted, 0)
        found = []
        for chosen in range(3):
            with host.using("shared"), torch.no_grad(), MPT.choosing(host, "shared", chosen):
                found.append(float(apart(host, wanted, 0)))
        assert found[task] == min(found)
        assert found[task] < 0.3 * base


# ---------------------------------------------------------------------- the formulas


def several(tiny: Any, randomise: Any, family: str = "llama", **settings: Any) -> al.Host:
    host = al.attach(tiny(family), MPT(length=P, tasks=3, rank=2, **settings))
    randomise(host)
    return host


def test_the_prompt_is_the_written_one(tiny: Any, randomise: Any) -> None:
    host = several(tiny, randomise)
    layer: Any = layer_of(host, "default")
    for task in range(3):
        u, v = layer.cols[task].double(), layer.rows[task].double()
        matrix = sum(torch.outer(u[:, i], v[i]) for i in range(2))
        with MPT.choosing(host, "default", task):
            assert torch.allclose(layer.vectors().double(), layer.shared.double() * matrix, atol=1e-5)


def test_it_starts_as_the_shared_prompt_itself(tiny: Any) -> None:
    for rank in (1, 3):
        model = tiny("llama")
        layer: Any = layer_of(al.attach(model, MPT(length=2, rank=rank, init="words", words=(9, 7))), "default")
        assert torch.allclose(layer.vectors(), model.get_input_embeddings().weight[[9, 7]])
        layer.vectors().sum().backward()
        assert layer.shared.grad.any()
        assert layer.cols.grad.abs().amax((0, 1)).min() > 0  # every rank can leave its start


def test_the_loss_of_the_first_phase_is_the_written_one(tiny: Any, randomise: Any, batch_for: Any) -> None:
    for family in ("llama", "bert-masked", "bert-classes", "t5"):
        host = several(tiny, randomise, family)
        host.attach(PromptTuning(length=2), "teacher")
        model, batch = host.model, batch_for(host.model)
        found = MPT(length=P, tasks=3, rank=2, distil=0.7).distilled(host, "default", 1, "teacher", batch)
        with torch.no_grad():
            with host.using("teacher"):
                t = model(**batch, output_hidden_states=True)
            with host.using("default"), MPT.choosing(host, "default", 1):
                s = model(**batch, output_hidden_states=True)
        states = [(x.decoder_hidden_states if family == "t5" else x.hidden_states)[-1].double() for x in (t, s)]
        real = batch["labels"] != -100 if family == "t5" else batch["attention_mask"] == 1
        square = torch.stack([(a - b) ** 2 for a, b in zip(states[0][real], states[1][real], strict=True)]).mean()
        pairs = list(zip(t.logits.flatten(0, -2), s.logits.flatten(0, -2), strict=True))
        labels = batch["labels"] if family != "llama" else F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        told = [pair for pair, label in zip(pairs, labels.flatten().tolist(), strict=True) if label != -100]
        p, q = (torch.stack(x).double().softmax(-1) for x in zip(*told, strict=True))
        kl = (p * (p / q).log()).sum(-1).mean()
        assert abs(float(found.detach()) - float(s.loss + 0.7 * (kl + square))) < 1e-4


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_row_has_its_task(family: str, tiny: Any, randomise: Any, batch_for: Any) -> None:
    host = several(tiny, randomise, family)
    ids, alone = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(5)), []
    more = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    answers = []
    for row, task in enumerate((2, 0, 1)):
        with MPT.choosing(host, "default", task), torch.no_grad():
            alone.append(host.model(input_ids=ids, **more).logits[row])
            answers.append(host.model.generate(ids, num_beams=2, **QUIET)[row])
    with MPT.choosing(host, "default", [2, 0, 1]), torch.no_grad():
        assert (host.model(input_ids=ids, **more).logits - torch.stack(alone)).abs().max() < 1e-5
        for cache in (True, False):
            assert torch.equal(host.model.generate(ids, num_beams=2, use_cache=cache, **QUIET), torch.stack(answers))
        with pytest.raises(ConfigError, match=r"3 rows.*has 2"):
            host.model(input_ids=ids[:2], **{key: value[:2] for key, value in more.items()})


# ---------------------------------------------------------------------- files


def test_the_shared_part_is_one_folder_and_each_task_a_small_one(
    tiny: Any, randomise: Any, batch_for: Any, logits: Any, tmp_path: Any
) -> None:
    host = several(tiny, randomise)
    folder = host.save(tmp_path / "shared")
    for task in (0, 2, None):
        model = tiny("llama")
        method = MPT(length=P, rank=2, source=str(folder), source_task=task, share=True)
        found = al.attach(model, method, f"task-{task}")
        assert list(found.methods) == [f"task-{task}"]
        layer: Any = layer_of(found, f"task-{task}")
        other: Any = layer_of(host, "default")
        wanted = other.cols.mean(0) if task is None else other.cols[task]
        assert torch.equal(layer.cols[0], wanted)
        assert torch.equal(layer.shared, other.shared)
        assert found.summary().trainable == 2 * (P + 32)
        randomise(found)
        small = found.save(tmp_path / f"task-{task}")
        assert sum(v.numel() for v in found.tensors(f"task-{task}").values()) == 2 * (P + 32)
        again = al.load(tiny("llama"), small)
        batch = batch_for(model)
        assert torch.equal(logits(again.model, batch), logits(model, batch))


def test_factors_have_a_rate_of_their_own_and_no_decay(tiny: Any) -> None:
    host = al.attach(tiny("llama"), MPT(length=P, ratio=2))
    made = host.methods["default"].optimizer(host, "default", functools.partial(adamw, lr=0.1, weight_decay=0.5))
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in made.param_groups) == [
        (0.1, 0.5, 1), (0.2, 0.0, 2)
    ]  # fmt: skip


def test_bad_settings_say_what_to_do(tiny: Any, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="share and source_task need a source"):
        MPT(share=True)
    model = tiny("llama")
    host = al.attach(model, MPT(length=P, tasks=2), "two")
    host.attach(PromptTuning(length=P), "plain")
    for settings, message in (
        ({"source": "plain"}, "should be an mpt adapter"),
        ({"source": "two", "rank": 2}, "length, width and rank"),
        ({"source": "two", "source_task": 2}, "'two' has 2 tasks"),
    ):
        with pytest.raises(AttachError, match=message):
            host.attach(MPT(length=P, **settings), "new")
    with pytest.raises(ConfigError, match="tasks=1"):
        host.learn_from({"plain": [batch_of(host, "plain", 0)]}, "two", steps=1)
    with pytest.raises(ConfigError, match="tasks 0 to 1, and 2"), MPT.choosing(host, "two", 2):
        pass
    with pytest.raises(ConfigError, match=r"tasks=2, and a run trains one"):
        host.methods["two"].begin(host, "two", 5)
    with MPT.choosing(host, "two", [0, 1]):
        host.methods["two"].begin(host, "two", 5)
    host.attach(MPT(length=P), "one")
    with pytest.raises(DataError, match="'plain'"):
        host.learn_from({"plain": []}, "one", steps=1)
    with pytest.raises(ConfigError, match="prompt_tuning learns nothing"):
        host.learn_from({"one": []}, "plain", steps=1)


PROMPTS, PRODUCTS, KL, STATES = MPT.Layer.prompts, MPT.Layer.products, MPT.of_logits, MPT.of_states
TAKE = MPT.take_from_source


def _reversed(host: Any, out: Any, wanted: Any, batch: Any) -> Tensor:
    return KL(host, wanted, out, batch)


def _not_taken(self: Any, host: Any, name: str, layer: Any, factors: bool) -> None:
    TAKE(self, host, name, layer, False)


BROKEN: dict[str, Mutation] = {
    "no factors": (MPT.Layer, "products", lambda self, tasks: torch.ones_like(PRODUCTS(self, tasks))),
    "first rank alone": (
        MPT.Layer, "products", lambda self, tasks: self.cols[tasks][..., :1] @ self.rows[tasks][:, :1]
    ),
    "one task for all": (MPT.Layer, "products", lambda self, tasks: PRODUCTS(self, 0 * tasks)),
    "a sum and no product": (MPT.Layer, "prompts", lambda self: self.shared + self.products(self.chosen)),
    "KL the other way": (MPT, "of_logits", staticmethod(_reversed)),
    "no KL": (MPT, "of_logits", staticmethod(lambda *args: 0.0)),
    "no hidden states": (MPT, "of_states", staticmethod(lambda *args: 0.0)),
    "states not squared": (MPT, "of_states", staticmethod(lambda *args: STATES(*args).sqrt())),
    "the source's factors are forgotten": (MPT, "take_from_source", _not_taken),
    "decay of the factors": (MPT, "tensor_options", lambda self: {}),
    "starts elsewhere": begun(MPT.Layer, lambda layer, method: layer.cols.mul_(0.02)),
    "ranks that are stuck": begun(MPT.Layer, lambda layer, method: layer.rows[:, 1:].zero_()),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_prompt_is_the_written_one,
    test_it_starts_as_the_shared_prompt_itself,
    test_the_loss_of_the_first_phase_is_the_written_one,
    test_factors_have_a_rate_of_their_own_and_no_decay,
    test_the_shared_part_is_one_folder_and_each_task_a_small_one,
    lines=BROKEN,
)
