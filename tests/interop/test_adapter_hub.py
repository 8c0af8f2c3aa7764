"""Adapters of AdapterHub's library `adapters`, both ways, against what it computes (`adapter_hub.json`).

`ADAPTERHUB_PYTHON` names a Python that has the library; then it also loads what is written here.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_hub_library import MODELS, answer, filled, filled_adapter
from safetensors.torch import load_file, save_file

import adapterlab as al
from adapterlab.convert import export_adapterhub
from adapterlab.errors import AttachError, FormatError
from adapterlab.foreign.adapter_hub import MODEL_TYPES

HERE = Path(__file__).parent
FACTS: dict[str, Any] = json.loads((HERE / "adapter_hub.json").read_text(encoding="utf-8"))
CASES = [(family, kind) for family, kinds in FACTS.items() for kind in kinds if kind != "base"]
IDS = {
    "houlsby": "adapter_houlsby", "pfeiffer": "adapter_pfeiffer", "pfeiffer-output": "adapter_pfeiffer",
    "parallel": "adapter_parallel", "parallel-learned": "adapter_parallel", "mam": "mam_adapter", "ia3": "ia3",
    "lora": "lora", "lora-all": "lora", "prefix": "prefix_tuning", "prefix-network": "prefix_tuning",
    "compacter": "compacter", "compacter++": "compacter", "unipelt": "unipelt", "unipelt-network": "unipelt",
    "fusion": "adapter_fusion", "fusion-output": "adapter_fusion",
}  # fmt: skip
NETWORK = ("mam", "prefix-network", "unipelt-network")  # read as the numbers that it makes


def reference(folder: Path, family: str, kind: str, **options: Any) -> Path:
    """The folder that the library wrote for a case, perhaps with other options."""
    case = FACTS[family][kind]
    folder.mkdir(parents=True)
    if "files" in case:
        for path, content in case["files"].items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(content))
        for path, shapes in case["shapes"].items():
            save_file(filled_adapter(shapes), folder / path)
        return folder
    config = copy.deepcopy(case["config"])
    for option, value in options.items():
        if option.startswith("configs."):  # of a part of a union
            config["config"]["configs"][int(option[8:])].update(value)
        else:
            config["config"][option] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(filled_adapter(case["shapes"]), folder / "adapter.safetensors")
    return folder


def model_of(family: str) -> Any:
    return filled(MODELS[family]())


def close(found: list[float], wanted: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_the_known_models_are_those_compared() -> None:
    assert set(FACTS) == set(MODEL_TYPES)
    for family in FACTS:
        close(answer(model_of(family)), FACTS[family]["base"])


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_the_library_writes_answers_as_there_and_is_written_as_it_was(
    family: str, kind: str, tmp_path: Path
) -> None:
    case, model = FACTS[family][kind], model_of(family)
    folder = reference(tmp_path / "theirs", family, kind)
    host = al.load(model, folder, "task")
    assert host.methods["task"].id == IDS[kind]
    wanted = torch.tensor(case["logits"])
    assert (wanted - torch.tensor(FACTS[family]["base"])).abs().max() > 0.01
    close(answer(model), case["logits"])
    if "padded" in case:
        close(answer(model, padded=True), case["padded"])
    export_adapterhub(host, "task", tmp_path / "ours")
    again = model_of(family)
    al.load(again, tmp_path / "ours")
    close(answer(again), case["logits"])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*.*") if p.is_file())
    for path in files if kind not in NETWORK else ():
        ours, theirs = tmp_path / "ours" / path, folder / path
        if path.suffix == ".json":
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            written, given = load_file(ours), load_file(theirs)
            assert written.keys() == given.keys()
            assert all(torch.equal(value, given[key]) for key, value in written.items())
    host.save(tmp_path / "own")
    own = al.load(model_of(family), tmp_path / "own")
    close(answer(own.model), case["logits"])


@pytest.mark.parametrize(("family", "kind", "reads"), [("gpt2", "pfeiffer", "sum"), ("llama", "parallel", "residual")])
def test_adapters_in_front_of_the_norm_are_read_as_what_they_are(
    family: str, kind: str, reads: str, tmp_path: Path
) -> None:
    """Where blocks normalise first, the library's adapters read another stream than ours do by themselves."""
    model = model_of(family)
    host = al.load(model, reference(tmp_path / "a", family, kind))
    method = host.methods["task"]
    assert method.reads == reads
    tensors = [value.clone() for value in host.tensors("task").values()]
    host.detach("task")
    other = al.attach(model, method.replace(reads="output" if reads == "sum" else "input"))
    with torch.no_grad():
        for ours, theirs in zip(other.tensors("default").values(), tensors, strict=True):
            ours.copy_(theirs)
    differs = (torch.tensor(answer(model)) - torch.tensor(FACTS[family][kind]["logits"])).abs().max()
    assert differs > 0.1
    if reads == "residual":  # the library has no form of the other one
        with pytest.raises(FormatError, match="reads='residual'"):
            export_adapterhub(other, "default", tmp_path / "b")


def test_a_base_without_a_head_takes_the_adapter_of_one_with_a_head(tmp_path: Path) -> None:
    model = model_of("bert").bert
    host = al.load(model, reference(tmp_path / "a", "bert", "houlsby"))
    assert all(path.startswith("encoder.") for path in host.adapters("task"))
    with_head = al.load(model_of("bert"), tmp_path / "a")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        assert torch.equal(model(**ids)[0], with_head.model.bert(**ids)[0])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a norm of its own": ("pfeiffer", {"ln_after": True}, "ln_after=True"),
    "gating": ("houlsby", {"use_gating": True}, "use_gating=True"),
    "an invertible adapter": ("pfeiffer", {"inv_adapter": "nice"}, "inv_adapter='nice'"),
    "hypercomplex, parallel": ("parallel", {"phm_layer": True}, "No method here reads this adapter"),
    "a rule for each adapter": ("compacter", {"shared_phm_rule": False}, "shared_phm_rule=False"),
    "a rule in two factors": ("compacter", {"factorized_phm_rule": True}, "factorized_phm_rule=True"),
    "a frozen rule": ("compacter", {"learn_phm": False}, "learn_phm=False"),
    "a scale of each channel": ("parallel", {"scaling": "channel"}, "scaling='channel'"),
    "attention only": ("houlsby", {"output_adapter": False}, "No method here reads this adapter"),
    "another nonlinearity": ("pfeiffer", {"non_linearity": "leakyrelu"}, "non_linearity='leakyrelu'"),
    "layers left out": ("parallel", {"leave_out": [0]}, "leave_out"),
    "a residual behind the norm": ("pfeiffer", {"residual_before_ln": False}, "residual_before_ln"),
    "dora": ("lora", {"use_dora": True}, "use_dora=True"),
    "vera": ("lora", {"vera_d": 0.1}, "vera_d=0.1"),
    "another architecture": ("lora", {"architecture": "reft"}, "No method here reads this adapter"),
    "a network of another kind": ("prefix-network", {"non_linearity": "relu"}, "non_linearity='relu'"),
    "a union of others": ("mam", {"configs": []}, "No method here reads this adapter"),
    "two gates for keys and values": ("unipelt", {"configs.0": {"shared_gating": False}}, "shared_gating=False"),
    "another adapter behind a gate": ("unipelt", {"configs.1": {"non_linearity": "gelu"}}, "no form here but relu"),
    "LoRA elsewhere": ("unipelt", {"configs.2": {"attn_matrices": ["q"]}}, "No method here reads this adapter"),
    "one part without its gate": ("unipelt", {"configs.2": {"use_gating": False}}, "No method here reads this adapter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_reproduced_is_refused_by_name(what: str, tmp_path: Path) -> None:
    kind, options, message = REFUSED[what]
    model = model_of("bert")
    with pytest.raises(FormatError, match=message):
        al.load(model, reference(tmp_path / "a", "bert", kind, **options))
    assert al.host(model) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Stack"}, "in another way than Fuse"),
        ({"children": [{"type": "single", "children": ["../a"]}]}, "in another way than Fuse"),
        ({"children": []}, "in another way than Fuse"),
        ({"children": [{"type": "single", "children": ["three"]}]}, r"three.*cannot be read as JSON"),
    ],
)
def test_setups_that_are_no_fusion_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, model = reference(tmp_path / "a", "bert", "fusion"), model_of("bert")
    setup = json.loads((folder / "adapter_setup.json").read_text())
    setup["adapter_setup"].update(change)
    (folder / "adapter_setup.json").write_text(json.dumps(setup))
    with pytest.raises(FormatError, match=message):
        al.load(model, folder)
    assert al.host(model) is None


def test_a_fusion_of_another_kind_or_with_more_tensors_is_refused(tmp_path: Path) -> None:
    folder = reference(tmp_path / "a", "bert", "fusion")
    file = folder / "one,two" / "adapter_fusion_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "config": {**config["config"], "value": False, "temperature": True}}))
    with pytest.raises(FormatError, match=r"(temperature=True|value=False); (temperature=True|value=False)"):
        al.load(model_of("bert"), folder)
    file.write_text(json.dumps(config))
    tensors = load_file(folder / "one" / "adapter.safetensors")
    more = {**tensors, "bert.encoder.layer.0.output.adapters.one.gate.weight": torch.ones(1)}
    save_file(more, folder / "one" / "adapter.safetensors")
    with pytest.raises(FormatError, match="does not speak of"):
        al.load(model_of("bert"), folder)


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = reference(tmp_path / "a", "bert", "pfeiffer")
    tensors = load_file(folder / "adapter.safetensors")
    more = {**tensors, "bert.encoder.layer.0.output.adapters.task.gate.weight": torch.ones(1)}
    save_file(more, folder / "adapter.safetensors")
    with pytest.raises(FormatError, match=r"does not speak of.*gate.weight"):
        al.load(model_of("bert"), folder)
    save_file(dict(list(tensors.items())[1:]), folder / "adapter.safetensors")
    with pytest.raises(FormatError, match=r"has no tensor bert.encoder.layer.0"):
        al.load(model_of("bert"), folder)
    with pytest.raises(FormatError):
        al.load(model_of("gpt2"), reference(tmp_path / "b", "bert", "pfeiffer"))
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(FormatError, match=r"(?s)a pickle.*adapter.safetensors"):
        al.load(model_of("bert"), folder)


def test_what_the_library_left_out_is_named(tmp_path: Path) -> None:
    """It does not save what adapters share where the backbone is the whole model."""
    folder = reference(tmp_path / "a", "bert", "compacter")
    tensors = load_file(folder / "adapter.safetensors")
    del tensors["bert.shared_parameters.task.phm_rule"]
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(FormatError, match=r"has no tensor bert\.shared_parameters\.phm_rule"):
        al.load(model_of("bert"), folder)


def test_factors_of_the_library_before_1_1_are_read_as_they_were_computed(tmp_path: Path) -> None:
    folder = reference(tmp_path / "a", "bert", "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "version": "adapters.1.0.1"}))
    method = al.load(model_of("bert"), folder).methods["task"]
    assert method.alpha == method.r == 4


def test_what_the_library_lacks_is_not_written(tiny: Any, tmp_path: Path) -> None:
    cases = {
        "it trains norms": ("bert", al.AdapterHoulsby()),
        "before the nonlinearity": ("bert", al.IA3()),
        "every layer": ("bert", al.LoRA(targets={"include": ["q"], "layers": "1"})),
        "has no boft": ("bert", al.BOFT(block_size=4)),
        "is more": ("bert", al.LoRA(targets=["q"], bias="all")),
        "one pair": ("gpt2", al.LoRA(targets=["qkv"])),
        "offset=0": ("bert", al.PrefixTuning(length=3)),
        r"frozen \(norms=False\)": ("bert", al.Compacter(m=4)),
        "padding=True": ("bert", al.UniPELT(m=4)),
        "later ones too": ("gpt2", al.UniPELT(m=4, padding=True)),
        "no sparse_adapter": ("bert", al.AdapterFusion(adapters={"a": {"name": "sparse_adapter", "m": 4}})),
    }
    for message, (family, method) in cases.items():
        host = al.attach(model_of(family), method)
        with pytest.raises(FormatError, match=message):
            export_adapterhub(host, "default", tmp_path / "a")
    with pytest.raises(FormatError, match="'mixtral' were not compared"):
        export_adapterhub(al.attach(tiny("mixtral"), al.LoRA()), "default", tmp_path / "a")
    with pytest.raises(AttachError, match="reads='sum' is for blocks that normalise first"):
        al.attach(model_of("bert"), al.AdapterPfeiffer(reads="sum"))


OURS: dict[str, tuple[str, Any]] = {
    "bert_houlsby": ("bert", al.AdapterHoulsby(m=4, norms=False)),
    "bert_pfeiffer": ("bert", al.AdapterPfeiffer(m=3, activation="silu", scale=2)),
    "gpt2_pfeiffer": ("gpt2", al.AdapterPfeiffer(m=4, reads="sum")),
    "llama_output": ("llama", al.AdapterPfeiffer(m=4, reads="output", activation="gelu_tanh")),
    "llama_parallel": ("llama", al.AdapterParallel(m=5, reads="residual")),
    "t5_houlsby": ("t5", al.AdapterHoulsby(m=4, norms=False)),
    "llama_lora": ("llama", al.LoRA(r=3, alpha=5, targets=["q", "v", "up"])),
    "gpt2_lora": ("gpt2", al.LoRA(r=2, targets=["qkv"], blocks=(32, 32, 32), enable=(True, False, True))),
    "t5_ia3": ("t5", al.IA3(targets=["k", "v", "wi"], feedforward=[])),
    "gpt2_prefix": ("gpt2", al.PrefixTuning(length=3, offset=0)),
    "llama_mam": ("llama", al.MAMAdapter(length=3, m=4, reads="residual")),
    "bert_compacter": ("bert", al.Compacter(m=4, n=2, norms=False)),
    "gpt2_compacter": ("gpt2", al.Compacter(m=4, norms=False, attention=False, reads="sum")),
    "t5_compacter": ("t5", al.Compacter(m=4, norms=False)),
    "roberta_unipelt": ("roberta", al.UniPELT(length=3, r=2, m=4, padding=True)),
    "llama_fusion": ("llama", al.AdapterFusion(adapters={
        "a": {"name": "adapter_pfeiffer", "m": 4, "reads": "output"}, "b": {"name": "adapter_pfeiffer", "m": 3,
        "reads": "output"}})),
}  # fmt: skip


@pytest.mark.skipif("ADAPTERHUB_PYTHON" not in os.environ, reason="ADAPTERHUB_PYTHON names no Python with `adapters`")
def test_the_library_loads_what_is_written_here(tmp_path: Path, randomise: Any) -> None:
    wanted = {}
    for case, (family, method) in OURS.items():
        host = al.attach(model_of(family), method)
        randomise(host)
        export_adapterhub(host, "default", tmp_path / case)
        wanted[case] = answer(host.model)
    command = [os.environ["ADAPTERHUB_PYTHON"], str(HERE / "adapter_hub_library.py"), "answers", str(tmp_path)]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    )
    found = json.loads((tmp_path / "answers.json").read_text())
    for case in OURS:
        close(found[case], wanted[case])
