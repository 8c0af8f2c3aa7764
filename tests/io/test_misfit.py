"""The reason why an adapter does not load: another base only where it is one, and what to do about the others."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterlab as al
from adapterlab.errors import FormatError

FILE = "adapter_model.safetensors"


@pytest.fixture
def saved(tiny: Any, randomise: Any, tmp_path: Path) -> Path:
    """A PEFT folder: LoRA on q and v of the tiny Llama."""
    host = al.attach(tiny("llama"), al.LoRA(r=4, targets=["q", "v"]))
    randomise(host)
    host.save(tmp_path / "a", base_model="org/tiny")
    (tmp_path / "a" / "method.json").unlink()
    return tmp_path / "a"


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, folder / FILE)


REASONS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "another rank": (
        lambda f: configure(f, r=8), "llama", r"settings and the tensors.*contradict.*saved \(4, 32\), here \(8, 32\)"
    ),
    "a tensor is missing": (without_a_tensor, "llama", r"not those of the lora adapter.*\.B: missing.*Copy the whole"),
    "settings of another method": (lambda f: configure(f, use_dora=True), "llama", r"dora adapter.*\.m: missing"),
    "a size that no file has": (lambda f: configure(f, r=20_000_000), "llama", r"cannot be put on.*account for"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_other_reasons_than_another_base(case: str, saved: Path, tiny: Any) -> None:
    harm, family, said = REASONS[case]
    harm(saved)
    with pytest.raises(FormatError, match=f"(?s){said}") as caught:
        al.load(tiny(family), saved)
    assert "made for" not in str(caught.value)


def test_a_model_that_a_method_cannot_work_on_is_no_other_base(tiny: Any, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    model = tiny("llama")
    for layer in model.model.layers:
        cls = type(layer.self_attn)
        layer.self_attn.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(FormatError, match=r"cannot be put on this LlamaForCausalLM: .*attention interface") as caught:
        al.load(model, tmp_path)
    assert "made for" not in str(caught.value)


def test_another_base_is_named(saved: Path, tiny: Any) -> None:
    with pytest.raises(FormatError, match=r"made for 'org/tiny' and does not fit this GPT2LMHeadModel: 4 of its 4"):
        al.load(tiny("gpt2"), saved)


def test_the_part_or_the_whole_is_named_where_it_fits(saved: Path, tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(FormatError, match=r"model around this LlamaModel.*Load it onto the whole model"):
        al.load(model.model, saved)
    al.attach(tiny("llama").model, al.LoRA(r=2, targets=["q"])).save(tmp_path / "b")
    with pytest.raises(FormatError, match=r"a part of this LlamaForCausalLM.*the module 'model'"):
        al.load(model, tmp_path / "b")
    al.load(model.model, tmp_path / "b")


# ---------------------------------------------------------------------- what others save in other ways


def test_a_pickle_is_not_opened_and_can_be_converted(saved: Path, tiny: Any) -> None:
    torch.save(load_file(saved / FILE), saved / "adapter_model.bin")
    (saved / FILE).unlink()
    with pytest.raises(
        FormatError, match=r"(?s)adapter_model\.bin, a pickle.*none is opened.*weights_only=True"
    ) as caught:
        al.load(tiny("llama"), saved)
    command = shlex.split(str(caught.value).splitlines()[-1])
    subprocess.run([sys.executable, *command[1:]], cwd=saved, check=True)
    assert al.load(tiny("llama"), saved).active == ("default",)


STATES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])),
    "dora": ("llama", peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "ia3": ("llama", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "vera": ("llama", peft.VeraConfig(target_modules=["q_proj"], r=4)),
    "classes": ("bert-classes", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False], ids=["with the base", "of the adapter"])
@pytest.mark.parametrize("case", STATES)
def test_keys_with_the_name_of_an_adapter(
    case: str, whole: bool, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    family, config = STATES[case]
    theirs = peft.get_peft_model(tiny(family), copy.deepcopy(config), adapter_name="mine").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in theirs.state_dict().items() if whole or ".mine" in k}
    save_file(state, tmp_path / "mine" / FILE)
    model = tiny(family)
    batch = batch_for(model)
    al.load(model, tmp_path / "mine")
    assert (logits(model, batch) - logits(theirs, batch)).abs().max() < 1e-5


def test_a_file_of_two_adapters_says_how_to_save_each(saved: Path, tiny: Any) -> None:
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="north")
    theirs.add_adapter("south", peft.LoraConfig(target_modules=["q_proj"]))
    save_file({key: value.clone() for key, value in theirs.state_dict().items()}, saved / FILE)
    with pytest.raises(FormatError, match=r"holds 2 adapters, north, south.*selected_adapters"):
        al.load(tiny("llama"), saved)


def test_keys_without_the_lead_of_peft(saved: Path, tiny: Any) -> None:
    tensors = load_file(saved / FILE)
    save_file({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, saved / FILE)
    assert len(al.load(tiny("llama"), saved).adapters("default")) == 4
