"""X-LoRA against HF PEFT, both ways: classifier, experts in folders of their own, and every option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import save_and_load
from torch import Tensor

import adapterlab as al
from adapterlab.convert import export_peft
from adapterlab.errors import FormatError, OutputError
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.mixture.xlora import XLoRA

TOLERANCE = 5e-5  # of the largest logit
PARTS: dict[str, Any] = {
    "math": {"name": "lora", "r": 2, "alpha": 5, "targets": ["q", "v"]},
    "code": {"name": "lora", "r": 3, "scale": "sqrt", "targets": ["v", "down", "embed"]},
    "talk": {"name": "rslora", "r": 4, "targets": ["all-linear"]},
}
FIELDS: list[dict[str, Any]] = [
    {},
    {"depth": 3, "size": 6, "layerwise": True, "temperature": 0.5},
    {"depth": 2, "size": 6, "dropout": 0.0, "top_k": 2, "global_weight": 1.5},
    {"layerwise": True, "softmax": False, "top_k": 2, "softmax_topk": True},
    {"scaling_pass_value": 0.4, "softmax": False, "use_trainable_adapters": True},
    {"scaling_pass_value": None},
]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def plain(tiny: Any, family: str = "llama") -> Any:
    model = tiny(family)
    model.config.use_cache = False  # PEFT asks for that
    return model


def read_by_peft(tiny: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(plain(tiny), folder).eval()


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: " ".join(fields) or "defaults")
def test_peft_reads_what_we_write(
    fields: dict[str, Any], tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, XLoRA(adapters=PARTS, **fields))
    randomise(host, size=0.2)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.05
    host.save(tmp_path / "a")
    assert apart(logits(read_by_peft(tiny, tmp_path / "a"), batch), expected) < TOLERANCE
    assert torch.equal(logits(al.load(tiny("llama"), tmp_path / "a").model, batch), expected)
    export_peft(host, "default", tmp_path / "b")
    assert not list((tmp_path / "b").rglob("method.json"))
    assert apart(logits(read_by_peft(tiny, tmp_path / "b"), batch), expected) < TOLERANCE
    again = al.load(tiny("llama"), tmp_path / "b")
    assert apart(logits(again.model, batch), expected) < TOLERANCE
    assert list(again.methods["default"].adapters) == ["0", "1", "2"]
    assert all(entry["name"] == "lora" for entry in again.methods["default"].adapters.values())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"xlora_depth": 4, "xlora_size": 8, "layerwise_scalings": True, "softmax_temperature": 0.7},
    {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "top_k_lora": 1, "global_scaling_weight": 0.8},
    {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "scaling_pass_value": 0},
    {"scaling_pass_value": 0.5, "use_trainable_adapters": True},
]


@pytest.fixture
def peft_saves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21.2 takes numbers of layers for names of experts when it saves, and leaves them out."""
    monkeypatch.setattr(save_and_load, "_filter_state_dict_for_adapter_name", lambda state_dict, names: {})


def saved_by_peft(tiny: Any, folder: Path, names: tuple[str, ...] = ("0", "1", "2"), **options: Any) -> Any:
    """Let PEFT make experts, put them together, and save that."""
    kinds: list[dict[str, Any]] = [
        {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
        {"r": 2, "target_modules": ["embed_tokens", "k_proj"]},
    ]
    for name, kind in zip(names, kinds, strict=True):
        torch.manual_seed(len(str(kind)))
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **kind)
        peft.get_peft_model(tiny("llama"), config).save_pretrained(folder / "experts" / name)
    adapters = {name: str(folder / "experts" / name) for name in names}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options)
    torch.manual_seed(5)
    theirs = peft.get_peft_model(plain(tiny), config).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "classifier" in key:
                value.add_(torch.randn_like(value) * 0.2)
    theirs.save_pretrained(folder / "theirs")
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("peft_saves_all")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "defaults")
def test_we_read_what_peft_writes(
    options: dict[str, Any], tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    theirs = saved_by_peft(tiny, tmp_path, **options)
    model = tiny("llama")
    batch = batch_for(model)
    expected = logits(theirs, batch)
    assert (expected - logits(model, batch)).abs().max() > 0.05
    host = al.load(model, tmp_path / "theirs")
    assert host.methods["default"].id == "xlora"
    assert apart(logits(model, batch), expected) < TOLERANCE
    trains = {key.partition("/")[0] for key in host.named_parameters("default") if "/" in key}
    assert trains == ({"0", "1", "2"} if options.get("use_trainable_adapters") else set())


@pytest.mark.filterwarnings("ignore")
def test_experts_of_other_names_do_not_run_in_peft_and_are_refused(tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    """PEFT calls its experts 0, 1, ... and looks for those of the given names."""
    theirs = saved_by_peft(tiny, tmp_path, ("math", "code", "talk"))
    with pytest.raises(KeyError, match="math"):
        theirs(**batch_for(tiny("llama")))
    with pytest.raises(FormatError, match=r"calls its experts code, math, talk.*0, 1, \.\.\..*Train it again"):
        al.load(tiny("llama"), tmp_path / "theirs")


def test_experts_keep_their_order(tiny: Any, randomise: Any, logits: Any, batch_for: Any, tmp_path: Path) -> None:
    """PEFT sorts their numbers as text, when it saves; here they stay in order, and are put in order."""
    parts = {f"part{i}": {"name": "lora", "r": 1, "targets": ["q"]} for i in range(11)}
    model = tiny("llama")
    host = al.attach(model, XLoRA(adapters=parts))
    randomise(host, size=0.3)
    batch = batch_for(model)
    export_peft(host, "default", tmp_path / "a")
    assert apart(logits(read_by_peft(tiny, tmp_path / "a"), batch), logits(model, batch)) < TOLERANCE
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    again = al.load(tiny("llama"), tmp_path / "a")
    assert list(again.methods["default"].adapters) == [str(i) for i in range(11)]
    assert apart(logits(again.model, batch), logits(model, batch)) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_reproduced_is_refused(tiny: Any, tmp_path: Path) -> None:
    saved_by_peft(tiny, tmp_path, top_k_lora=2, scaling_pass_value=0.5)
    with pytest.raises(FormatError, match=r"top_k_lora=2 and scaling_pass_value=0.5.*with PEFT itself"):
        al.load(tiny("llama"), tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps({**found, "scaling_pass_value": 0.0}))
    with pytest.raises(FormatError, match=r"lacks .*layers.0.weight.*at random.*write the file again"):
        al.load(tiny("llama"), tmp_path / "theirs")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"part '0'.*experts/0, which is not there.*theirs/0 lacks tensors"):
        al.load(tiny("llama"), tmp_path / "theirs")
    (tmp_path / "theirs" / "0").rename(tmp_path / "theirs" / "zero")
    (tmp_path / "theirs" / "0").symlink_to(tmp_path / "elsewhere" / "0")
    with pytest.raises(FormatError, match="is a link to"):
        al.load(tiny("llama"), tmp_path / "theirs")
    (tmp_path / "theirs" / "0").unlink()
    for number in "12":
        shutil.rmtree(tmp_path / "theirs" / number)
    with pytest.raises(FormatError, match="holds no adapter"):
        al.load(tiny("llama"), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("family", "parts", "fields"),
    [("gpt2", {"a": {"name": "lora", "r": 2}}, {}),
     ("llama", {"a": {"name": "lora_xs", "r": 2}, "b": {"name": "lora", "r": 2}}, {}),
     ("llama", PARTS, {"top_k": 2, "scaling_pass_value": 0.1})],
    ids=["names that PEFT cuts wrongly", "an expert that PEFT has not", "a first pass that is chance"],
)  # fmt: skip
def test_what_peft_does_not_have_is_saved_in_our_format_alone(
    family: str, parts: Any, fields: Any, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    host = al.attach(model, XLoRA(adapters=parts, **fields))
    randomise(host, size=0.2)
    host.save(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md", "adapter_model.safetensors", "method.json"
    }  # fmt: skip
    batch = batch_for(model)
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), logits(model, batch))


def test_folders_are_replaced_whole_and_together(tiny: Any, randomise: Any, logits: Any, tmp_path: Path) -> None:
    """Overwriting takes the folders inside along, and no others; a model with several adapters saves each."""
    model = tiny("llama")
    host = al.attach(model, XLoRA(adapters=PARTS))
    host.attach(LoRA(r=2), "beside")
    randomise(host, size=0.1)
    host.save(tmp_path / "a", "default")
    host.save(tmp_path / "a", "default", overwrite=True)
    (tmp_path / "a" / "mine").mkdir()
    with pytest.raises(OutputError, match="mine"):
        host.save(tmp_path / "a", "default", overwrite=True)
    model.save_pretrained(tmp_path / "both")
    again = al.load(tiny("llama"), tmp_path / "both")
    assert set(again.methods) == {"default", "beside"}
    ids = torch.arange(3, 9)[None]
    assert torch.allclose(again.model(ids).logits, model(ids).logits, atol=1e-4)
