"""LoRA of bare parameters: the update, its gradient, merging, mixed batches, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.convert.extracting import export_lora
from adapterlab.errors import AttachError, ConfigError, TargetError
from adapterlab.methods.low_rank._expert_factors import ExpertFactors

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH: dict[str, Any] = {"parameters": (UP, DOWN), "targets": "none", "r": 3, "alpha": 6}


def precise(model: Any) -> Any:
    """In float64, which the grouped products of experts do not have."""
    model.set_experts_implementation("eager")
    return model.double()


def updated(model: Any, host: al.Host) -> None:
    """Write W + s · B A into a plain copy of the model, expert by expert."""
    with torch.no_grad():
        for path, adapter in host.adapters("default").items():
            for name, pair in adapter.factors.items():
                weight = model.get_parameter(f"{path}.{name}")
                for expert, a, b in zip(weight, pair.A, pair.B, strict=True):
                    expert += pair.scale * (b @ a)


def test_start_count_and_output(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model, plain = precise(tiny("mixtral")), precise(tiny("mixtral"))
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.LoRA(**BOTH))
    assert torch.equal(logits(model, batch), base)
    # 2 layers, 4 experts, rank 3; 32 -> 96 and 48 -> 32
    assert sum(p.numel() for p in host.parameters("default")) == 2 * 4 * 3 * (32 + 96 + 48 + 32)
    randomise(host)
    updated(plain, host)
    assert (logits(model, batch) - logits(plain, batch)).abs().max() < 1e-10
    host.detach("default")
    assert torch.equal(logits(model, batch), base)


def test_gradient_in_float64(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model, plain = precise(tiny("mixtral")), precise(tiny("mixtral"))
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    updated(plain, host)
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    for path, adapter in host.adapters("default").items():
        for name, pair in adapter.factors.items():
            whole = plain.get_parameter(f"{path}.{name}").grad
            assert whole.any()
            assert torch.allclose(pair.A.grad, pair.scale * pair.B.mT @ whole, atol=1e-12)
            assert torch.allclose(pair.B.grad, pair.scale * whole @ pair.A.mT, atol=1e-12)


def test_values_are_not_kept_for_the_backward_pass(
    tiny: Any, batch_for: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    made: set[int] = set()
    alive: list[Tensor] = []  # or the next layer would get the same memory
    values = ExpertFactors.values

    def watched(self: Any, parameters: Any) -> dict[str, Tensor]:
        found = values(self, parameters)
        made.update(value.untyped_storage().data_ptr() for value in found.values())
        alive.extend(found.values())
        return found

    monkeypatch.setattr(ExpertFactors, "values", watched)
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch_for(model)).loss
    assert len(made) == 4
    assert not kept & made
    loss.backward()


def test_checkpointing_and_two_passes_before_one_backward(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("mixtral").train()
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    batches = [batch_for(model, seed=seed) for seed in (1, 2)]
    parameters = host.parameters("default")
    expected = torch.autograd.grad(sum(model(**batch).loss for batch in batches), parameters)
    host.recompute()
    loss = sum(model(**batch).loss for batch in batches)
    with host.using():
        found = torch.autograd.grad(loss, parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_merge_and_restore(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    batch, before = batch_for(model), copy.deepcopy(model.state_dict())
    host = al.attach(model, al.LoRA(**{**BOTH, "targets": ["q"]}))
    randomise(host)
    live = logits(model, batch)
    host.merge()
    assert (logits(model, batch) - live).abs().max() < 1e-5
    with torch.no_grad():
        for value in host.tensors("default").values():
            value.zero_()  # merged: the factors are not looked at
    assert (logits(model, batch) - live).abs().max() < 1e-5
    host.restore()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    host.detach("default")
    assert list(model.state_dict()) == list(before)


def test_mixed_rows(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(**BOTH), "a")
    al.attach(model, al.LoRA(r=2, parameters=[UP], targets=["v"]), "b")
    randomise(host)
    batch = batch_for(model, rows=3)
    with host.rows(["a", None, "b"]):
        mixed = logits(model, batch)
    for row, names in enumerate((("a",), (), ("b",))):
        with host.using(*names):
            assert (mixed[row] - logits(model, batch)[row]).abs().max() < 1e-5
    with host.using("a", "b"):
        both = logits(model, batch)
    assert (both - mixed).abs().max() > 0.01


def test_two_adapters_add_up(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = precise(tiny("mixtral"))
    host = al.attach(model, al.LoRA(**BOTH), "a")
    al.attach(model, al.LoRA(r=2, parameters=[UP], targets="none"), "b")
    randomise(host)
    batch = batch_for(model)
    live = logits(model, batch)
    host.merge("a")
    assert (logits(model, batch) - live).abs().max() < 1e-10
    host.merge("b")
    assert (logits(model, batch) - live).abs().max() < 1e-10


def test_half_precision(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    batch = batch_for(model)
    host = al.attach(model.bfloat16(), al.LoRA(**BOTH))
    base = logits(model, batch)
    randomise(host, size=0.1)
    model(**batch).loss.backward()
    for parameter in host.parameters("default"):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
    change = logits(model, batch) - base
    full = tiny("mixtral").bfloat16().float()
    start = logits(full, batch)
    updated(full, host)
    expected = logits(full, batch) - start
    assert change.dtype == torch.bfloat16
    # Token by token: where two experts score alike, rounding sends a token to another one, on some processors only.
    alike = nn.functional.cosine_similarity(change.float(), expected, dim=-1)
    assert alike.median() > 0.98


def test_autocast_keeps_the_dtype_of_the_parameter(tiny: Any, randomise: Any) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    adapter: Any = next(iter(host.adapters("default").values()))
    held = dict(adapter.site.module.named_parameters(recurse=False))
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.values(held)
    assert all(torch.equal(found[key], value) for key, value in adapter.values(held).items())


class Stored(nn.Module):
    """Experts that keep their weights `[E, in, out]`, as some models do."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 5, 7, generator=draw, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(4, 5, generator=draw, dtype=torch.float64))
        self.scales = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eio->no", x, self.up) + (x @ self.table.T).sum(1, keepdim=True)


class Small(nn.Module):
    """A model around such a module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Stored()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x)
        return y


def test_transposed_experts_and_plain_matrices(randomise: Any) -> None:
    model = Small()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    host = al.attach(model, al.LoRA(r=2, parameters=["experts.up", "table"], targets="none"))
    randomise(host)
    up, table = (host.adapters("default")["experts"].factors[name] for name in ("up", "table"))
    assert up.A.shape == (3, 2, 5)
    assert up.B.shape == (3, 7, 2)
    assert table.A.shape == (1, 2, 5)
    delta = up.scale * torch.einsum("eor,eri->eio", up.B, up.A)
    square = table.scale * table.B[0] @ table.A[0]
    expected = torch.einsum("ni,eio->no", x, model.experts.up + delta)
    expected = expected + (x @ (model.experts.table + square).T).sum(1, keepdim=True)
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_copies_and_pickles(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    batch = batch_for(model)
    expected = logits(model, batch)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, batch), expected)
    host.verify(batch)


def test_full_graph(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation("batched_mm")  # the other ways count tokens by expert, outside the graph
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host)
    batch = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = torch.autograd.grad(compiled(**batch).loss, host.parameters("default"))
    expected = torch.autograd.grad(model(**batch).loss, host.parameters("default"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_experts(implementation: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model, plain = tiny("mixtral"), tiny("mixtral")
    model.set_experts_implementation(implementation)
    host = al.attach(model, al.LoRA(**BOTH))
    randomise(host, size=0.1)
    updated(plain, host)
    batch = batch_for(model)
    assert (logits(model, batch) - logits(plain, batch)).abs().max() < 1e-5


def test_lora_plus_trains_their_b_faster(tiny: Any) -> None:
    host = al.attach(tiny("mixtral"), al.LoRAPlus(**BOTH, ratio=4))
    optimizer = host.methods["default"].optimizer(host, "default", lambda groups: groups)
    fast = {id(p) for group in optimizer if group.get("lr_factor") == 4 for p in group["params"]}
    every = host.named_parameters("default")
    assert fast == {id(p) for key, p in every.items() if key.endswith(".B")}
    assert len(fast) == len(every) / 2 == 4


def test_changes_of_experts_are_extracted_whole(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("mixtral")
    host = al.attach(model, al.LoRA(**{**BOTH, "targets": ["q"]}))
    randomise(host, size=0.1)
    batch = batch_for(model)
    expected = logits(model, batch)
    report = export_lora(host, "default", into="found")
    assert report.saved == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    with host.using("found"):
        assert (logits(model, batch) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parameters": [UP], "dropout": 0.1}, "dropout=0.1.*set dropout=0"),
        ({"parameters": [UP], "lora_bias": True}, "lora_bias=True.*set lora_bias=False"),
        ({"parameters": [UP], "init": "pissa"}, "init='pissa'.*kaiming"),
        ({"parameters": [UP], "init": "eva"}, "init='eva'.*kaiming"),
        ({"targets": "none"}, "leaves nothing to adapt.*parameters"),
        ({"parameters": [""]}, "parameters"),
    ],
)
def test_options_without_a_meaning_here(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        al.LoRA(**fields)


def test_variants_adapt_modules_only() -> None:
    with pytest.raises(ConfigError, match=r"mlp.experts.down_proj.*dora adapts modules only; use lora"):
        al.DoRA(parameters=[DOWN])


def test_names_that_fit_nothing_or_no_matrix(tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"mlp\.experts\.gate_up_prj.*mlp\.experts\.gate_up_proj"):
        al.attach(tiny("mixtral"), al.LoRA(parameters=["mlp.experts.gate_up_prj"]))
    with pytest.raises(TargetError, match="rank_pattern names 'up_proj'"):
        al.attach(tiny("mixtral"), al.LoRA(**BOTH, rank_pattern={"up_proj": 2}))
    model = Small()
    with pytest.raises(AttachError, match=r"experts\.scales is \(3,\).*Name another"):
        al.attach(model, al.LoRA(parameters=["scales"], targets="none"))
    assert type(model.experts) is Stored
