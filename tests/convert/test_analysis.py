"""Figures of analyses against NumPy."""

from __future__ import annotations

import builtins
import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch

import adapterlab as al
from adapterlab.convert import AdapterChanges, ModelChanges, analyze, draw
from adapterlab.convert.analysis import cosine
from adapterlab.errors import MergeError, MissingDependencyError


def analysis(host: Any, name: str) -> Any:
    with host.using():
        return analyze(AdapterChanges(host, name))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", al.LoRA(r=3)), ("llama", al.DoRA(r=2)), ("gpt2", al.IA3()), ("llama-tied", al.Full())],
    ids=lambda v: getattr(v, "id", v),
)
def test_figures_are_those_of_the_merged_weights(tiny, put, weights_of, kind, method) -> None:
    host = put(tiny(kind), method, "a", size=0.05)
    before, after = weights_of(host), weights_of(host, "a", tied="untie")
    found = analysis(host, "a")
    for s in found.spectra:
        w, new = before[f"{s.path}.weight"].numpy(), after[f"{s.path}.weight"].numpy()
        if kind == "gpt2" or "embed" in s.path:
            w, new = w.T, new.T
        delta = new - w
        every = np.linalg.svd(delta, compute_uv=False)
        values = every[every > 1e-5 * every[0]]
        assert s.norm == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        assert s.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w), rel=1e-4)
        p = values / values.sum()
        assert s.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
        assert s.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        for k, share in s.energy.items():
            assert share == pytest.approx((values[:k] ** 2).sum() / (values**2).sum(), rel=1e-5)
        # The smallest that counts may lie on either side of the bound.
        np.testing.assert_allclose(s.singular_values, every[: len(s.singular_values)], rtol=1e-3, atol=1e-5)
        norms, moved = np.linalg.norm(w, axis=1), np.linalg.norm(new, axis=1)
        assert s.magnitude == pytest.approx(np.abs(moved - norms).mean(), rel=1e-3, abs=1e-6)
        turned = 1 - (w * new).sum(1) / norms / moved
        assert s.direction == pytest.approx(turned.mean(), rel=1e-3, abs=1e-6)
    xs, ys = [s.direction for s in found.spectra], [s.magnitude for s in found.spectra]
    assert found.correlation == pytest.approx(np.corrcoef(xs, ys)[0, 1], abs=1e-6)


def test_known_ranks(tiny) -> None:
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=4, alpha=4, targets=["q"]), "a")
    with torch.no_grad():
        for key, value in host.tensors("a").items():  # ΔW has the singular values 1, 1, 1, 1
            value.copy_(torch.eye(*value.shape) if key.endswith(("A", "B")) else value)
    for s in analysis(host, "a").spectra:
        assert len(s.singular_values) == s.rank == 4
        assert s.effective_rank == pytest.approx(4)
        assert s.stable_rank == pytest.approx(4)
        assert s.energy[1] == pytest.approx(0.25)
        assert s.energy[2] == pytest.approx(0.5)
        assert s.energy[4] == s.energy[8] == pytest.approx(1)


def test_pure_rescaling_and_pure_turning_are_told_apart(tiny) -> None:
    base, scaled, turned = tiny("llama"), tiny("llama"), tiny("llama")
    with torch.no_grad():
        for i, (path, p) in enumerate(base.named_parameters()):
            if "_proj" not in path:
                continue
            scaled.get_parameter(path).mul_(1 + 0.1 * (i % 3 + 1))
            other = p.roll(1, 0)
            other = other - p * ((other * p).sum(1) / (p * p).sum(1))[:, None]  # at right angles to each row
            angle = torch.tensor(0.1 * (i % 3 + 1))
            length = p.norm(dim=1, keepdim=True)
            new = p * angle.cos() + other / other.norm(dim=1, keepdim=True) * length * angle.sin()
            turned.get_parameter(path).copy_(new)
    for s in analyze(ModelChanges(base, scaled)).spectra:
        assert s.magnitude > 0.05
        assert s.direction == pytest.approx(0, abs=1e-6)
    for s in analyze(ModelChanges(base, turned)).spectra:
        assert s.magnitude == pytest.approx(0, abs=1e-6)
        assert min(abs(s.direction - (1 - math.cos(0.1 * k))) for k in (1, 2, 3)) < 1e-5
    cosines = cosine(ModelChanges(base, scaled), ModelChanges(base, scaled))
    assert list(cosines.values()) == pytest.approx([1.0] * len(cosines))
    assert all(abs(c) < 0.2 for c in cosine(ModelChanges(base, scaled), ModelChanges(base, turned)).values())


def test_correlation_needs_variation(tiny, put) -> None:
    host = put(tiny("llama"), al.LoRA(r=2, targets=["q"]), "two")
    found = analysis(host, "two")
    assert found.correlation is None
    assert found.by_role == {"q": None}


def test_what_did_not_change_is_listed_and_any_rank_may_be_asked_for(tiny, put) -> None:
    host = put(tiny("llama"), al.LoRA(r=3, targets=["q", "v"]), "a")
    path = "model.layers.1.self_attn.q_proj"
    host.adapters("a")[path].B.data.zero_()
    found = analysis(host, "a")
    assert found.unchanged == (path,)
    assert path not in [s.path for s in found.spectra]
    for s in found.spectra:
        assert [s.share(k) for k in (1, 2, 4)] == pytest.approx([s.energy[k] for k in (1, 2, 4)])
        assert s.share(2) < s.share(3) == pytest.approx(1) == s.share(200)


def test_nothing_to_analyse(tiny) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2), "a")
    with pytest.raises(MergeError, match="nothing changed"):
        analysis(host, "a")


def test_a_picture(tiny, put, tmp_path, monkeypatch) -> None:
    host = put(tiny("llama"), al.LoRA(r=2), "a")
    found = analysis(host, "a")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*adapterlab\[reports\]"):
        draw({"a": found}, tmp_path / "a.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    draw({"a": found, "b": found}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_importing_the_package_needs_no_matplotlib(monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for module in ("analysis", "picture"):
        spec = importlib.util.find_spec(f"adapterlab.convert.{module}")
        fresh = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, spec.name, fresh)
        spec.loader.exec_module(fresh)
