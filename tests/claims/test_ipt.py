"""Intrinsic prompt tuning: in a space learned from prompts of other tasks a few numbers do most of a prompt's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.prompt._input_prompt import layer_of
from adapterlab.methods.prompt.ipt import IPT, Decoder
from adapterlab.methods.prompt.prompt_tuning import PromptTuning

P, FACTORS, SOURCES, HELD_OUT = 4, 3, 20, 4
SPACE: dict[str, Any] = {"length": P, "size": 4, "hidden": 24}


def true_prompts() -> Tensor:
    """Prompts of tasks that three hidden numbers make: `[tasks, P, d]`."""
    draw = torch.Generator().manual_seed(3)
    ways = torch.randn(FACTORS + 1, P, 32, generator=draw)
    mixed = torch.randn(SOURCES + HELD_OUT, FACTORS, generator=draw)
    return ways[0] + torch.einsum("tf,fpd->tpd", mixed, ways[1:])


def ids(seed: int, rows: int = 8) -> Tensor:
    return torch.randint(3, 128, (rows, 6), generator=torch.Generator().manual_seed(seed))


def with_prompts(model: Any, prompts: Tensor) -> tuple[al.Host, list[str]]:
    """A host whose adapters t0, t1, ... are these prompts."""
    names = [f"t{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        host = al.attach(model, PromptTuning(length=P), name)
        with torch.no_grad():
            host.parameters(name)[0].copy_(prompt)
    return host, names


def answers(host: al.Host, name: str, x: Tensor) -> Tensor:
    with host.using(name), torch.no_grad():
        return host.model(x).logits.log_softmax(-1)


def batches(host: al.Host, name: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Rows whose labels are what the model says with a task's prompt."""
    found = []
    for seed in range(count):
        x = ids(seed)
        best = answers(host, name, x).argmax(-1)
        found.append({"input_ids": x, "labels": torch.cat([torch.full_like(best[:, :1], -100), best[:, :-1]], 1)})
    return found


def distance(host: al.Host, x: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(host.model(x).logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def tuned(host: al.Host, method: al.Method, task: str, steps: int = 60) -> float:
    """Divergence from a task's model after tuning."""
    torch.manual_seed(1)
    host.attach(method, "new")
    host.methods["new"].begin(host, "new", steps)
    targets = [(ids(seed), answers(host, task, ids(seed))) for seed in range(3)]
    host.activate("new")
    optimizer = torch.optim.Adam(host.parameters("new"), lr=0.1)
    for step in range(steps):
        loss = distance(host, *targets[step % 3])
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = float(sum(distance(host, *target) for target in targets))
    host.detach("new")
    return found


@pytest.mark.slow
def test_a_few_numbers_recover_most_of_a_prompt(tiny: Any) -> None:
    torch.manual_seed(0)
    host, names = with_prompts(tiny("llama"), true_prompts())
    host.attach(IPT(**SPACE), "space")
    host.learn_from(dict.fromkeys(names[:SOURCES], ()), "space", steps=300, lr=1e-2)
    recovered: dict[str, float] = {"learned": 0.0, "random": 0.0}
    for task in names[SOURCES:]:
        with host.using(), torch.no_grad():
            base = float(sum(distance(host, ids(seed), answers(host, task, ids(seed))) for seed in range(3)))
        plain = tuned(host, PromptTuning(length=P), task)
        for kind, method in (("learned", IPT(**SPACE, source="space")), ("random", IPT(**SPACE, random=True))):
            recovered[kind] += (base - tuned(host, method, task)) / (base - plain) / HELD_OUT
    assert recovered["learned"] >= 0.7
    assert recovered["random"] <= recovered["learned"] - 0.2


def test_the_decoder_is_the_written_one(tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny("llama"), IPT(**SPACE, random=True))
    randomise(host)
    layer: Any = layer_of(host, "default")
    (w2, b2), (w3, b3) = ((m.weight.double(), m.bias.double()) for m in (layer.decoder.inner, layer.decoder.outer))
    wanted = w3 @ torch.tanh(w2 @ layer.z.double() + b2) + b3
    assert torch.allclose(layer.vectors().double().flatten(), wanted, atol=1e-6)
    assert host.summary().trainable == 4


def test_the_loss_of_the_first_phase_is_the_written_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CE with the decoded prompt + α times the mean square, in the first step of a rate of almost nothing."""
    kept: list[Any] = []
    make = torch.nn.Linear

    def seen(*sizes: Any, **options: Any) -> Any:
        kept.append(make(*sizes, **options))
        return kept[-1]

    for data in (False, True):
        torch.manual_seed(0)
        host, names = with_prompts(tiny("llama"), true_prompts()[:3])
        host.attach(IPT(**SPACE, alpha=3.0), "space")
        given = {name: batches(host, name, 1) if data and name == "t1" else () for name in names}
        given = {"t1": given["t1"]} if data else given
        monkeypatch.setattr(torch.nn, "Linear", seen)
        (first,) = host.learn_from(given, "space", steps=1, lr=1e-12)
        monkeypatch.setattr(torch.nn, "Linear", make)
        layer: Any = layer_of(host, "space")
        prompts = torch.stack([host.parameters(name)[0].detach() for name in given])
        made = layer.decoder(kept[-1](prompts.flatten(1))).view_as(prompts).detach()
        wanted = 3.0 * float(((made - prompts).double() ** 2).mean())
        if data:
            host.attach(PromptTuning(length=P), "coded")
            with torch.no_grad():
                host.parameters("coded")[0].copy_(made[0])
            host.activate("coded")
            wanted += float(host.model(**given["t1"][0]).loss.detach())
        assert abs(first - wanted) < 1e-4
        assert [p.requires_grad for p in layer.decoder.parameters()] == [False] * 4


def test_the_tasks_own_loss_shapes_the_space(tiny: Any) -> None:
    """With their data two numbers serve three tasks better than by reconstruction alone."""
    found = {}
    for data in (False, True):
        torch.manual_seed(0)
        host, names = with_prompts(tiny("llama"), true_prompts()[:3])
        host.attach(IPT(length=P, size=1, hidden=8, alpha=0.01), "space")
        tasks = {name: batches(host, name) for name in names}
        given = tasks if data else dict.fromkeys(names, ())
        losses = host.learn_from(given, "space", steps=200, lr=2e-2)
        assert sum(losses[-20:]) < sum(losses[:20])
        layer: Any = layer_of(host, "space")
        found[data] = layer.vectors().detach()
        host.activate("space")
        found[data] = sum(float(host.model(**batch).loss.detach()) for rows in tasks.values() for batch in rows)
    assert found[True] < found[False]


def test_the_space_is_saved_and_taken(tiny: Any, batch_for: Any, logits: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    host, names = with_prompts(model, true_prompts()[:3])
    host.attach(IPT(**SPACE), "space")
    host.learn_from(dict.fromkeys(names, ()), "space", steps=20, lr=1e-2)
    folder = host.save(tmp_path / "space", "space")
    fresh = al.attach(tiny("llama"), IPT(**SPACE, source=str(folder)), "new")
    assert list(fresh.methods) == ["new"]
    theirs: Any = layer_of(host, "space")
    ours: Any = layer_of(fresh, "new")
    assert all(torch.equal(a, b) for a, b in zip(ours.decoder.parameters(), theirs.decoder.parameters(), strict=True))
    assert not torch.equal(ours.z, theirs.z)
    saved = fresh.save(tmp_path / "new")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    batch = batch_for(model)
    again = al.load(tiny("llama"), saved)  # the space came with it
    assert torch.equal(logits(again.model, batch), logits(fresh.model, batch))
    assert again.state_dict("new").keys() == fresh.state_dict("new").keys()
    (saved / "method.json").unlink()
    plain = al.load(tiny("llama"), saved)
    assert plain.methods["default"].id == "prompt_tuning"
    assert (logits(plain.model, batch) - logits(fresh.model, batch)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert-classes", "bert-masked", "t5"])
def test_both_phases_on_encoders(family: str, tiny: Any, batch_for: Any, logits: Any) -> None:
    torch.manual_seed(0)
    host, names = with_prompts(tiny(family), true_prompts()[:3])
    host.attach(IPT(length=P, size=2, hidden=8, alpha=1.0), "space")
    batch = batch_for(host.model)
    losses = host.learn_from({name: [batch] for name in names}, "space", steps=60, lr=1e-2)
    assert sum(losses[-10:]) < sum(losses[:10])
    host.attach(IPT(length=P, size=2, hidden=8, source="space"), "new")
    host.activate("new")
    host.verify(batch)
    before = logits(host.model, batch)
    with torch.no_grad():
        host.parameters("new")[0].add_(1)
    assert (logits(host.model, batch) - before).abs().max() > 1e-4


def test_bad_settings_say_what_to_do(tiny: Any, batch_for: Any) -> None:
    with pytest.raises(ConfigError, match="two spaces"):
        IPT(random=True, source="a")
    host, names = with_prompts(tiny("llama"), true_prompts()[:2])
    host.attach(IPT(**SPACE), "space")
    with pytest.raises(ConfigError, match=r"no space.*learn_from"):
        host.methods["space"].begin(host, "space", 10)
    host.attach(IPT(**{**SPACE, "length": 3}), "short")
    with pytest.raises(ConfigError, match=r"4 virtual tokens.*length=4"):
        host.learn_from(dict.fromkeys(names, ()), "short", steps=1)
    host.attach(al.LoRA(r=2), "lora")
    with pytest.raises(ConfigError, match="puts no vectors"):
        host.learn_from({"lora": ()}, "space", steps=1)
    with pytest.raises(AttachError, match="should be an ipt adapter"):
        host.attach(IPT(**SPACE, source="t0"), "new")
    with pytest.raises(AttachError, match="length, size and hidden"):
        host.attach(IPT(**SPACE, source="short"), "new")


FORWARD, VECTORS, TAKE = Decoder.forward, IPT.Layer.vectors, IPT.take_from_source
APART: Callable[..., Tensor] = IPT.apart
BROKEN: dict[str, Mutation] = {
    "no tanh": (Decoder, "bent", staticmethod(lambda x: x)),
    "another nonlinearity": (Decoder, "bent", staticmethod(F.gelu)),
    "no b3": (Decoder, "forward", lambda self, z: FORWARD(self, z) - self.outer.bias),
    "vectors in another order": (IPT.Layer, "vectors", lambda self: VECTORS(self).flip(0)),
    "z does nothing": (IPT.Layer, "vectors", lambda self: VECTORS(self).detach()),
    "a sum of squares": (IPT, "apart", staticmethod(lambda made, wanted: APART(made, wanted) * made.numel())),
    "nothing is reconstructed": (IPT, "apart", staticmethod(lambda made, wanted: 0 * APART(made, wanted))),
    "no loss of the task": (IPT, "task_loss", staticmethod(lambda *args: 0 * args[3].sum())),
    "the source is forgotten": (IPT, "take_from_source", lambda self, host, name, layer: layer.decoder.reset()),
}
test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_decoder_is_the_written_one,
    test_the_loss_of_the_first_phase_is_the_written_one,
    test_the_space_is_saved_and_taken,
    test_a_few_numbers_recover_most_of_a_prompt,
    lines=BROKEN,
)
