"""Arrow: tokens find the expert whose update amplifies them, without training and without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mutations import Mutation, fails_without
from saved_loras import at, put
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.methods.mixture import arrow
from adapterlab.methods.mixture._library import Update
from adapterlab.methods.mixture.arrow import Arrow
from adapterlab.train.loop import train

LAYER = Arrow.Layer
THREE = {
    part: {"r": 3, "alpha": alpha, "targets": ["q", "down"]} for part, alpha in (("a", 3.0), ("b", 1.0), ("c", 6.0))
}


def accuracy(experts: int = 8, width: int = 256, rank: int = 4) -> float:
    """How often the first expert of a unit vector in the rows of one A is that one."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    adapters = put(model, {f"e{i}": {"r": rank, "targets": ["0"]} for i in range(experts)})
    host = al.attach(model, Arrow(adapters=adapters, top_k=1), "arrow")
    part: Any = host.adapters("arrow")["0"]
    draw = torch.Generator().manual_seed(1)
    which = torch.arange(400) % experts
    x = torch.einsum("nr,nri->ni", torch.randn(400, rank, generator=draw), part.A[which])
    with torch.no_grad():
        found = part.weights(x / x.norm(dim=-1, keepdim=True)).argmax(-1)
    return float((found == which).float().mean())


def test_claim() -> None:
    """Chance is 1 in 8."""
    assert accuracy() >= 0.7


def by_hand(factors: Any, x: Tensor, top_k: int, temperature: float, mix: str) -> Tensor:
    """Token after token, with a decomposition of each ΔW."""
    out = []
    for token in x:
        scores = torch.stack([(torch.linalg.svd(s * b @ a).Vh[0] @ token).abs() / temperature for a, b, s in factors])
        chosen = scores.argsort(descending=True)[:top_k].tolist()
        shares = {e: scores[e].exp() / sum(scores[o].exp() for o in chosen) for e in chosen}
        if mix == "outputs":
            out.append(sum(c * factors[e][2] * (factors[e][1] @ (factors[e][0] @ token)) for e, c in shares.items()))
        else:
            a = sum(c * factors[e][0] for e, c in shares.items())
            out.append(sum(c * factors[e][2] * factors[e][1] for e, c in shares.items()) @ (a @ token))
    return torch.stack(out)


@pytest.mark.parametrize("mix", ["outputs", "factors"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_formula(kind: str, mix: Any, tiny: Any) -> None:
    """In float64, also on a transposed weight, with scales that differ; and −x goes where x goes."""
    check_formula(
        tiny(kind).double(), mix, {"llama": "model.layers.0.mlp.down_proj", "gpt2": "transformer.h.0.mlp.c_proj"}[kind]
    )


def check_formula(model: Any, mix: Any, path: str) -> None:
    adapters = put(model, {part: {**fields, "targets": ["down"]} for part, fields in THREE.items()})
    host = al.attach(model, Arrow(adapters=adapters, top_k=2, temperature=0.7, mix=mix), "arrow")
    x = torch.randn(1, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    factors = list(at(host, path, list(THREE)).values())
    wanted = by_hand(factors, x[0], 2, 0.7, mix)
    module = host.module(path)
    with torch.no_grad():
        with host.using():
            base = module(x)
        with host.using("arrow"):
            torch.testing.assert_close(module(x)[0], base[0] + wanted, rtol=1e-8, atol=1e-9)
            part: Any = host.adapters("arrow")[path]
            torch.testing.assert_close(part.added(-x), -part.added(x))


def test_outputs(tiny: Any) -> None:
    check_formula(tiny("llama").double(), "outputs", "model.layers.0.mlp.down_proj")


def test_averaged_factors(tiny: Any) -> None:
    check_formula(tiny("llama").double(), "factors", "model.layers.0.mlp.down_proj")


def test_general_knowledge_is_subtracted(tiny: Any) -> None:
    """From the A and the B of every expert the mean A and the mean B, before the directions are found."""
    model = tiny("llama").double()
    general = {part: {"r": 3, "alpha": 5.0, "targets": ["q", "down"]} for part in ("g", "h")}
    put(model, {**THREE, **general})
    host = al.attach(model, Arrow(adapters={p: p for p in THREE}, general={p: p for p in general}), "arrow")
    path = "model.layers.1.self_attn.q_proj"
    every = at(host, path, [*THREE, *general])
    mean_a, mean_b = (sum(every[g][i] for g in general) / 2 for i in (0, 1))
    experts = [(a - mean_a, b - mean_b, s) for a, b, s in (every[p] for p in THREE)]
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    part: Any = host.adapters("arrow")[path]
    torch.testing.assert_close(part.added(x), by_hand(experts, x, 3, 1.0, "outputs"), rtol=1e-8, atol=1e-9)


def test_directions_follow_the_experts(tiny: Any) -> None:
    """They are computed once, and anew when an expert changes; the sign of a pair of factors means nothing."""
    model = tiny("llama").double()
    host = al.attach(model, Arrow(adapters=put(model, THREE), top_k=1), "arrow")
    part: Any = host.adapters("arrow")["model.layers.0.self_attn.q_proj"]
    first = part.directions()
    assert part.directions() is first
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = part.weights(x), part.added(x)
    with torch.no_grad():
        part.A[1] *= -1
        part.B[1] *= -1
    torch.testing.assert_close((part.weights(x), part.added(x)), before)
    with torch.no_grad():
        part.A[1], part.A[2] = part.A[2].clone(), part.A[1].clone()
        part.B[1], part.B[2] = part.B[2].clone(), part.B[1].clone()
    torch.testing.assert_close(part.weights(x), before[0][:, [0, 2, 1]])


def test_ranks_may_differ(tiny: Any) -> None:
    model = tiny("llama").double()
    parts = {"a": {"r": 1, "targets": ["q"]}, "b": {"r": 4, "alpha": 2.0, "targets": ["q"]}}
    host = al.attach(model, Arrow(adapters=put(model, parts)), "arrow")
    path = "model.layers.0.self_attn.q_proj"
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    part: Any = host.adapters("arrow")[path]
    wanted = by_hand(list(at(host, path, list(parts)).values()), x, 2, 1.0, "outputs")
    torch.testing.assert_close(part.added(x), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gks", [False, True])
def test_peft_routes_alike(gks: bool, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    """PEFT's `create_arrow_model` of the folders that we write, and ours of those that PEFT writes."""
    model = tiny("llama")
    put(model, {f"e{i}": {"r": 2, "alpha": 2.0, "targets": ["q", "v"]} for i in range(4)}, size=0.2)
    host: Any = al.host(model)
    for part in list(host.methods):
        for layer in host.adapters(part).values():
            with torch.no_grad():  # PEFT's few iterations need singular values that lie apart
                layer.A[1] *= 0.1
                layer.B[:, 1] *= 0.1
        host.save(tmp_path / part, part)
    folders = [str(tmp_path / f"e{i}") for i in range(4)]
    config = peft.ArrowConfig(top_k=2, router_temperature=0.5, use_gks=gks, rng_seed=0)
    theirs = peft.create_arrow_model(
        tiny("llama"), folders[:3], config, general_adapter_paths=folders[3:] if gks else None
    ).eval()
    batch = batch_for(model)
    general = {"e3": folders[3]} if gks else {}
    chosen = {"general": general, "top_k": 2, "temperature": 0.5}
    ours = al.attach(tiny("llama"), Arrow(adapters=dict(zip("abc", folders, strict=False)), **chosen))
    wanted = logits(theirs, batch)
    assert (wanted - logits(tiny("llama"), batch)).abs().max() > 0.01
    torch.testing.assert_close(logits(ours.model, batch), wanted, rtol=1e-3, atol=1e-3 if gks else 1e-4)
    if not gks:
        theirs.save_pretrained(tmp_path / "peft", selected_adapters=["task_0", "task_1", "task_2"])
        places = {f"t{i}": str(tmp_path / "peft" / f"task_{i}") for i in range(3)}
        again = al.attach(tiny("llama"), Arrow(adapters=places, **chosen))
        torch.testing.assert_close(logits(again.model, batch), logits(ours.model, batch))


def test_refusals(tiny: Any) -> None:
    model = tiny("llama-tied")
    put(model, {**THREE, "short": {"r": 2, "targets": ["q", "down"]}, "few": {"r": 3, "targets": ["q"]}})
    put(model, {"tied": {"targets": ["head"]}})
    for parts, options, message in (
        (("a", "few"), {}, r"adapters\['a'\] adapts .*down_proj and adapters\['few'\] does not"),
        (("a", "short"), {"mix": "factors"}, r"'a'\] has rank 3 and adapters\['short'\] rank 2.*mix=outputs"),
        (("a",), {"general": {"short": "short"}}, r"'a'\] has rank 3 and adapters\['short'\] rank 2"),
        (("tied",), {}, "arrow cannot adapt lm_head: its weight is tied"),
    ):
        with pytest.raises(AttachError, match=message):
            al.attach(model, Arrow(adapters={p: p for p in parts}, **options), "arrow")
    host = al.attach(model, Arrow(adapters={"a": "a", "b": "b"}), "arrow")
    with pytest.raises(MergeError, match="router"):
        host.merge("arrow")
    with pytest.raises(ConfigError, match="arrow has nothing to train"):
        train(host, "arrow", [{"input_ids": [3, 4], "labels": [3, 4]}])
    with pytest.raises(ConfigError, match="top_k=3 is more than the 2 adapters"):
        Arrow(adapters={"a": "a", "b": "b"}, top_k=3)
    with pytest.raises(ConfigError, match="both have 'a'"):
        Arrow(adapters={"a": "a"}, general={"a": "b"})


def _as(mix: str) -> Mutation:
    """The other way of mixing."""

    def added(self: Any, x: Tensor) -> Tensor:
        kept, self.mix = self.mix, mix
        try:
            return _added(self, x)
        finally:
            self.mix = kept

    return (LAYER, "added", added)


def _scores(change: Any) -> Mutation:
    return (LAYER, "scores", lambda self, x: change(self, x, x @ self.directions().T))


def _weights(change: Any) -> Mutation:
    return (LAYER, "weights", lambda self, x: change(self.scores(x), _weigh(self, x)))


_added, _weigh, _purified = LAYER.added, LAYER.weights, Arrow.purified
LINES: dict[str, Mutation] = {
    "no absolute value": _scores(lambda self, x, z: z / self.temperature),
    "no temperature": _scores(lambda self, x, z: z.abs()),
    "x is normalised": _scores(lambda self, x, z: z.abs() / self.temperature / x.norm(dim=-1, keepdim=True)),
    "softmax before the choice": _weights(lambda z, w: torch.where(w > 0, z.softmax(-1), 0)),
    "all experts": _weights(lambda z, w: z.softmax(-1)),
    "equal shares": _weights(lambda z, w: (w > 0) / (w > 0).sum(-1, keepdim=True)),
    "the least aligned": _weights(lambda z, w: w.flip(-1)),
    "directions of A alone": (arrow, "amplified", lambda a, b: torch.linalg.svd(a, full_matrices=False).Vh[:, 0]),
    "the last direction": (arrow, "amplified", lambda a, b: arrow.thin_svd(a, b)[2][:, -1]),
    "the mean of A's rows": (arrow, "amplified", lambda a, b: torch.nn.functional.normalize(a.sum(1), dim=-1)),
    "factors where outputs are mixed": _as("factors"),
    "outputs where factors are mixed": _as("outputs"),
    "no scales": (Arrow, "purified", lambda self, u, every: _purified(self, u, every)._replace(scale=1.0)),
    "nothing is subtracted": (Arrow, "purified", lambda self, u, every: u),
    "the sum is subtracted": (
        Arrow,
        "purified",
        lambda self, u, every: Update(
            u.A - sum(every[g].A for g in self.general), u.B - sum(every[g].B for g in self.general), u.scale
        ),
    ),
    "only A is purified": (Arrow, "purified", lambda self, u, every: u._replace(A=_purified(self, u, every).A)),
    "directions are never found anew": (
        LAYER,
        "directions",
        lambda self: self.__dict__.setdefault("held", arrow.amplified(self.A, self.B)),
    ),
}


test_broken_lines_are_caught = fails_without(
    test_outputs, test_averaged_factors, test_general_knowledge_is_subtracted, test_directions_follow_the_experts,
    lines=LINES,
)  # fmt: skip
