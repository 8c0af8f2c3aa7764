"""Combinations of adapters, against float64 formulas written here, and against HF PEFT where it is right."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch

import adapterlab as al
from adapterlab.convert import combine
from adapterlab.errors import ConfigError, MergeError

Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def deltas(weights_of: Any, host: Any, *names: str, **options: Any) -> list[dict[str, np.ndarray]]:
    base = weights_of(host)
    found = [weights_of(host, name, **options) for name in names]
    return [{k: (new[k] - base[k]).numpy() for k in base} for new in found]


def close(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    for key, value in wanted.items():
        np.testing.assert_allclose(ours[key], value, atol=tolerance, err_msg=key)


@pytest.fixture
def pair(tiny, put) -> Any:
    """Two LoRA adapters of different ranks, scales and targets."""
    host = put(tiny("llama"), al.LoRA(r=2, alpha=6, targets=["q", "v"]), "a", 1)
    return put(host.model, al.LoRA(r=3, alpha=3, scale="sqrt", targets=["v", "down"]), "b", 2)


def ties(tensors: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Entry by entry, as the paper says it."""
    trimmed = []
    for t in tensors:
        flat = t.ravel().copy()
        order = np.argsort(-np.abs(flat), kind="stable")
        flat[order[int(density * flat.size) :]] = 0
        trimmed.append(flat)
    merged = np.zeros(tensors[0].size)
    for i in range(merged.size):
        sign = 1 if sum(t[i] for t in trimmed) >= 0 else -1
        agreeing = [w * t[i] for w, t in zip(weights, trimmed, strict=True) if t[i] * sign > 0]
        merged[i] = sum(agreeing) / max(1, len(agreeing))
    return merged.reshape(tensors[0].shape)


def pruned(t: np.ndarray, density: float) -> np.ndarray:
    kept = np.argsort(-np.abs(t.ravel()))[: int(density * t.size)]
    out = np.zeros(t.size)
    out[kept] = t.ravel()[kept]
    return out.reshape(t.shape)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [2.0, -0.7]])
def test_sums_are_the_weighted_sum_of_deltas(pair, weights_of, how, weights) -> None:
    a, b = deltas(weights_of, pair, "a", "b")
    found = combine(pair, ["a", "b"], weights, how, into="c", rank=None if how == "cat" else 32)
    (c,) = deltas(weights_of, pair, "c")
    close(c, {k: weights[0] * a[k] + weights[1] * b[k] for k in a})
    assert found.error < 1e-6
    assert found.ranks[Q0] == 2
    assert found.ranks[V1] == 5
    assert pair.active == ("a", "b")  # the new one waits


def test_svd_cuts_to_the_largest_rank_with_the_error_it_reports(pair, weights_of) -> None:
    a, b = deltas(weights_of, pair, "a", "b")
    found = combine(pair, ["a", "b"], [1, 1], "svd", into="c")
    (c,) = deltas(weights_of, pair, "c")
    lost = total = 0.0
    for module in found.modules:
        wanted = a[f"{module.path}.weight"] + b[f"{module.path}.weight"]
        s = np.linalg.svd(wanted, compute_uv=False)
        assert module.rank == (3 if "q_proj" not in module.path else 2)
        assert module.error == pytest.approx(np.sqrt((s[module.rank :] ** 2).sum() / (s**2).sum()), abs=1e-6)
        real = np.linalg.norm(c[f"{module.path}.weight"] - wanted)
        assert module.error == pytest.approx(real / np.linalg.norm(wanted), abs=1e-5)
        lost, total = lost + real**2, total + np.linalg.norm(wanted) ** 2
    assert found.error == pytest.approx(np.sqrt(lost / total), rel=1e-4)
    assert found.energy == pytest.approx(1 - lost / total, rel=1e-4)
    assert found.worst.error == max(m.error for m in found.modules) > 0.05


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_and_pruning_against_the_definition(pair, weights_of, density) -> None:
    a, b = deltas(weights_of, pair, "a", "b")
    combine(pair, ["a", "b"], [1.5, 0.5], "ties", density=density, rank=32, into="t")
    combine(pair, ["a", "b"], [1.5, 0.5], "magnitude_prune", density=density, rank=32, into="p")
    t, p = deltas(weights_of, pair, "t", "p")
    for module in ("q_proj", "v_proj"):
        key = f"model.layers.1.self_attn.{module}.weight"
        there = [(d[key], w) for d, w in ((a, 1.5), (b, 0.5)) if d[key].any()]
        tensors, weights = [d for d, _ in there], [w for _, w in there]
        np.testing.assert_allclose(t[key], ties(tensors, weights, density), atol=2e-6)
        wanted = sum(w * pruned(d, density) for d, w in there)
        np.testing.assert_allclose(p[key], wanted, atol=2e-6)


def test_dare_keeps_a_share_and_the_expectation(pair, weights_of) -> None:
    (a,) = deltas(weights_of, pair, "a")
    key = f"{Q0}.weight"  # only "a" has it
    means = []
    for seed in range(30):
        combine(pair, ["a", "b"], [2.0, 1.0], "dare_linear", density=0.5, rank=32, seed=seed, into="d")
        (d,) = deltas(weights_of, pair, "d")
        pair.detach("d")
        kept = np.abs(d[key]) > 1e-5
        np.testing.assert_allclose(d[key][kept], (2.0 * a[key] / 0.5)[kept], rtol=1e-3, atol=1e-5)
        assert 0.4 < kept.mean() < 0.6
        means.append(d[key])
    error = np.linalg.norm(np.mean(means, 0) - 2 * a[key]) / np.linalg.norm(2 * a[key])
    assert error < 1.5 / np.sqrt(30)  # each draw has relative variance 1


def test_dare_ties_without_dropping_is_election(pair, weights_of) -> None:
    a, b = deltas(weights_of, pair, "a", "b")
    combine(pair, ["a", "b"], [1.0, 1.0], "dare_ties", density=1.0, rank=32, into="d")
    (d,) = deltas(weights_of, pair, "d")
    key = f"{V1}.weight"
    np.testing.assert_allclose(d[key], ties([a[key], b[key]], [1.0, 1.0], 1.0), atol=2e-6)


def test_a_seed_gives_the_same_combination_again(pair) -> None:
    made = []
    for seed, into in ((3, "x"), (3, "y"), (4, "z")):
        combine(pair, ["a", "b"], how="dare_ties", seed=seed, into=into)
        made.append(pair.state_dict(into))
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])
    assert not all(torch.equal(made[0][k], made[2][k]) for k in made[0])


def test_other_linear_methods_biases_norms_and_copies(tiny, put, weights_of) -> None:
    host = put(tiny("gpt2"), al.DoRA(r=2, targets=["qkv", "up"]), "dora", 1)
    put(host.model, al.IA3(targets=["up", "down"]), "ia3", 2)
    host.activate()
    put(host.model, al.BitFit(), "bits", 3)
    host.activate()
    put(host.model, al.LoRA(targets=["qkv"], modules_to_save=["ln_f"]), "norm", 4)
    host.activate()
    names, weights = ["dora", "ia3", "bits", "norm"], [0.5, 1.0, -1.0, 2.0]
    each = deltas(weights_of, host, *names)
    found = combine(host, names, weights, "linear", into="all")
    (made,) = deltas(weights_of, host, "all")
    close(made, {k: sum(w * d[k] for w, d in zip(weights, each, strict=True)) for k in each[0]}, 1e-5)
    assert "transformer.ln_f" in found.saved
    assert found.error < 1e-5


def test_a_fully_tuned_adapter_and_a_tied_table(tiny, put, weights_of) -> None:
    host = put(tiny("llama-tied"), al.Full(), "full", 1, 0.1)
    host.activate()
    put(host.model, al.LoRA(r=2, targets=["q", "embed"]), "low", 2)
    host.activate()
    each = deltas(weights_of, host, "full", "low", tied="untie")
    combine(host, ["full", "low"], [0.5, 0.5], into="c")
    (made,) = deltas(weights_of, host, "c", tied="untie")
    close(made, {k: 0.5 * each[0][k] + 0.5 * each[1][k] for k in each[0]}, 1e-5)


def test_the_result_is_saved_and_read_by_peft(base, tmp_path, put, tokenizer, folder_of) -> None:
    peft = pytest.importorskip("peft")
    model = base()
    folder_of(model)
    host = put(model, al.LoRA(r=2, scale="sqrt", alpha=4, targets=["q", "v"]), "a", 1)
    put(model, al.LoRA(r=4, scale="sqrt", targets=["v"]), "b", 2)
    combine(host, ["a", "b"], [1.0, 0.5], "cat", into="c")
    host.activate("c")
    ids = torch.arange(3, 20)[None]
    live = model(ids).logits
    host.save(tmp_path / "c", "c")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "c")
    torch.testing.assert_close(other(ids).logits, live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "theirs"),
    [("cat", "cat"), ("svd", "svd"), ("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")],
)
def test_agrees_with_peft(tiny, put, weights_of, tmp_path, how, theirs) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    plain = copy.deepcopy(model)
    host = put(model, al.LoRA(r=2, alpha=4, targets=["q", "v"]), "a", 1)
    put(model, al.LoRA(r=2, alpha=2, targets=["q", "v"]), "b", 2)
    for name in "ab":
        host.save(tmp_path / name, name)
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="a")
    other.load_adapter(tmp_path / "b", "b")
    density = {"density": 0.4} if how in ("ties", "magnitude_prune") else {}
    other.add_weighted_adapter(["a", "b"], [0.7, 0.6], "c", combination_type=theirs, **density)
    combine(host, ["a", "b"], [0.7, 0.6], how, into="c", **density)
    (ours,) = deltas(weights_of, host, "c")
    for path, module in other.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            wanted = module.get_delta_weight("c").detach().double().numpy()
            np.testing.assert_allclose(ours[f"{path}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"names": []}, "Attached: a, b"),
        ({"names": ["a", "bb"]}, "'bb'.*Nearest: b"),
        ({"names": ["a", "a"]}, "named twice"),
        ({"weights": [1.0]}, "2 adapters need 2 weights"),
        ({"weights": [0.0, 0.0]}, "not all zero"),
        ({"weights": [float("nan"), 1.0]}, "finite"),
        ({"how": "tie"}, "how='tie' is unknown. Nearest: ties"),
        ({"how": "linear", "density": 0.5}, "density=0.5 has no meaning"),
        ({"how": "ties", "density": 0.0}, "density=0.0"),
        ({"how": "cat", "rank": 4}, "ranks add up"),
        ({"how": "svd", "rank": 0}, "rank=0"),
    ],
)
def test_bad_input(pair, options, part) -> None:
    before = dict(pair.methods)
    with pytest.raises(ConfigError, match=part):
        combine(pair, **{"names": ["a", "b"], **options})
    assert pair.methods == before


def test_what_cannot_be_combined(tiny, put) -> None:
    host = put(tiny("llama"), al.LoRA(targets=["q"]), "a")
    host.attach(al.AdapterPfeiffer(), "b")
    with pytest.raises(MergeError, match="adapter_pfeiffer cannot be merged"):
        combine(host, ["a", "b"])
    host.attach(al.LoRA(targets=["q"]), "untrained")
    with pytest.raises(MergeError, match="never trained"):
        combine(host, ["untrained"])
    assert host.active == ("a", "b", "untrained")
    assert "combined" not in host.methods
