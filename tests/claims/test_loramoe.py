"""LoRAMoE: a balance within two groups of experts, by which two types of samples come to use different groups."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor

from adapterlab.data import DataConfig, load_data
from adapterlab.errors import AttachError, ConfigError, DataError, MergeError
from adapterlab.hosts import Host, attach
from adapterlab.methods.mixture import loramoe
from adapterlab.methods.mixture.loramoe import LoRAMoE, Types, importance, used
from adapterlab.ops import experts
from adapterlab.train import Training, train

TYPES = torch.arange(6) % 2


def balanced(delta: float, form: Any) -> Tensor:
    """Weights `[samples, N]` that the balance alone leads to, from random ones; no model is there."""
    logits = torch.randn(6, 1, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for _ in range(300):
        optimizer.zero_grad()
        q = loramoe.used(logits.softmax(-1), None)
        loramoe.uneven(loramoe.importance(TYPES, 6, delta) * q, form).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)[:, 0]


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_balance_by_itself(form: str) -> None:
    """The group of a sample's own type gets (1 − delta) / 2, evenly; the first half belongs to type 1."""
    for delta in (0.0, 0.1, 0.5):
        w = balanced(delta, form)
        own = torch.where(TYPES == 1, w[:, :3].sum(1), w[:, 3:].sum(1))
        assert torch.allclose(own, torch.full((6,), (1 - delta) / 2), atol=0.01), (delta, own)
        for group in w.split(3, 1):
            assert torch.allclose(group, group.mean(1, keepdim=True).expand(-1, 3), atol=0.01)


def measure(make: Any, **settings: Any) -> float:
    """In what share of the modules both types use the group of the other more, after a short run on two tasks."""
    model = make("llama")
    torch.manual_seed(0)
    host = attach(model, LoRAMoE(experts=4, r=2, **settings))
    draw = torch.Generator().manual_seed(0)
    rows: list[Any] = []
    for i in range(16):
        ids = (torch.randint(3, 60, (8,), generator=draw) + 60 * (i % 2)).tolist()
        rows.append({"input_ids": ids, "labels": ids, **({"type": torch.tensor(i % 2)} if settings["beta"] else {})})
    train(host, "default", rows, Training(steps=30, batch_size=8, lr=2e-2, warmup=0, schedule="constant"))
    seen: dict[str, list[Tensor]] = {path: [] for path, part in host.adapters("default").items() if path}
    for kind in (0, 1):
        batch = torch.tensor([row["input_ids"] for row in rows[kind::2]])
        with host.state.observing() as load, torch.no_grad():
            model(input_ids=batch)
        for path, sums in load.items():
            seen[path].append(sums / sums.sum())
    own = [(float(zero[2:].sum()), float(one[:2].sum())) for zero, one in seen.values()]
    return sum(max(shares) < 0.5 for shares in own) / len(own)


def test_claim(tiny: Any) -> None:
    """In at least four fifths of the modules both types use the other's group more."""
    assert measure(tiny, delta=0.5, beta=1.0) >= 0.8
    assert measure(tiny, delta=0.5, beta=0.0) <= 0.5


def loaded(make: Any, kind: str = "llama", **settings: Any) -> tuple[Any, Host]:
    model = make(kind).double().train()
    torch.manual_seed(0)
    host = attach(model, LoRAMoE(**{"experts": 4, "r": 2, "alpha": 6.0, "beta": 0.3, "delta": 0.4, **settings}))
    return model, host


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_formula(kind: str, tiny: Any, randomise: Any) -> None:
    """Against a loop over experts in float64, in the feed-forward networks alone."""
    model, host = loaded(tiny, kind)
    parts: Any = {path: part for path, part in host.adapters("default").items() if path}
    assert len(parts) == {"llama": 6, "gpt2": 4}[kind]
    assert all("mlp" in path for path in parts)
    path = next(path for path in parts if path.endswith(("down_proj", "c_proj")))
    part, module = parts[path], model.get_submodule(path)
    x = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with host.using():
        base = module(x)
    assert torch.equal(module(x), base)
    randomise(host)
    w = (x @ part.router.T).softmax(-1)
    wanted = base + sum(3.0 * w[..., n, None] * (x @ part.A[n].T @ part.B[n].T) for n in range(4))
    assert torch.allclose(module(x), wanted, atol=1e-12)


def test_count_and_start(tiny: Any) -> None:
    host = loaded(tiny)[1]
    sizes = [(48, 32), (48, 32), (32, 48)]
    assert host.summary().trainable == 2 * sum(4 * (2 * (o + i) + i) for o, i in sizes)
    part: Any = host.adapters("default")["model.layers.0.mlp.down_proj"]
    for tensor in (part.A, part.router):
        assert float(tensor.detach().abs().max()) == pytest.approx(48**-0.5, rel=0.1)


def reference(host: Host, batch: dict[str, Tensor], types: Tensor, form: str) -> tuple[Tensor, list[Tensor]]:
    """The balance as the authors' code has it, from rows without padding, and its gradients in the routers."""
    x: dict[str, Tensor] = {}
    parts: Any = {path: part for path, part in host.adapters("default").items() if path}
    handles = [
        part.site.module.register_forward_pre_hook(lambda _, args, path=path: x.update({path: args[0].detach()}))
        for path, part in parts.items()
    ]
    host.model(**batch)
    for handle in handles:
        handle.remove()
    total: Any = 0.0
    for path, part in parts.items():
        entries = []
        for sample, real, kind in zip(x[path], batch["attention_mask"], types.tolist(), strict=True):
            for n, weight in enumerate((sample[real == 1] @ part.router.T).softmax(-1).mean(0)):
                own = (n < 2) if kind == 1 else (n >= 2)
                entries.append(weight * (1.4 if own else 0.6))
        z = torch.stack(entries)
        variance = (z - z.mean()).square().sum() / (len(z) - 1)
        total = total + 0.3 * variance / (z.mean() if form == "paper" else z.mean() ** 2 + 1e-10)
    return total.detach(), list(torch.autograd.grad(total, [part.router for part in parts.values()]))


@pytest.mark.parametrize(("form", "mode"), [("code", "none"), ("paper", "full")])
def test_balance(form: Any, mode: Any, tiny: Any, batch_for: Any) -> None:
    """For each module by itself, over samples without their padding, also where blocks are computed again."""
    model, host = loaded(tiny, lbc_form=form)
    parts: Any = {path: part for path, part in host.adapters("default").items() if path}
    with torch.no_grad():
        for part in parts.values():
            part.router.mul_(5)  # B = 0: what goes into a module does not depend on the routers before it
    batch, types = batch_for(model, rows=3), torch.tensor([1, 0, 1])
    batch["attention_mask"][0, :4] = 0
    wanted, gradients = reference(host, batch, types, form)
    host.recompute(mode)
    with host.state.collect() as losses:
        model(**batch, type=types)
    assert len(losses) == len(parts)
    found = torch.stack(losses).sum()
    assert torch.allclose(found, wanted, rtol=1e-6)
    # Through the loss of the model too, so that blocks are computed again.
    with host.state.collect() as losses:
        loss = model(**batch, type=types).loss
    routers = [part.router for part in parts.values()]
    for ours, theirs in zip(torch.autograd.grad(sum(losses) + 0 * loss, routers), gradients, strict=True):
        near = ours - theirs  # what is before a router moves its input as well, but not through B = 0
        assert float(near.abs().max()) < 1e-6 * float(theirs.abs().max())


def test_types_come_from_a_column_of_the_rows(tmp_path: Any) -> None:
    def read(*types: Any, **more: Any) -> Any:
        file = tmp_path / "rows.jsonl"
        rows = [{"prompt": "a", "completion": "b", **({} if t is None else {"kind": t}), **more} for t in types]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_data(DataConfig(path=str(file), eval_size=0), LoRAMoE(column="kind").columns)

    splits = read(0, 1, True, "1")
    assert [example.numbers for example in splits.train] == [{"kind": n} for n in (0, 1, 1, 1)]
    assert "kind" in splits.columns.used
    with pytest.raises(DataError, match=r"row 2 .*'kind' is 2, and the method reads one of 0, 1"):
        read(0, 2)
    with pytest.raises(DataError, match=r"row 1 .*'kind' is 'knowledge'"):
        read("knowledge")
    with pytest.raises(DataError, match=r"row 2 .*nothing in column 'kind'.*kinds"):
        read(0, None, kinds=1)
    assert LoRAMoE(beta=0).columns == {}


def test_types_of_a_batch(tiny: Any, batch_for: Any, logits: Any) -> None:
    """They are asked for in training, change no answer, and are not needed afterwards."""
    model, host = loaded(tiny)
    batch = batch_for(model)
    model.eval()
    plain = model(**batch).logits
    assert torch.equal(model(**batch, type=torch.tensor([0, 1])).logits, plain)
    with host.rows(["default", None]):
        model(**batch)
    with host.state.collect():
        with pytest.raises(DataError, match="the batch has no 'type'"):
            model(**batch)
        with pytest.raises(DataError, match="'type' has the values 2, 3"):
            model(**batch, type=torch.tensor([3, 2]))
        with pytest.raises(DataError, match=r"a tensor \[rows\]"):
            model(**batch, type=torch.tensor([1]))
    assert host.state.taps == {}


def test_refusals(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="take 4 or 6"):
        LoRAMoE(experts=5)
    with pytest.raises(AttachError, match="an argument 'labels' of its own"):
        attach(tiny("llama"), LoRAMoE(column="labels"))
    with pytest.raises(MergeError, match="router"):
        attach(tiny("llama"), LoRAMoE()).merge()
    host = attach(tiny("llama"), LoRAMoE())
    ids = [5, 6, 7]
    with pytest.raises(DataError, match="no collator or trainer drops"):
        train(host, "default", [{"input_ids": ids, "labels": ids}], Training(steps=1))


LAYER, ROUTED, UNEVEN = LoRAMoE.Layer, LoRAMoE.Layer.routed, loramoe.uneven


def _uneven(change: Callable[[Tensor, str], Tensor]) -> Mutation:
    return (loramoe, "uneven", change)


def _importance(change: Callable[[Tensor, int, float], Tensor]) -> Mutation:
    return (loramoe, "importance", change)


BROKEN: dict[str, Mutation] = {
    "s left out": begun(LAYER, lambda part, method: setattr(part, "scale", 1.0)),
    "B does not start at zero": begun(LAYER, lambda part, method: part.B.normal_()),
    "weights that sum to N": (experts, "mixture", lambda z, *how: 4 * z.softmax(-1)),
    "equal weights": (experts, "mixture", lambda z, *how: torch.full_like(z, 0.25) + 0 * z),
    "own group gets more": _importance(lambda types, n, delta: importance(1 - types, n, delta)),
    "no groups": _importance(lambda types, n, delta: importance(types, n, 0.0)),
    "groups in turn": _importance(lambda types, n, delta: importance(types, n, delta)[:, torch.arange(n).roll(1)]),
    "delta on one side": _importance(lambda types, n, delta: importance(types, n, delta).clamp_max(1)),
    "padding counts": (loramoe, "used", lambda w, real: used(w, None)),
    "over the padded length": (loramoe, "used", lambda w, real: w.mean(1) if real is None else (
        w * real[..., None]).mean(1)),
    "one mean of all samples": (loramoe, "used", lambda w, real: used(w, real).mean(0).expand(len(w), -1)),
    "biased variance": _uneven(lambda z, form: UNEVEN(z, form) * (z.numel() - 1) / z.numel()),
    "over the mean": _uneven(lambda z, form: UNEVEN(z, "paper")),
    "within each sample": _uneven(lambda z, form: torch.stack([UNEVEN(row, form) for row in z]).mean()),
    "no gradient": _uneven(lambda z, form: UNEVEN(z.detach() + 0 * z, form)),
    "beta left out": (LAYER, "routed", lambda self, *given: (
        setattr(self, "form", (1.0, *self.form[1:])), ROUTED(self, *given))[1]),
    "a type for the batch": (Types, "check", lambda self, types, given: types.fill_(1)),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_formula, "llama"), functools.partial(test_balance, "code", "none"), lines=BROKEN
)


@pytest.mark.parametrize("line", ["own group gets more", "no groups"])
def test_the_claim_is_lost(line: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[line])
    with pytest.raises(AssertionError):
        test_the_balance_by_itself("code")
    with pytest.raises(AssertionError):
        test_claim(tiny)
