"""Fusion uses what several frozen adapters know for a task that none of them was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, begun, fails_without
from torch import Tensor
from torch.nn import functional as F

import adapterlab as al
from adapterlab.core.adapter import Copy
from adapterlab.errors import AttachError, ConfigError, DataError, FormatError
from adapterlab.methods.bottleneck import adapter_fusion
from adapterlab.methods.bottleneck.adapter_fusion import AdapterFusion, Fusing
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer

IDS = torch.randint(3, 128, (40, 10), generator=torch.Generator().manual_seed(0))
FEW, HELD = slice(0, 8), slice(24, 40)


def hidden(model: Any, rows: slice) -> Tensor:
    found: Tensor = model.bert(IDS[rows]).last_hidden_state
    return found


def teacher(tiny: Any, *layers: int) -> Any:
    """The model with other feed-forward weights in some layers."""
    model = tiny("bert-classes")
    for layer in layers:
        draw = torch.Generator().manual_seed(layer)
        with torch.no_grad():
            for p in model.bert.encoder.layer[layer].output.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    return model


def fitted(host: Any, name: str, wanted: Tensor, rows: slice, lr: float, steps: int = 50) -> None:
    optimizer = torch.optim.Adam(host.parameters(name), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (hidden(host.model, rows) - wanted).square().mean()
        extra = host.methods[name].penalty(host, name)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()


def test_claim(tiny: Any) -> None:
    """Two adapters learn two changes from many rows each; fused on few rows they meet both, and stay as they are."""
    student = tiny("bert-classes")
    with torch.no_grad():
        targets = {layers: hidden(teacher(tiny, *layers), slice(None)) for layers in ((0,), (1,), (0, 1))}
    torch.manual_seed(0)
    for layers, name in (((0,), "first"), ((1,), "second")):
        host = al.attach(student, AdapterPfeiffer(m=8), name)
        with host.using(name):
            fitted(host, name, targets[layers][:24], slice(0, 24), lr=1e-2)
    before = {name: host.state_dict(name) for name in ("first", "second")}

    def error(*names: str) -> float:
        with torch.no_grad(), host.using(*names):
            return float((hidden(student, HELD) - targets[0, 1][HELD]).square().mean())

    singles = [error("first"), error("second")]
    host.attach(AdapterFusion(adapters={"a": "first", "b": "second"}), "fusion")
    with host.using("fusion"):
        fitted(host, "fusion", targets[0, 1][FEW], FEW, lr=2e-3)
    assert error("fusion") < 0.8 * min(singles)
    assert min(singles) < error()
    for name, part in (("first", "a"), ("second", "b")):
        fused = {k.removeprefix(f"{part}/"): v for k, v in host.tensors("fusion").items() if k.startswith(f"{part}/")}
        assert fused.keys() == before[name].keys()
        assert all(torch.equal(fused[key], before[name][key]) for key in fused)


def fused(tiny: Any, randomise: Any, family: str, **settings: Any) -> Any:
    model = tiny(family).double()
    parts = {"one": {"name": "adapter_pfeiffer", "m": 4}, "two": {"name": "adapter_pfeiffer", "m": 3}}
    host = al.attach(model, AdapterFusion(adapters={k: {**v, **settings} for k, v in parts.items()}))
    randomise(host, size=0.4)
    return host


def by_hand(adapter: Any, h: Tensor) -> Tensor:
    """One token after the other, one adapter after the other, in float64."""
    out = torch.zeros_like(h)
    for place in range(len(h)):
        z = [
            part.up @ torch.relu(part.down @ h[place] + part.down_bias) + part.up_bias for part in adapter.parts
        ]  # fmt: skip
        q = adapter.query @ h[place] + adapter.query_bias
        scores = torch.stack([q @ (adapter.key @ each + adapter.key_bias) for each in z])
        shares = scores.exp() / scores.exp().sum()
        for share, each in zip(shares, z, strict=True):
            out[place] += share * (adapter.value @ each)
    return out


def test_formula_behind_a_block(tiny: Any, randomise: Any) -> None:
    """Llama: y = r + fusion(r), with r the block's output."""
    host = fused(tiny, randomise, "llama")
    path, adapter = next(iter(host.adapters("default").items()))
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with host.using():
            r = host.module(path)(x)
        torch.testing.assert_close(host.module(path)(x), r + by_hand(adapter, r[0])[None], rtol=1e-6, atol=1e-6)


def test_formula_around_a_norm(tiny: Any, randomise: Any) -> None:
    """BERT: h = LN(z) is read, and y = LN(z + fusion(h))."""
    host = fused(tiny, randomise, "bert-classes")
    path, adapter = next(iter(host.adapters("default").items()))
    norm = host.module(path)
    z = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with host.using():
            wanted = norm(z + by_hand(adapter, norm(z)[0])[None])
        torch.testing.assert_close(norm(z), wanted, rtol=1e-6, atol=1e-6)


def test_start_and_penalty(tiny: Any) -> None:
    """W_q and W_k have deviation 0.02, W_v is nearly the identity; the penalty is 0.01 of its squared distance."""
    parts = {"one": {"name": "adapter_pfeiffer", "m": 4}}
    host = al.attach(tiny("llama"), AdapterFusion(adapters=parts))
    adapters: list[Any] = list(host.adapters("default").values())
    eye = torch.eye(32)
    for adapter in adapters:
        assert torch.equal(adapter.value.detach(), torch.where(eye == 1, eye, torch.full_like(eye, 1e-6)))
        for matrix in (adapter.query.detach(), adapter.key.detach()):
            assert 0.018 < float(matrix.std()) < 0.022
        assert not adapter.query_bias.any()
        assert not adapter.key_bias.any()
        adapter.value.data += 0.5
    off = sum(float((adapter.value.detach() - eye).square().sum()) for adapter in adapters)
    found = host.methods["default"].penalty(host, "default")
    torch.testing.assert_close(found, torch.tensor(0.01 * off))
    assert AdapterFusion(adapters=parts, regularisation=0).penalty(host, "default") is None


def test_the_adapters_are_frozen_and_the_rest_trains(tiny: Any, randomise: Any) -> None:
    host = fused(tiny, randomise, "llama")
    width = 3 * 32 * 32 + 2 * 32
    assert host.summary().trainable == 2 * width
    assert all(key.startswith("adapter.") for key in host.named_parameters("default"))


@pytest.mark.parametrize("family", ["llama", "bert-classes"])
def test_folders_and_names_become_parts(family: str, tiny: Any, randomise: Any, tmp_path: Path) -> None:
    """Saved adapters, heads left behind, with their values; what is saved needs their folders no more."""
    model, ids = tiny(family), IDS[:2]
    host = al.attach(model, AdapterPfeiffer(m=4), "math")
    host.attach(AdapterPfeiffer(m=3, modules_to_save=("classifier",) if family != "llama" else ()), "code")
    randomise(host)
    host.save(tmp_path / "code", "code")
    values = host.state_dict("code")
    copies = [path for path, adapter in host.adapters("code").items() if isinstance(adapter, Copy)]
    assert len(copies) == (family != "llama")
    host.detach("code")
    host.attach(AdapterFusion(adapters={"one": "math", "two": str(tmp_path / "code")}), "fusion")
    assert list(host.methods) == ["math", "fusion"]
    tensors = host.state_dict("fusion")
    kept = {key: value for key, value in values.items() if not any(path in key for path in copies)}
    assert kept
    assert all(torch.equal(tensors[f"two/{key}"], value) for key, value in kept.items())
    host.activate("fusion")
    with torch.no_grad():
        before = model(ids).logits
    host.save(tmp_path / "fusion", "fusion")
    (tmp_path / "code" / "adapter_model.safetensors").unlink()
    fresh = tiny(family)
    again = al.load(fresh, tmp_path / "fusion")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, before)
    assert again.methods["fusion"].adapters["two"]["m"] == 3
    assert str(tmp_path) not in (tmp_path / "fusion" / "method.json").read_text(encoding="utf-8")


@torch.no_grad()
def test_pruning_leaves_those_that_count(tiny: Any, randomise: Any, tmp_path: Path) -> None:
    """Of three, two at each place with the largest mean weight on real tokens; the softmax is over these alone."""
    parts = {name: {"name": "adapter_pfeiffer", "m": m} for name, m in (("one", 4), ("two", 3), ("three", 2))}
    model = tiny("llama").double()
    host = al.attach(model, AdapterFusion(adapters=parts))
    randomise(host, size=0.25)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1:, 2:] = 0  # three rows are nearly padding
    batches = [{"input_ids": IDS[4 * i : 4 * i + 4], "attention_mask": mask} for i in range(2)]
    shares = {}
    for path, adapter in host.adapters("default").items():
        read: list[Tensor] = []
        with host.using("default"):
            handle = host.module(path).register_forward_hook(lambda _, args, y, read=read: read.append(args[0]))
            outputs = [model(**batch) for batch in batches]
            handle.remove()
        assert outputs
        with host.using():
            h = torch.cat([host.module(path)(x)[mask.bool()] for x in read])
        z = torch.stack([part.share(h) for part in adapter.parts], -2)
        q, k = F.linear(h, adapter.query, adapter.query_bias), F.linear(z, adapter.key, adapter.key_bias)
        shares[path] = (k * q[:, None]).sum(-1).softmax(-1).mean(0)
    layers: Any = host.adapters("default")
    for path, share in adapter_fusion.mean_weights(host, layers, batches).items():
        torch.testing.assert_close(share.double(), shares[path], rtol=1e-4, atol=1e-5)
    wanted = {path: [list(parts)[i] for i in sorted(share.topk(2).indices.tolist())] for path, share in shares.items()}
    left = host.methods["default"].prune(host, "default", batches)
    assert {path: list(names) for path, names in left.items()} == wanted
    path, adapter = next(iter(host.adapters("default").items()))
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with host.using():
        r = host.module(path)(x)
    torch.testing.assert_close(host.module(path)(x), r + by_hand(adapter, r[0])[None], rtol=1e-6, atol=1e-6)
    gone = {(path, part) for path, names in wanted.items() for part in parts if part not in names}
    assert len(gone) == 2
    assert not [
        key for key in host.tensors("default") for path, part in gone if key.startswith(f"{part}/adapter.{path}.")
    ]
    before = model(**batches[0]).logits
    host.save(tmp_path / "a")
    fresh = tiny("llama").double()
    al.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(**batches[0]).logits, before)
    with pytest.raises(ConfigError, match="keep = 0"):
        host.methods["default"].prune(host, "default", batches, keep=0)
    with pytest.raises(DataError, match="No batch"):
        host.methods["default"].prune(host, "default", [])


def test_what_is_shared_by_the_parts_is_frozen_too(tiny: Any) -> None:
    """Compacter's adapters share factors, which lie at the root of the model."""
    parts = {name: {"name": "compacter", "m": 4, "norms": False} for name in ("one", "two")}
    host = al.attach(tiny("llama"), AdapterFusion(adapters=parts))
    assert host.summary().trainable == 4 * (3 * 32 * 32 + 2 * 32)


def test_what_does_not_fit_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    lora, one = {"name": "lora"}, {"name": "adapter_pfeiffer"}
    for adapters, error, message in (
        ({"a": str(tmp_path)}, FormatError, "holds no adapter"),
        ({"a": {"m": 3}}, ConfigError, r"adapters\['a'\].*settings of a new one"),
        ({"a": lora}, AttachError, "'a' has a .* at .*mixes what bottleneck adapters add"),
        ({"a": one, "b": {**one, "targets": ["o"]}}, AttachError, "'a' and 'b' stand at different modules"),
    ):
        with pytest.raises(error, match=message):
            al.attach(model, AdapterFusion(adapters=adapters))
        assert al.host(model) is None
    with pytest.raises(ConfigError, match="adapters"):
        AdapterFusion(adapters={})


def _uniform(self: Fusing, q: Tensor, k: Tensor) -> Tensor:
    return torch.full(k.shape[:-1], 1 / k.shape[-2], dtype=q.dtype)


def _scaled(self: Fusing, q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax((k @ q[..., None])[..., 0] / q.shape[-1] ** 0.5, -1)


def _over_tokens(self: Fusing, q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax((k @ q[..., None])[..., 0], -2)


def _shared(query: bool, key: bool, value: bool, bias: bool) -> Any:
    """Fusion with some of its products left out."""

    def share(self: Fusing, h: Tensor) -> Tensor:
        z = torch.stack([part.share(h) for part in self.parts], -2).to(self.dtype)
        q = F.linear(h, self.query, self.query_bias if bias else None) if query else h
        k = F.linear(z, self.key, self.key_bias if bias else None) if key else z
        return self.mixed(self.weights(q, k), F.linear(z, self.value) if value else z).to(h.dtype)

    return share


def _with_residual(self: Fusing, h: Tensor) -> Tensor:
    z = torch.stack([h + part.share(h) for part in self.parts], -2)
    q, k = F.linear(h, self.query, self.query_bias), F.linear(z, self.key, self.key_bias)
    return self.mixed(self.weights(q, k), F.linear(z, self.value))


def _all_tokens(host: Any, layers: Any, batches: Any) -> Any:
    return MEAN(host, layers, [{"input_ids": batch["input_ids"]} for batch in batches])


MEAN = adapter_fusion.mean_weights
_penalty = AdapterFusion.penalty
LINES: dict[str, Mutation] = {
    "uniform weights": (Fusing, "weights", _uniform),
    "scores are scaled": (Fusing, "weights", _scaled),
    "softmax over tokens": (Fusing, "weights", _over_tokens),
    "no W_q": (Fusing, "share", _shared(False, True, True, True)),
    "no W_k": (Fusing, "share", _shared(True, False, True, True)),
    "no W_v": (Fusing, "share", _shared(True, True, False, True)),
    "no biases": (Fusing, "share", _shared(True, True, True, False)),
    "outputs with the residual": (Fusing, "share", _with_residual),
    "only one adapter": (Fusing, "mixed", lambda self, weights, values: values[..., 0, :]),
    "W_v starts at zero": begun(Fusing, lambda self, method: self.value.zero_()),
    "W_v has nothing off its diagonal": begun(Fusing, lambda self, method: self.value.copy_(torch.eye(32))),
    "W_q starts large": begun(Fusing, lambda self, method: self.query.mul_(10)),
    "W_k starts at zero": begun(Fusing, lambda self, method: self.key.zero_()),
    "the least are left": (
        adapter_fusion,
        "mean_weights",
        lambda *given: {path: -weights for path, weights in MEAN(*given).items()},
    ),
    "padding counts": (adapter_fusion, "mean_weights", _all_tokens),
    "one batch counts": (adapter_fusion, "mean_weights", lambda host, layers, batches: MEAN(host, layers, batches[:1])),
    "nothing is dropped": (Fusing, "drop", lambda self, part: None),
    "no penalty": (AdapterFusion, "penalty", lambda self, host, name: torch.tensor(0.0)),
    "the penalty is not small": (AdapterFusion, "penalty", lambda *given: _penalty(*given) * 100),
}
test_broken_lines_are_caught = fails_without(
    test_formula_behind_a_block,
    test_formula_around_a_norm,
    test_start_and_penalty,
    test_pruning_leaves_those_that_count,
    lines=LINES,
)
