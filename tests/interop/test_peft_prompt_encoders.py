"""P-tuning, P-tuning v2, and prompts of several tasks against HF PEFT, both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_peft_prompts import TASKS, P, apart, inputs_of, peft_finds_the_cache, real  # noqa: F401

import adapterlab as al
from adapterlab.errors import FormatError
from adapterlab.methods.prompt.mpt import MPT
from adapterlab.methods.prompt.p_tuning import PTuning
from adapterlab.methods.prompt.p_tuning_v2 import PTuningV2

K = 3


def open_in_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("family", TASKS)
def test_we_read_the_vectors_of_an_encoder(
    kind: str, family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = peft.PromptEncoderConfig(
        task_type=TASKS[family], num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type=kind
    )
    theirs = peft.get_peft_model(tiny(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.mul_(2)
    batch = inputs_of(batch_for(tiny(family)), family)
    expected = real(logits(theirs, batch), "prompt", family)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny(family)
    assert apart(logits(model, batch), expected, batch) > 0.001
    host = al.load(model, tmp_path / "theirs")
    assert host.methods["default"].id == "p_tuning"
    assert apart(logits(model, batch), expected, batch) < 1e-5
    host.save(tmp_path / "ours")
    again = open_in_peft(tiny(family), tmp_path / "ours")
    assert apart(real(logits(again, batch), "prompt", family), expected, batch) < 1e-5


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize(
    "method",
    [PTuning(length=P, pool="virtual"), PTuning(length=P, pool="virtual", encoder="lstm"),
     PTuning(length=P - 1, pool="virtual", anchors={1: 9}), MPT(length=P, pool="virtual", rank=2)],
    ids=["mlp", "lstm", "anchors", "one task"],
)  # fmt: skip
def test_peft_reads_what_a_network_makes(
    method: al.Method, family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = inputs_of(batch_for(model), family)
    saved = ("classifier",) if family.startswith("bert") else ()
    host = al.attach(model, method.replace(modules_to_save=saved))
    randomise(host)
    expected = logits(model, batch)
    host.save(tmp_path / "a")
    theirs = open_in_peft(tiny(family), tmp_path / "a")
    assert apart(real(logits(theirs, batch), "prompt", family), expected, batch) < 1e-5
    again = al.load(tiny(family), tmp_path / "a")
    assert again.state_dict("default").keys() == host.state_dict("default").keys()
    assert torch.equal(logits(again.model, batch), expected)
    (tmp_path / "a" / "method.json").unlink()
    assert apart(logits(al.load(tiny(family), tmp_path / "a").model, batch), expected, batch) < 1e-5


@pytest.mark.parametrize("family", ["bert-classes", "bert-tokens"])
def test_peft_reads_deep_prompts_with_their_head(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    batch = inputs_of(batch_for(model), family)
    host = al.attach(model, PTuningV2(length=P))
    randomise(host)
    expected = logits(model, batch)
    host.save(tmp_path / "a")
    theirs = open_in_peft(tiny(family), tmp_path / "a")
    assert apart(logits(theirs, batch), expected, batch) < 1e-5
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), expected)
    (tmp_path / "a" / "method.json").unlink()
    assert apart(logits(al.load(tiny(family), tmp_path / "a").model, batch), expected, batch) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("submodules", [1, 2])
def test_prompts_of_several_tasks_are_read(
    family: str, submodules: int, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    if submodules == 2 and family != "t5":
        return
    torch.manual_seed(3)
    config = peft.MultitaskPromptTuningConfig(
        task_type=TASKS[family], num_virtual_tokens=P, num_tasks=K, num_ranks=2, num_transformer_submodules=submodules
    )
    theirs = peft.get_peft_model(tiny(family), config).eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for factor in (encoder.prefix_task_cols, encoder.prefix_task_rows):
            factor.copy_(torch.randn_like(factor))
    batch = inputs_of(batch_for(tiny(family)), family)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny(family)
    host = al.load(model, tmp_path / "theirs")
    tasks = [2, 0]
    with MPT.choosing(host, "default", tasks):
        ours = logits(model, batch)
    assert host.methods["default"] == MPT(length=P, pool="virtual", tasks=K, rank=2)
    host.save(tmp_path / "ours")
    again = open_in_peft(tiny(family), tmp_path / "ours")
    for found in (theirs, again) if submodules == 1 else (again,):  # with two PEFT adds a prompt to the decoder
        with torch.no_grad():
            expected = real(found(**batch, task_ids=torch.tensor(tasks)).logits, "prompt", family)
        assert apart(ours, expected, batch) < 1e-5
    if submodules == 2:
        return
    sampled = theirs.prompt_encoder["default"].state_dict()
    assert torch.equal(host.tensors("default")[next(k for k in host.tensors("default") if k.endswith("cols"))],
                       sampled["prefix_task_cols"])  # fmt: skip


def test_what_peft_does_not_have_is_saved_in_our_format_alone(tiny: Any, tmp_path: Path) -> None:
    model = tiny("bert-classes")
    for name, method in {
        "places": PTuning(length=2, placeholder=100),
        "base": PTuning(length=2, train_base=True),
        "pool": MPT(length=2),
    }.items():
        host = al.attach(model, method, name)
        host.save(tmp_path / name, name)
        assert not (tmp_path / name / "adapter_config.json").exists()
        host.detach(name)
        assert al.load(model, tmp_path / name).methods[name] == method
        al.host(model).detach(name)


def test_a_file_without_factors_is_refused(tiny: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=K)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "prefix_task_cols"}, file)
    with pytest.raises(FormatError, match="prefix_task_cols"):
        al.load(tiny("llama"), tmp_path)
