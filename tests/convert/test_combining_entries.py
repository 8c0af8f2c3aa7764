"""Adapters that own entries of the base, combined: sparse on the union, exact, and undone to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import adapterlab as al
from adapterlab.cli import build
from adapterlab.convert import combine
from adapterlab.errors import AdapterlabError, FormatError, MergeError
from adapterlab.hosts import Host

Held = dict[str, tuple[Tensor, Tensor]]


def put(model: Any, name: str, seed: int, density: float = 0.05, **fields: Any) -> Host:
    """An adapter of random entries with random values, switched off."""
    host = al.host(model) or Host(model)
    host.activate()
    host.attach(al.FishMask(selection="random", seed=seed, density=density, charge_head=False, **fields), name)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in host.parameters(name):
            value.add_((0.2 * torch.randn(value.shape, generator=draw)).to(value.dtype))
    host.activate()
    return host


def held(host: Host, name: str) -> Held:
    return {
        path: (patch.entries.index(), patch.entries.values().clone())  # type: ignore[union-attr]
        for path, patch in host.patches[name].items()
    }


def expected(base: dict[str, Tensor], adapters: list[Held], weights: list[float]) -> dict[str, Tensor]:
    """The sum in float64, rounded once to the base's dtype."""
    found = {}
    for path, start in base.items():
        total = start.double().flatten().clone()
        for adapter, weight in zip(adapters, weights, strict=True):
            if path in adapter:
                index, values = adapter[path]
                total[index] += weight * (values.double() - start.double().flatten()[index])
        found[path] = total.view(start.shape)
    return found


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_sum_is_sparse_exact_and_undone(family: str, precision: torch.dtype, tiny: Any, batch_for: Any) -> None:
    model = tiny(family).to(precision)
    batch = batch_for(model)
    base = {path: p.detach().clone() for path, p in model.named_parameters()}
    put(model, "a", 1)
    host = put(model, "b", 2)
    a, b = held(host, "a"), held(host, "b")
    made = combine(host, ["a", "b"], [1.0, 0.5], into="c")
    c = held(host, "c")
    pairs = [
        (set(left[0].tolist()), set(right[0].tolist())) for left, right in ((a[p], b[p]) for p in a.keys() & b.keys())
    ]
    both = sum(len(left & right) for left, right in pairs)
    sizes = [sum(len(index) for index, _ in held.values()) for held in (a, b, c)]
    assert made.sources == {"a": sizes[0], "b": sizes[1]}
    assert made.overlap == {"a & b": pytest.approx(both / min(sizes[:2]))}
    assert 0.02 < made.overlap["a & b"] < 0.09  # of random entries that of chance, 0.05
    assert made.entries == sizes[2] == sizes[0] + sizes[1] - both
    assert made.method == "fish_mask"
    wanted = expected(base, [a, b], [1.0, 0.5])
    with host.using("c"):
        for path, p in model.named_parameters():
            if path in base:
                torch.testing.assert_close(
                    p.double(),
                    wanted[path].to(precision).double(),
                    rtol=2**-8 if precision is torch.bfloat16 else 1e-6,
                    atol=1e-6,
                )
        live = model(**batch).logits
        host.merge("c")
        assert torch.equal(model(**batch).logits, live)
        host.restore("c")
    assert all(torch.equal(p, base[path]) for path, p in model.named_parameters() if path in base)
    for path, (index, values) in c.items():  # rounded once: what is kept is the float32 sum
        torch.testing.assert_close(values.double(), wanted[path].flatten()[index], rtol=1e-6, atol=1e-6)


def test_ways_that_leave_out_work_on_the_union(tiny: Any) -> None:
    model = tiny("llama")
    put(model, "a", 1)
    host = put(model, "b", 2)
    whole = combine(host, ["a", "b"], into="whole")
    pruned = combine(host, ["a", "b"], how="magnitude_prune", density=0.5, into="pruned")
    ties = combine(host, ["a", "b"], how="ties", density=1.0, into="ties")
    dropped = combine(host, ["a", "b"], how="dare_linear", density=0.5, into="dropped")
    assert 0.45 < pruned.entries / whole.entries < 0.6
    assert 0.45 < dropped.entries / whole.entries < 0.8
    assert ties.entries == whole.entries
    factors = combine(host, ["a", "b"], how="svd", into="factors")
    assert factors.modules
    assert combine(host, ["a", "b"], rank=2, into="low").worst.rank <= 2


def test_heads_are_combined_and_kept_whole(tiny: Any) -> None:
    model = tiny("bert-classes")
    put(model, "a", 1, modules_to_save=("classifier",))
    host = put(model, "b", 2, modules_to_save=("classifier",))
    made = combine(host, ["a", "b"], [1.0, 1.0], into="c")
    assert made.saved == ("classifier",)
    a, b, c = (host.adapters(name)["classifier"].copy.weight for name in "abc")
    torch.testing.assert_close(c, a + b - model.classifier.weight)
    put(model, "d", 3)  # has entries of the classifier
    with pytest.raises(MergeError, match=r"trains classifier whole .* has entries of classifier\.weight"):
        combine(host, ["a", "d"], into="e")


def test_others_join_and_what_was_never_chosen_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    host = put(model, "a", 1)
    host.attach(al.LoRA(targets=["q"]), "low", active=False)
    with torch.no_grad():
        for p in host.parameters("low"):
            p.fill_(0.1)
    assert combine(host, ["a", "low"], into="mixed").modules  # a LoRA, of whatever linear methods
    host.activate()
    host.attach(al.FishDip(), "blank", active=False)
    with pytest.raises(MergeError, match="no entries yet"):
        combine(host, ["blank"], into="none")


def test_adapters_of_two_methods_become_one_of_the_first(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama")
    host = Host(model)
    methods = {"a": al.SAMSecondOrder(batches=1, density=0.05), "b": al.FishMask(samples=2, density=0.02)}
    for name, method in methods.items():
        host.activate()
        host.attach(method, name)
        host.methods[name].prepare(host, name, [batch_for(model)])
        with torch.no_grad():
            for p in host.parameters(name):
                p.add_(0.1)
    host.activate()
    made = combine(host, ["a", "b"], [1.0, 1.0], into="c")
    assert made.method == "sam_second_order"
    assert made.entries == sum(len(index) for index, _ in held(host, "c").values()) < sum(made.sources.values())


def test_rows_stay_rows(tiny: Any) -> None:
    model = tiny("llama")
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.activate()
        host.attach(al.FAR(selection="random", retention=0.25, seed=seed), name)
        with torch.no_grad():
            for p in host.parameters(name):
                p.add_(0.1 + seed)
    host.activate()
    made = combine(host, ["a", "b"], [1.0, 1.0], into="c")
    assert made.method == "far"
    for path, layer in host.adapters("c").items():
        rows = [host.adapters(name)[path].rows for name in "ab"]
        assert torch.equal(layer.rows, torch.cat(rows).unique())
        shift = sum(torch.isin(layer.rows, found) * (0.1 + seed) for seed, found in enumerate(rows))
        start = model.get_submodule(path).weight[layer.rows]
        torch.testing.assert_close(layer.values["weight"], start + shift[:, None])


def test_an_adapter_that_was_just_loaded_is_what_it_was(tiny: Any, tmp_path: Any) -> None:
    """Values that no forward pass has put into the base yet count as well."""
    model = tiny("llama")
    for seed, name in enumerate("ab"):
        put(model, name, seed).save(tmp_path / name, name)
    wanted = combine(al.host(model), ["a", "b"], into="c")  # type: ignore[arg-type]
    other = Host(tiny("llama"))
    for name in "ab":
        al.load(other.model, tmp_path / name, active=False)
        other = al.host(other.model)  # type: ignore[assignment]
    found = combine(other, ["a", "b"], into="c")
    assert found == wanted
    left, right = al.host(model).state_dict("c"), other.state_dict("c")  # type: ignore[union-attr]
    assert all(torch.equal(left[key], right[key]) for key in left)


def run(*args: Any) -> str:
    """What a verb prints; an error of the library is raised as it is."""
    result = CliRunner().invoke(build(), [str(a) for a in args], env={"COLUMNS": "200"})
    if isinstance(result.exception, AdapterlabError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_on_the_command_line(base: Any, folder_of: Any, tmp_path: Any) -> None:
    folders = {"base": folder_of(base()), "other": folder_of(base(seed=1), "other")}
    for seed, (name, of) in enumerate((("north", "base"), ("south", "base"), ("east", "other"))):
        model, _ = al.load_model(folders[of], precision="fp32", device="cpu")
        put(model, name, seed).save(tmp_path / name, name)
    north, south, east = (tmp_path / name for name in ("north", "south", "east"))
    shown = run("combine", north, south, "--weights", "1,1", "--output", tmp_path / "both", "--device", "cpu")
    assert "of the smaller one's entries are in both" in shown
    told = json.loads(
        run("combine", north, south, "--weights", "1,1", "--output", tmp_path / "again", "--device", "cpu", "--json")
    )
    assert told["entries"] < sum(told["sources"].values())
    host = al.load(base(), tmp_path / "both")
    assert sum(len(index) for index, _ in held(host, next(iter(host.methods))).values()) == told["entries"]
    assert "Overlap of north & south" in (tmp_path / "both" / "README.md").read_text()
    with pytest.raises(FormatError, match="different base models"):
        run("combine", north, east, "--output", tmp_path / "x", "--device", "cpu")
