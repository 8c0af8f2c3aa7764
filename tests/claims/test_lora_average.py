"""Averages of LoRAs: the exact mean of their changes whatever their form, and the mean of factors, which is less."""

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
from adapterlab.errors import AttachError, ConfigError, FormatError
from adapterlab.methods.mixture import _library, lora_average
from adapterlab.methods.mixture._library import MixedLibrary
from adapterlab.methods.mixture.lora_average import LoRAAverage, truncated
from adapterlab.train.loop import train

UNLIKE = {
    "one": {"r": 4, "alpha": 4.0, "targets": ["q", "down"]},
    "two": {"r": 2, "alpha": 6.0, "targets": ["q", "down"]},
    "three": {"r": 3, "alpha": 3.0, "scale": "sqrt", "targets": ["q"]},
}
ALIKE = {part: {"r": 2, "alpha": alpha, "targets": ["q"]} for part, alpha in (("one", 2.0), ("two", 6.0))}
PATHS = {"llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")}


def added(host: Any, path: str, name: str) -> tuple[Tensor, Tensor]:
    """What an adapter adds at a module for some inputs, and these."""
    module = host.module(path)
    x = torch.randn(5, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with host.using():
            base = module(x)
        with host.using(name):
            return module(x) - base, x


def test_deltas(tiny: Any) -> None:
    """Ranks, scales and targets differ: Σ w_i s_i B_i A_i exactly, and what leaves a module alone counts 0 there."""
    model = tiny("llama").double()
    adapters = put(model, UNLIKE)
    for weights in (None, {"one": 0.5, "two": -1.0, "three": 2.0}):
        host = al.attach(model, LoRAAverage(adapters=adapters, weights=weights), "mean")
        for path in PATHS["llama"]:
            factors = at(host, path, list(UNLIKE))
            found, x = added(host, path, "mean")
            w = weights or dict.fromkeys(UNLIKE, 1 / 3)
            wanted = sum(w[part] * s * (x @ a.T @ b.T) for part, (a, b, s) in factors.items())
            assert len(factors) == (3 if path.endswith("q_proj") else 2)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        host.detach("mean")


def test_factors(tiny: Any) -> None:
    """(Σ w_i s_i B_i) (Σ w_i A_i): products of one adapter's B with another's A are in it."""
    model = tiny("llama").double()
    host = al.attach(model, LoRAAverage(adapters=put(model, ALIKE), mix="factors"), "mean")
    path = PATHS["llama"][0]
    parts = at(host, path, list(ALIKE)).values()
    found, x = added(host, path, "mean")
    wanted = sum(s * (x @ a.T @ b.T) / 4 for a, _, _ in parts for _, b, s in parts)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_rank(tiny: Any) -> None:
    """The best approximation: its error is that of the singular values left out, and none at the sum of the ranks."""
    path = PATHS["llama"][0]
    for rank, exact in ((3, False), (9, True)):
        model = tiny("llama").double()
        adapters = put(model, UNLIKE)
        host = al.attach(model, LoRAAverage(adapters=adapters, rank=rank), "mean")
        part: Any = host.adapters("mean")[path]
        wanted = sum(s * b @ a / 3 for a, b, s in at(host, path, list(UNLIKE)).values())
        assert len(part.A) == rank
        values = torch.linalg.svdvals(wanted)
        error = torch.linalg.norm(part.delta().detach() - wanted)
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-6, atol=1e-9)
        assert bool(error < 1e-9) == exact
        if not exact:  # the sizes are shared out equally
            torch.testing.assert_close(part.A.norm(), part.B.norm())


def sizes(count: int = 8) -> float:
    """Size of averaged factors beside that of averaged changes, for independent adapters."""
    norms = {}
    for mix in ("factors", "deltas"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        adapters = put(model, {f"p{i}": {"r": 4, "targets": ["0"]} for i in range(count)})
        part: Any = al.attach(model, LoRAAverage(adapters=adapters, mix=mix), "mean").adapters("mean")["0"]
        norms[mix] = float(part.delta().norm())
    return norms["factors"] / norms["deltas"]


def test_averaged_factors_are_smaller() -> None:
    """N² independent terms of weight 1/N² instead of N of weight 1/N: 1/√N of the size."""
    assert sizes() == pytest.approx(8**-0.5, rel=0.1)


def test_peft_combines_alike(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    """The folders of two adapters, averaged here and by PEFT's `cat`; and PEFT reads what is saved."""
    model = tiny("llama")
    host = al.host(model) or al.attach(model, al.LoRA(), "gone")
    host.detach("gone")
    two = {part: UNLIKE[part] for part in ("one", "two")}
    put(model, two)
    host = al.host(model)
    for part in two:
        host.save(tmp_path / part, part)
    fresh = tiny("llama")
    adapters = {part: str(tmp_path / part) for part in two}
    mean = al.attach(fresh, LoRAAverage(adapters=adapters))
    batch = batch_for(fresh)
    found = logits(fresh, batch)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), adapters["one"], "one")
    theirs.load_adapter(adapters["two"], "two")
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", combination_type="cat")
    theirs.set_adapter("mean")
    torch.testing.assert_close(logits(theirs.eval(), batch), found, rtol=1e-4, atol=1e-4)
    mean.save(tmp_path / "mean")
    read = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "mean").eval()
    torch.testing.assert_close(logits(read, batch), found, rtol=1e-4, atol=1e-4)
    (tmp_path / "mean" / "method.json").unlink()
    again = al.load(tiny("llama"), tmp_path / "mean")
    assert again.methods["default"].id == "lora"
    torch.testing.assert_close(logits(again.model, batch), found)


def test_adapters_that_do_not_fit_each_other(tiny: Any) -> None:
    """Errors name both, and what else there is; the model stays as it was."""
    model = tiny("llama")
    adapters = put(model, {**UNLIKE, "base": {"targets": ["q"], "bias": "all"}, "embedding": {"targets": ["embed"]}})
    al.attach(model, al.DoRA(targets=["q"]), "dora")
    for parts, mix, message in (
        (
            ("one", "three"),
            "factors",
            r"adapters\['one'\] adapts .*down_proj and adapters\['three'\] does not.*mix=deltas",
        ),
        (("one", "two"), "factors", r"'one'\] has rank 4 and adapters\['two'\] rank 2.*mix=deltas"),
        (("embedding",), "deltas", r"adapters\['embedding'\] \(lora\) has at .*embed_tokens what is no plain low-rank"),
        (("dora",), "deltas", r"adapters\['dora'\] \(dora\) .*adapterlab export"),
    ):
        with pytest.raises(AttachError, match=message):
            al.attach(model, LoRAAverage(adapters={p: p for p in parts}, mix=mix), "mean")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"adapters\['gone'\]: .*holds no adapter"):
        al.attach(model, LoRAAverage(adapters={"gone": "no/such/folder"}), "mean")
    host: Any = al.host(model)
    assert "mean" not in host.methods
    assert set(host.methods) == {*adapters, "dora"}
    with pytest.raises(ConfigError, match="same parts as adapters: one, two"):
        LoRAAverage(adapters={"one": "one", "two": "two"}, weights={"one": 1.0})
    with pytest.raises(ConfigError, match="rank=4 goes with mix='deltas'"):
        LoRAAverage(adapters={"one": "one"}, mix="factors", rank=4)


def test_adapters_of_two_base_models(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    put(model, UNLIKE)
    host: Any = al.host(model)
    for part, base in (("one", "org/first"), ("two", "org/second")):
        host.save(tmp_path / part, part, base_model=base)
    adapters = {part: str(tmp_path / part) for part in ("one", "two")}
    with pytest.raises(FormatError, match=r"adapters\['one'\] was made for .*org/first.*adapters\['two'\].*org/second"):
        al.attach(tiny("llama"), LoRAAverage(adapters=adapters))


def test_there_is_nothing_to_train(tiny: Any) -> None:
    model = tiny("llama")
    host = al.attach(model, LoRAAverage(adapters=put(model, ALIKE)), "mean")
    assert not host.parameters("mean")
    with pytest.raises(ConfigError, match=r"lora_average has nothing to train.*adapterlab evaluate"):
        train(host, "mean", [{"input_ids": [3, 4], "labels": [3, 4]}])


def _smallest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = _library.thin_svd(a, b)
    root = s[-rank:].sqrt()
    return root[:, None] * vh[-rank:], u[:, -rank:] * root


def _one_sided(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    a, b = truncated(a, b, rank)
    size = a.norm(dim=1, keepdim=True)
    return a * size, b / size.T


def _mixed(change: Any) -> Mutation:
    """Other updates than those of the parts."""
    mixed = _library.mixed
    return (
        lora_average, "mixed",
        lambda updates, weights, mix: mixed(*change(dict(updates), dict(weights)), mix),
    )  # fmt: skip


LINES: dict[str, Mutation] = {
    "no scales": _mixed(lambda u, w: ({k: v._replace(scale=1.0) for k, v in u.items()}, w)),
    "a sum": _mixed(lambda u, w: (u, dict.fromkeys(w, 1.0))),
    "shares of those that are there": _mixed(lambda u, w: (u, {k: v * len(w) / len(u) for k, v in w.items()})),
    "one adapter only": _mixed(lambda u, w: (dict(list(u.items())[:1]), w)),
    "factors for deltas": (lora_average, "mixed", lambda u, w, mix: _swapped(u, w)),
    "deltas for factors": (lora_average, "mixed", lambda u, w, mix: _deltas(u, w, "deltas")),
    "the smallest directions": (lora_average, "truncated", _smallest),
    "A has all of the size": (lora_average, "truncated", _one_sided),
    "no approximation": (lora_average, "truncated", lambda a, b, rank: (a, b)),
}
_deltas = _library.mixed


def _swapped(updates: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """The factors averaged, the shorter ones filled up with zeros."""
    a, b = _deltas(updates, weights, "deltas")
    ones = _deltas(updates, dict.fromkeys(weights, 1.0), "deltas")[1]
    rank = max(len(u.A) for u in updates.values())
    top, left = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
    at = 0
    for part, update in updates.items():
        r = len(update.A)
        top[:r] += weights[part] * update.A
        left[:, :r] += weights[part] * ones[:, at : at + r]
        at += r
    return top, left


test_broken_lines_are_caught = fails_without(test_deltas, test_factors, test_rank, lines=LINES)


def test_the_parts_are_not_needed_any_more(tiny: Any, batch_for: Any, logits: Any, tmp_path: Path) -> None:
    """Saved and loaded without the adapters it was made of; merged it answers alike."""
    model = tiny("gpt2")
    host = al.attach(model, LoRAAverage(adapters=put(model, {p: {"targets": ["qkv", "o"]} for p in "ab"})), "mean")
    host.activate("mean")
    batch = batch_for(model)
    wanted = logits(model, batch)
    host.save(tmp_path / "mean", "mean")
    again = al.load(tiny("gpt2"), tmp_path / "mean")
    assert torch.equal(logits(again.model, batch), wanted)
    assert isinstance(again.methods["mean"], MixedLibrary)
    again.merge()
    torch.testing.assert_close(logits(again.model, batch), wanted, rtol=1e-4, atol=1e-4)
