"""FishMask: the entries with the largest Fisher information train better than as many random ones."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError, DataError, NotTrainingError, TrainingError
from adapterlab.methods.in_place import _chosen_parameters as _select
from adapterlab.methods.in_place.fish_mask import FishMask
from adapterlab.optim import adamw

DENSITY = 0.005


def _prepared(model: Any, batch: Any, **fields: Any) -> Any:
    host = al.attach(model, al.FishMask(**{"samples": 8, **fields}))
    host.methods["default"].prepare(host, "default", [batch])
    return host


def _train(host: Any, batch: Any, steps: int, **options: Any) -> float:
    optimizer = host.methods["default"].optimizer(host, "default", lambda p: adamw(p, lr=2e-2, **options))
    for step in range(steps):
        host.methods["default"].before_step(host, "default", step, optimizer)
        optimizer.zero_grad()
        loss = host.model(**batch).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def measure(make: Any, batch_for: Any, seed: int) -> tuple[float, float]:
    """Final training losses with the Fisher mask and with a random one of the same size."""
    found = []
    for selection in ("fisher", "random"):
        model = make("llama")
        batch = batch_for(model, rows=8, seed=seed)
        host = _prepared(model, batch, selection=selection, density=DENSITY, seed=seed)
        found.append(_train(host, batch, 25))
    return found[0], found[1]


def claim(fisher: float, random: float) -> bool:
    return fisher < random - 0.05


def _chosen(host: Any) -> dict[str, Tensor]:
    return {path: patch.index for path, patch in host.patches["default"].items()}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_claim(seed: int, tiny: Any, batch_for: Any) -> None:
    assert claim(*measure(tiny, batch_for, seed))


@pytest.mark.parametrize("family", ["llama-tied", "bert-classes"])
def test_the_choice_equals_brute_force(family: str, tiny: Any, batch_for: Any) -> None:
    """Squared gradients of single samples, computed in float64 with autograd.grad, all sorted at once."""
    model = tiny(family)
    batch = batch_for(model, rows=3)
    twin = copy.deepcopy(model).double()
    named = dict(twin.named_parameters())
    sums = {path: torch.zeros_like(p) for path, p in named.items()}
    for i in range(3):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        grads = torch.autograd.grad(twin(**row).loss, list(named.values()), allow_unused=True)
        for path, g in zip(named, grads, strict=True):
            sums[path] += 0 if g is None else g**2
    chosen = _chosen(_prepared(model, batch, samples=3, density=0.01))
    k = int(0.01 * sum(p.numel() for p in named.values()))
    best = torch.cat([s.flatten() for s in sums.values()]).topk(k).values
    got = torch.cat([sums[path].flatten()[index] for path, index in chosen.items()])
    assert len(got) == k
    torch.testing.assert_close(got.sort(descending=True).values, best, rtol=1e-4, atol=0)


def test_top_is_exact_with_ties_zeros_and_every_size() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = {
        "ties": torch.randint(0, 4, (300,), generator=draw) / 3, "zeros": torch.zeros(50),
        "tiny": torch.rand(200, generator=draw) * 1e-30, "wide": torch.randn(400, generator=draw).exp() ** 9,
    }  # fmt: skip
    every = torch.cat(list(scores.values())).sort(descending=True).values
    for k in (1, 2, 7, 399, 400, 500, 701, 899, 949, 950):
        chosen = _select.top(list(scores), lambda path: scores[path], k)
        assert all((index.diff() > 0).all() for index in chosen.values())
        got = torch.cat([scores[path][index] for path, index in chosen.items()])
        assert torch.equal(got.sort(descending=True).values, every[:k]), k
    with pytest.raises(TrainingError, match="not finite"):
        _select.top(["a"], lambda _: torch.tensor([1.0, float("inf")]), 1)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_only_chosen_entries_change_and_all_is_undone(family: str, tiny: Any, batch_for: Any) -> None:
    model = tiny(family)
    batch = batch_for(model)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    keys = list(model.state_dict())
    host = _prepared(model, batch, density=0.02)
    total = sum(p.numel() for p in before.values())
    assert host.summary().trainable == int(0.02 * total)
    assert not any(p.requires_grad or p.grad is not None for path, p in model.named_parameters() if path in before)
    host.verify(batch)
    _train(host, batch, 4, weight_decay=0.1)
    model(**batch)  # the last step is written by the next forward pass
    chosen, now = _chosen(host), dict(model.named_parameters())
    for path, start in before.items():
        moved = (now[path] != start).flatten().nonzero().flatten()
        assert torch.isin(moved, chosen.get(path, torch.tensor([], dtype=torch.int64))).all(), path
        assert path not in chosen or len(moved) > 0.5 * len(chosen[path])
    host.detach("default")
    assert list(model.state_dict()) == keys
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


def test_heads_are_dense_and_paid_from_the_budget(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    total, head = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.classifier.parameters())
    batch = batch_for(model)
    host = _prepared(model, batch, density=0.02, modules_to_save=("classifier",))
    assert host.summary().trainable == int(0.02 * total)
    assert not any("classifier" in path for path in _chosen(host))
    host.verify(batch)
    extra = _prepared(tiny("bert-classes"), batch, density=0.02, modules_to_save=("classifier",), charge_head=False)
    assert extra.summary().trainable == int(0.02 * (total - head)) + head
    with pytest.raises(AttachError, match=r"density=0\.001 .* leaves none .*charge_head=False"):
        al.attach(tiny("bert-classes"), al.FishMask(density=0.001, modules_to_save=("classifier",)))


def test_scope_tensor_and_baselines_need_no_data(tiny: Any) -> None:
    model = tiny("llama")
    sizes = {path: p.numel() for path, p in model.named_parameters()}
    host = al.attach(model, al.FishMask(selection="magnitude", scope="tensor", density=0.03))
    chosen = _chosen(host)
    assert {path: len(i) for path, i in chosen.items()} == {p: int(0.03 * n) for p, n in sizes.items() if 0.03 * n >= 1}
    weight = model.model.layers[0].mlp.up_proj.weight.detach().abs().flatten()
    index = chosen["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight[index].sort().values, weight.topk(len(index)).values.flip(0))
    draws = [_chosen(al.attach(tiny("llama"), al.FishMask(selection="random", seed=s))) for s in (0, 0, 1)]
    assert all(torch.equal(index, draws[1][path]) for path, index in draws[0].items())
    assert any(path not in draws[2] or not torch.equal(i, draws[2][path]) for path, i in draws[0].items())


def test_expected_fisher_sums_over_all_classes(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    row = batch_for(model, rows=1)
    weight = copy.deepcopy(model).double().requires_grad_(True)
    logs = weight(**{k: v for k, v in row.items() if k != "labels"}).logits.log_softmax(-1)[0]
    target = weight.bert.encoder.layer[0].attention.self.query.weight
    expected = sum(log.exp().detach() * torch.autograd.grad(log, target, retain_graph=True)[0] ** 2 for log in logs)
    k = 20
    host = _prepared(model, row, target="expect", density=1.0, exclude=("embeddings", "pooler", "classifier"))
    parameters = {"w": model.bert.encoder.layer[0].attention.self.query.weight}
    from adapterlab.methods.in_place.fish_mask import _every_class

    host.detach("default")
    found = _select.accumulate(al.attach(model, al.LoRA(r=1)), parameters, [row], torch.square, losses=_every_class)
    torch.testing.assert_close(found["w"].double(), expected, rtol=1e-3, atol=1e-9)
    assert found["w"].flatten().topk(k).values.min() > 0
    llama = tiny("llama")
    with pytest.raises(ConfigError, match="Use target='label'"):
        _prepared(llama, batch_for(llama), target="expect")


def test_saved_entries_come_back(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama-tied")
    batch = batch_for(model)
    host = _prepared(model, batch, density=0.02)
    _train(host, batch, 3)
    expected, saved = logits(model, batch), host.state_dict("default")
    fresh = tiny("llama-tied")
    base = logits(fresh, batch)
    from adapterlab.hosts import Host

    other = Host(fresh)
    other.attach(al.FishMask(density=0.02), "default", saved=saved)
    assert torch.equal(logits(fresh, batch), expected)
    assert {k: v.tolist() for k, v in _chosen(other).items()} == {k: v.tolist() for k, v in _chosen(host).items()}
    other.methods["default"].prepare(other, "default", [])  # keeps what it has, and needs no data
    with other.using():
        assert torch.equal(logits(fresh, batch), base)
    assert torch.equal(logits(fresh, batch), expected)
    small = tiny("bert-masked")
    bad = {f"adapter.bert.pooler.dense.{k}": torch.tensor([10**6]) for k in ("index.weight", "values.weight")}
    bad = {k.replace("bert.pooler.dense", "cls.predictions.transform.dense"): v for k, v in bad.items()}
    with pytest.raises(AttachError, match=r"reach position 1000000, and it has 1024 here"):
        Host(small).attach(al.FishMask(), "default", saved=bad)


def test_training_without_prepare_is_refused(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-classes")
    host = al.attach(model, al.FishMask(density=0.05, modules_to_save=("classifier",)))
    method: Any = host.methods["default"]
    with pytest.raises(NotTrainingError, match=r"has not chosen its entries.*prepare\(host, 'default', batches\)"):
        method.optimizer(host, "default", adamw)
    with pytest.raises(NotTrainingError, match="has not chosen its entries"):  # the head alone would train
        method.before_step(host, "default", 0, adamw(host.parameters("default"), lr=1.0))
    plain = al.attach(tiny("llama"), al.FishMask())
    with pytest.raises(NotTrainingError, match=r"Nothing is trainable.*prepare"):
        plain.verify(batch_for(plain.model))


def test_bad_data_is_named_and_the_model_stays_as_it_was(tiny: Any, batch_for: Any) -> None:
    model = tiny("llama").train()
    host, method = al.attach(model, al.FishMask()), al.FishMask(samples=4)
    batch = batch_for(model)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for batches, message in (([], "no row with a label"), ([unlabelled], "no row with a label")):
        with pytest.raises(DataError, match=message):
            method.prepare(host, "default", batches)
    with pytest.raises(DataError, match="one has only input_ids"):
        method.prepare(host, "default", [{"input_ids": batch["input_ids"]}])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="loss of sample 1 is nan"):
        method.prepare(host, "default", [batch])
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_packed_weights_are_refused(tiny: Any) -> None:
    model = tiny("llama")
    packed = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj._parameters["weight"] = packed
    with pytest.raises(AttachError, match=r"up_proj.weight is stored packed .*exclude"):
        al.attach(model, al.FishMask())
    al.attach(model, al.FishMask(exclude=("all-linear",), selection="magnitude"))


@pytest.mark.parametrize("target", ["label", "expect"])
def test_dropout_is_off_while_it_scores(target: str, tiny: Any, batch_for: Any) -> None:
    found = []
    for training in (True, False):
        model = tiny("bert-classes")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        model.train(training)
        model.bert.embeddings.eval()  # as someone may have left a frozen part
        found.append(_chosen(_prepared(model, batch_for(model), density=0.01, target=target)))
        assert model.training == model.classifier.training == training
        assert not model.bert.embeddings.training
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(index, found[1][path]) for path, index in found[0].items())


TOP, ACCUMULATE = _select.top, _select.accumulate


def _lowest(paths: Any, score: Any, k: int) -> Any:
    return TOP(paths, lambda path: 1 / (1e-12 + score(path).flatten()), k)


def _other_entries(paths: Any, score: Any, k: int) -> Any:
    """As many of the right tensors."""
    return TOP(paths, lambda path: score(path).flatten().flip(0), k)


def _each_alone(paths: Any, score: Any, k: int) -> Any:
    sizes = {path: score(path).numel() for path in paths}
    found = [TOP([path], score, max(1, k * size // sum(sizes.values()))) for path, size in sizes.items()]
    return {path: index for part in found for path, index in part.items()}


def _squared_late(*args: Any, **options: Any) -> Any:
    host, parameters, batches, _ = args
    return {path: s.square() for path, s in ACCUMULATE(host, parameters, batches, lambda g: g, **options).items()}


def _weighed(*args: Any, **options: Any) -> Any:
    return {path: s * args[1][path].detach() ** 2 for path, s in ACCUMULATE(*args, **options).items()}


BROKEN: dict[str, Mutation] = {
    "the lowest scores": (_select, "top", _lowest),
    "other entries of the right tensors": (_select, "top", _other_entries),
    "a share for each tensor": (_select, "top", _each_alone),
    "squared after the sum": (_select, "accumulate", _squared_late),
    "absolute values": (_select, "accumulate", lambda h, p, b, _, **options: ACCUMULATE(h, p, b, torch.abs, **options)),
    "weighed by the entry": (_select, "accumulate", _weighed),
    "batches in place of samples": (_select, "rows", lambda batches, count: iter(batches)),
    "the first sample alone": (_select, "rows", lambda batches, count: [{k: v[:1] for k, v in batches[0].items()}]),
    "dropout on while it scores": (_select, "dropout_off", contextlib.nullcontext),
    "fewer entries": (FishMask, "budgets", lambda self, host, parameters: [(list(parameters), 5)]),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_the_choice_equals_brute_force, "bert-classes"),
    functools.partial(test_dropout_is_off_while_it_scores, "label"),
    lines=BROKEN,
)


def test_the_lowest_scores_train_worse(tiny: Any, batch_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    random = measure(tiny, batch_for, 1)[1]
    monkeypatch.setattr(*BROKEN["the lowest scores"])
    model = tiny("llama")
    batch = batch_for(model, rows=8, seed=1)
    assert not claim(_train(_prepared(model, batch, density=DENSITY), batch, 25), random)
