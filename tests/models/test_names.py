"""What a base model is called in files that others read, and that each of its names leads to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import adapterlab as al
from adapterlab.convert import export_peft
from adapterlab.errors import ModelError
from adapterlab.evaluate.opening import locate, open_target
from adapterlab.models import load_model, pull, resolve, wheel
from adapterlab.models.catalogue import public_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copied(package: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue has `org/tiny` under the alias `tiny`, in a copy of its own."""

    def convert(gguf: Path, folder: Path, *_: Any, **__: Any) -> None:
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)

    monkeypatch.setattr(wheel, "convert", convert)


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.fixture
def hub_copy(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's client keeps of `org/tiny`."""
    folder = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(tiny_llama, folder)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    return folder


def test_an_alias_stays_here(copied: None, tmp_path: Path) -> None:
    model, _ = load_model("tiny", device="cpu", precision="fp32")
    host = al.attach(model, al.LoRA(r=2, targets=["q"]))
    folder = host.save(tmp_path / "a")
    export_peft(host, "default", tmp_path / "b")
    model.save_pretrained(tmp_path / "c")
    assert base_of(folder) == base_of(tmp_path / "b") == base_of(tmp_path / "c") == model.name_or_path == "org/tiny"
    card = (folder / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(card)["base_model"] == "org/tiny"
    assert locate(folder).base == "tiny"  # the copy that it was made on, to the bit
    assert locate(folder).base_model == locate(tmp_path / "b").base_model == "org/tiny"
    opened = open_target(locate(tmp_path / "b"), device="cpu")  # by its id, without asking the hub
    assert opened.model.name_or_path == "org/tiny"


def test_an_adapter_that_names_an_alias_still_opens(copied: None, tmp_path: Path) -> None:
    model, _ = load_model("tiny", device="cpu", precision="fp32")
    folder = export_peft(al.attach(model, al.LoRA(r=2, targets=["q"])), "default", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    place = locate(folder)
    assert place.base_model == "org/tiny"
    assert open_target(place, device="cpu").host is not None


def test_a_copy_that_transformers_loaded_is_known_too(copied: None, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pull("tiny", progress=False))
    assert base_of(al.attach(model, al.LoRA(r=2, targets=["q"])).save(tmp_path / "a")) == "org/tiny"


def test_what_the_hub_has_comes_before_a_copy(copied: None, hub_copy: Path, tmp_path: Path) -> None:
    copy = pull("tiny", progress=False)
    assert resolve("org/tiny") == hub_copy
    assert resolve("tiny") == copy
    assert public_name(hub_copy) == public_name(copy) == "org/tiny"
    model, _ = load_model("org/tiny", device="cpu")
    folder = al.attach(model, al.LoRA(r=2, targets=["q"])).save(tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == COMMIT
    assert locate(folder).base == "org/tiny"


def test_a_folder_keeps_its_name(tiny_llama: Path) -> None:
    assert public_name(tiny_llama) == str(tiny_llama)
    assert public_name("org/other") == "org/other"


def test_a_hub_out_of_reach_names_the_alias(copied: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="under the alias 'tiny', from the package index"):
        resolve("org/tiny")
