"""OFT, OFTv2 and BOFT against HF PEFT, both ways, and against what its earlier versions wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterlab as al
from adapterlab.errors import FormatError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's on blocks that it moves and extensions that it cannot build

OURS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "OFT", {"block_size": 8}),
    ("qwen2", "OFT", {"blocks": 4, "share": True, "targets": ["q", "down"]}),
    ("bert-classes", "OFT", {"uneven": "nearest", "modules_to_save": ["classifier"]}),
    ("llama", "OFT", {"block_size": 8, "targets": ["embed_tokens", "v"]}),
    ("llama", "OFT", {"block_size": 16, "eps": 0.5}),
    ("llama", "OFTv2", {"block_size": 8}),
    ("qwen2", "OFTv2", {"blocks": 2, "terms": 3, "targets": ["q", "down"]}),
    ("t5", "OFTv2", {"block_size": 4, "terms": 8, "share": True}),
    ("llama", "OFTv2", {"block_size": 16, "eps": 0.5, "terms": 2}),
    ("llama", "BOFT", {"block_size": 8, "factors": 1}),
    ("bert-classes", "BOFT", {"blocks": 4, "factors": 1, "modules_to_save": ["classifier"]}),
]  # fmt: skip
THEIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "oftv2", {"oft_block_size": 8}),
    ("qwen2", "oftv2", {"r": 5, "oft_block_size": 0, "num_cayley_neumann_terms": 4, "block_share": True}),
    ("llama", "oftv2", {"coft": True, "eps": 0.3}),
    ("llama", "oft", {"use_cayley_neumann": False}),  # blocks of 32 do not divide 48: PEFT takes another size there
    ("qwen2", "oft", {"use_cayley_neumann": False, "oft_block_size": 4, "init_weights": False}),
]  # fmt: skip
TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(("family", "method", "fields"), OURS)
def test_peft_reads_what_we_write(family: str, method: str, fields: dict[str, Any], peft_reads: Any) -> None:
    peft_reads(family, getattr(al, method)(**fields), effect=0.01)


@pytest.mark.parametrize(("family", "id", "options"), THEIRS)
def test_we_read_what_peft_writes(family: str, id: str, options: dict[str, Any], we_read: Any) -> None:
    we_read(family, peft.OFTConfig(target_modules=TARGETS, **options), id, effect=0.01)


@pytest.mark.parametrize("options", [{"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 2}])
def test_we_read_butterflies(options: dict[str, Any], we_read: Any) -> None:
    """Without its extension PEFT makes one factor, and its file says two: the tensors count."""
    we_read("llama", peft.BOFTConfig(target_modules=TARGETS, boft_n_butterfly_factor=2, **options), "boft", effect=0.01)


def test_several_factors_come_back_from_pefts_form(
    tiny: Any, randomise: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    host = al.attach(model, al.BOFT(block_size=4, factors=3))
    randomise(host, size=0.1)
    wanted = logits(model, batch_for(model))
    host.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.boft_R"
    assert tensors[key].shape == (3, 8, 4, 4)
    for with_ours in (True, False):
        if not with_ours:
            (tmp_path / "a" / "method.json").unlink()
        again = al.load(tiny("llama"), tmp_path / "a")
        assert again.methods["default"].factors == 3
        assert torch.equal(logits(again.model, batch_for(model)), wanted)
    # Whatever stands in the symmetric part of PEFT's matrices does nothing.
    tensors[key] += torch.randn(3, 8, 4, 4).abs().mean() * torch.ones(4, 4)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    again = al.load(tiny("llama"), tmp_path / "a")
    assert (logits(again.model, batch_for(model)) - wanted).abs().max() < 1e-5


def test_the_file_means_what_pefts_own_permutations_make_of_it(tiny: Any, randomise: Any, tmp_path: Path) -> None:
    """Several factors need an extension of PEFT's that has to be built: its rule is applied here, in float64."""
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.weight.detach().double()
    host = al.attach(model, al.BOFT(block_size=4, factors=3, targets=["q"]))
    randomise(host, size=0.3)
    host.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    lead = "base_model.model.model.layers.0.self_attn.q_proj."
    stored, s = tensors[lead + "boft_R"].double(), tensors[lead + "boft_s"].double()
    rotation, eye = torch.eye(32, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    rule: Any = BOFTLayer.block_butterfly_perm
    for i, m in enumerate(stored):
        skew = 0.5 * (m - m.mT)
        blocks = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
        p = torch.zeros(32, 32, dtype=torch.float64)
        p[torch.arange(32), rule(None, 32, 8 // 2**i, 2, 2)] = 1
        rotation = p @ blocks @ p.T @ rotation
    with torch.no_grad():
        assert (layer(torch.eye(32)) - (rotation @ weight.T) * s.T).abs().max() < 1e-5


def _folder(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """An adapter of q_proj of the first layer, as some version of PEFT wrote it."""
    folder.mkdir()
    common = {
        "peft_type": "OFT",
        "target_modules": ["q_proj"],
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**common, **options}))
    lead = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file(
        {lead + key: value for key, value in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    return folder


def _answer(tiny: Any, folder: Path) -> tuple[Any, Tensor, Tensor]:
    """(host, what the adapted layer answers to unit vectors, its weight)."""
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.weight.detach().clone()
    host = al.load(model, folder)
    with torch.no_grad():
        return host, layer(torch.eye(32)), weight


@pytest.mark.parametrize("share", [False, True])
def test_dense_blocks_and_factors_of_0_14_are_converted(share: bool, tiny: Any, tmp_path: Path) -> None:
    """x R Wᵀ ⊙ s with R = (I − S)(I + S)⁻¹ and S = ½ (M − Mᵀ), M stored whole."""
    torch.manual_seed(0)
    m, s, eye = torch.randn(1 if share else 4, 8, 8) * 0.3, torch.rand(32, 1) + 0.5, torch.eye(8)
    options = {"r": 4, "oft_block_size": 0, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": share}
    host, found, weight = _answer(tiny, _folder(tmp_path / "old", options, {"oft_r": m, "oft_s": s}))
    skew = 0.5 * (m - m.mT)
    r = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)).expand(4, 8, 8))
    assert (found - (r @ weight.T) * s.T).abs().max() < 1e-5
    assert host.methods["default"].rescale
    assert host.methods["default"].id == "oft"
    host.save(tmp_path / "again")
    assert not (tmp_path / "again" / "adapter_config.json").exists()  # PEFT has no such factors any more
    assert torch.equal(_answer(tiny, tmp_path / "again")[1], found)


@pytest.mark.parametrize(("version", "last"), [(None, 2), ("0.17.1", 2), ("0.18.0", 1), ("0.21.2@abc", 1)])
def test_the_series_is_that_of_the_version(version: str | None, last: int, tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    v, q = torch.randn(4, 28) * 0.1, torch.zeros(4, 8, 8)
    q[:, *torch.triu_indices(8, 8, 1)] = v
    q = q - q.mT
    options = {
        "r": 0, "oft_block_size": 8, "coft": False, "eps": 6e-5, "block_share": False, "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5, **({"peft_version": version} if version else {}),
    }  # fmt: skip
    host, found, weight = _answer(tiny, _folder(tmp_path / "old", options, {"oft_R.weight": v}))
    powers = [torch.linalg.matrix_power(q, i) for i in range(1, 5)]
    r = torch.block_diag(*(torch.eye(8) + 2 * sum(powers[:3]) + last * powers[3]))
    assert (found - r @ weight.T).abs().max() < 1e-5
    host.save(tmp_path / "again")
    config = tmp_path / "again" / "adapter_config.json"
    assert config.exists() == (last == 1)
    assert torch.equal(_answer(tiny, tmp_path / "again")[1], found)
    if config.exists():
        assert json.loads(config.read_text())["peft_version"] == "0.18.0"


def test_what_cannot_be_converted_is_refused_with_the_reason(tiny: Any, tmp_path: Path) -> None:
    m = torch.zeros(4, 8, 8)
    earlier = {"r": 4, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False}
    with pytest.raises(FormatError, match=r"0\.13 or earlier, which rotated the outputs"):
        al.load(tiny("llama"), _folder(tmp_path / "a", earlier, {"oft_r": m}))
    bounded = {**earlier, "oft_block_size": 0, "coft": True}
    with pytest.raises(FormatError, match=r"eps counts in units of each layer's squared block size.*Set coft to false"):
        al.load(tiny("llama"), _folder(tmp_path / "b", bounded, {"oft_r": m, "oft_s": torch.ones(32, 1)}))
