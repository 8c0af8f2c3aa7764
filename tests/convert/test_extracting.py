"""LoRA adapters of tuned models and of other methods."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import adapterlab as al
from adapterlab.convert import export_lora, export_peft, extract_lora
from adapterlab.convert.changes import AdapterChanges, ModelChanges
from adapterlab.errors import ConfigError, FormatError, MergeError, OutputError
from adapterlab.registry import ids
from adapterlab.registry import method as method_class_of

Q0 = "model.layers.0.self_attn.q_proj"


def tuned_from(model: Any, changes: dict[str, torch.Tensor]) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path, change in changes.items():
            other.get_parameter(path).add_(change)
    return other


def low_rank(out: int, in_: int, rank: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=draw) @ torch.randn(rank, in_, generator=draw) * 0.1


def test_a_known_low_rank_change_is_found_again(base, logits) -> None:
    model = base()
    tuned = tuned_from(
        model,
        {f"{Q0}.weight": low_rank(32, 32, 3, 1), "model.layers.1.mlp.down_proj.weight": low_rank(32, 48, 5, 2)},
    )
    found = extract_lora(model, tuned, energy=1.0, into="x")
    assert found.ranks == {Q0: 3, "model.layers.1.mlp.down_proj": 5}
    assert found.error < 1e-5
    assert not found.dropped
    host = al.host(model)
    host.activate("x")
    ids = {"input_ids": torch.arange(3, 30)[None]}
    torch.testing.assert_close(logits(model, ids), logits(tuned, ids), atol=1e-5, rtol=1e-5)


def test_energy_and_errors_are_those_of_the_singular_values(base) -> None:
    model = base()
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) * 0.2
    s = np.linalg.svd(change.double().numpy(), compute_uv=False) ** 2
    shares = np.cumsum(s) / s.sum()
    for energy in (0.5, 0.9, 0.99):
        found = extract_lora(model, tuned_from(model, {f"{Q0}.weight": change}), energy=energy, into="x")
        rank = int(np.argmax(shares >= energy)) + 1
        assert found.ranks[Q0] == rank
        assert found.energy == pytest.approx(shares[rank - 1], rel=1e-5)
        assert found.error == pytest.approx(math.sqrt(1 - shares[rank - 1]), rel=1e-4)
        al.host(model).detach("x")
    assert extract_lora(model, tuned_from(model, {f"{Q0}.weight": change}), rank=4).energy == pytest.approx(shares[3])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_not_low_rank_is_reported_or_kept(base, logits, tmp_path, tied, keep) -> None:
    peft = pytest.importorskip("peft")
    model = base(tie_word_embeddings=tied, attention_bias=True)
    plain = copy.deepcopy(model)
    others = {
        f"{Q0}.bias": torch.linspace(-1, 1, 32),
        "model.norm.weight": torch.full((32,), 0.3),
        "model.embed_tokens.weight": torch.randn(model.config.vocab_size, 32) * 0.1,
    }
    tuned = tuned_from(model, {f"{Q0}.weight": low_rank(32, 32, 2, 1), **others})
    found = extract_lora(model, tuned, rank=4, keep=keep, into="x")
    total = math.sqrt(
        sum(
            float((tuned.get_parameter(n) - plain.get_parameter(n)).double().square().sum())
            for n in [f"{Q0}.weight", *others, *["lm_head.weight"] * tied]
        )
    )
    if not keep:
        assert set(found.dropped) == {*others, *["lm_head.weight"] * tied}
        for path, share in found.dropped.items():
            change = tuned.get_parameter(path) - plain.get_parameter(path)
            assert share == pytest.approx(float(change.norm()) / total, rel=1e-4)
        assert found.error == pytest.approx(math.sqrt(sum(v**2 for v in found.dropped.values())), rel=1e-5)
        return
    assert set(found.saved) == {"model.embed_tokens", "model.norm", *["lm_head"] * tied}
    assert found.error < 1e-5
    host, ids = al.host(model), {"input_ids": torch.arange(3, 30)[None]}
    host.activate("x")
    torch.testing.assert_close(logits(model, ids), logits(tuned, ids), atol=1e-5, rtol=1e-5)
    host.save(tmp_path / "x")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "x")
    torch.testing.assert_close(logits(loaded, ids), logits(tuned, ids), atol=1e-5, rtol=1e-5)


def test_rounding_of_bfloat16_is_not_taken_for_training(base) -> None:
    model = base().bfloat16().float()  # stored in bfloat16, computed in float32
    wide = tuned_from(model, {f"{Q0}.weight": low_rank(32, 32, 2, 1) * 5})
    with torch.no_grad():
        wide.get_parameter(f"{Q0}.weight").copy_(wide.get_parameter(f"{Q0}.weight").bfloat16().float())
    found = extract_lora(model, wide, energy=1.0)
    assert found.ranks == {Q0: 2}
    assert 1e-5 < found.error < 0.02  # what rounding did is left out, and counted


def test_models_that_do_not_belong_together(base) -> None:
    with pytest.raises(FormatError, match=r"embed_tokens has .*resize"):
        extract_lora(base(), base(vocab_size=300))
    with pytest.raises(FormatError, match="missing"):
        ModelChanges(base(num_hidden_layers=3), base())
    with pytest.raises(MergeError, match="no weight matrix changed"):
        extract_lora(base(), base())
    with pytest.raises(ConfigError, match="energy=2"):
        extract_lora(base(), base(), energy=2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert-classes"])
@pytest.mark.parametrize(
    ("method", "targets"),
    [(al.LoRA, {"r": 3, "scale": "sqrt"}), (al.DoRA, {"r": 2}), (al.HRA, {"r": 2})],
    ids=["lora", "dora", "hra"],
)
def test_any_linear_method_becomes_a_lora(tiny, put, batch_for, logits, kind, method, targets) -> None:
    model = tiny(kind)
    host = put(model, method(**targets), "a", size=0.05)
    batch = batch_for(model)
    wanted = logits(model, batch)
    found = export_lora(host, "a", energy=1.0, into="x")
    host.activate("x")
    torch.testing.assert_close(logits(model, batch), wanted, atol=3e-5, rtol=1e-4)
    assert found.error < 1e-4
    assert host.methods["x"].id == "lora"


@pytest.mark.parametrize("method_id", ids())
def test_every_method_is_exported_exactly_or_refused(tiny, batch_for, logits, randomise, method_id) -> None:
    model = tiny("llama")
    cls = method_class_of(method_id)
    host = al.attach(model, cls(**cls.example(model)), "a")
    if not host.tensors("a"):
        pytest.skip("it needs data before it has tensors")
    randomise(host, "a", size=0.02)
    host.refresh("a")
    batch = batch_for(model)
    wanted = logits(model, batch)
    try:
        host.merge("a", tied="untie")
    except MergeError:
        with pytest.raises(MergeError):
            export_lora(host, "a", into="x")
        assert "x" not in host.methods
        return
    host.restore("a")
    try:
        export_lora(host, "a", energy=1.0, into="x")
    except MergeError as error:
        assert "no weight matrix changed" in str(error)  # noqa: PT017
        return
    host.activate("x")
    torch.testing.assert_close(logits(model, batch), wanted, atol=3e-5, rtol=1e-3)


def test_without_a_rank_export_is_exact_where_the_rank_is_small(tiny, put) -> None:
    host = put(tiny("llama"), al.LoRA(r=3, targets=["q"]), "low")
    put(host.model, al.IA3(targets=["down"]), "full", 2)
    low, full = export_lora(host, "low", into="x"), export_lora(host, "full", into="y")
    assert set(low.ranks.values()) == {3}
    assert low.error < 1e-6
    for module in full.modules:  # a change of full rank: 0.9 of the energy
        assert 0.9 <= module.energy < 0.99
        assert module.rank < 32


def test_factors_are_those_of_the_adapter_and_nothing_else(tiny, put) -> None:
    host = put(tiny("llama"), al.LoRA(r=3, alpha=7, targets=["q", "embed"]), "low")
    put(host.model, al.DoRA(r=3, targets=["q"]), "dora", 2)
    with host.using():
        for change in AdapterChanges(host, "low"):
            assert change.factors is not None
            assert change.factors.rank == 3
            torch.testing.assert_close(change.factors.dense(), change.weight)
        assert all(change.factors is None for change in AdapterChanges(host, "dora"))


def test_peft_files_only(tiny, put, tmp_path, logits, batch_for) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("gpt2")
    plain = copy.deepcopy(model)
    host = put(model, al.DoRA(r=2, targets=["qkv"]), "a")
    export_peft(host, "a", tmp_path / "p")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["use_dora"] is True
    batch = batch_for(model)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "p")
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-4)
    with pytest.raises(OutputError, match="not empty"):
        export_peft(host, "a", tmp_path / "p")
    host.attach(al.AdapterPfeiffer(), "b")
    with pytest.raises(ConfigError, match="--as lora"):
        export_peft(host, "b", tmp_path / "q")
