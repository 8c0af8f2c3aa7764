"""Folders that others made: none of their code runs, and what they ask for is checked before memory is taken."""

from __future__ import annotations

import ast
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import transformers
from transformers import LlamaForCausalLM

import adapterlab as al
from adapterlab.cli import main
from adapterlab.errors import ModelError
from adapterlab.methods.side_network.proxy_tuning import ProxyTuning
from adapterlab.models import load_model, pull
from adapterlab.plan.shapes import config_of

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({proof!r}).write_text("it ran")
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


def edit(file, **changes):
    unsealed = {"seal": None} if file.name == "method.json" else {}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes, **unsealed}))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def proof(folder, tmp_path, monkeypatch):
    """A file that appears when code of the model folder runs; somebody says yes to every question."""
    there = tmp_path / "proof"
    (folder / "strange.py").write_text(CODE.format(proof=str(there)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(transformers.dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return there


def model_of_its_own(folder):
    classes = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    edit(folder / "config.json", auto_map=classes, model_type="strange")


def tokenizer_of_its_own(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.Words"]}, tokenizer_class="Words")


@pytest.mark.parametrize("spoil", [model_of_its_own, tokenizer_of_its_own])
def test_code_of_a_folder_runs_only_when_it_is_said(folder, proof, spoil):
    spoil(folder)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_model(folder, device="cpu", precision="fp32")
    assert not proof.exists()
    load_model(folder, device="cpu", precision="fp32", trust_remote_code=True)
    assert proof.exists()


@pytest.mark.parametrize(
    "verb", [["targets"], ["generate", "a"], ["plan", "--model"], ["extract", "--output", "x", "--base"]]
)
def test_no_verb_asks_whether_code_may_run(folder, proof, capsys, monkeypatch, tmp_path, verb):
    monkeypatch.chdir(tmp_path)
    model_of_its_own(folder)
    command = [*verb[:1], *([str(folder), *verb[1:]] if len(verb) < 2 or verb[0] == "generate" else verb[1:])]
    if command[-1].startswith("--"):
        command += [str(folder), *[str(folder)] * (verb[0] == "extract")]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 1_000_000},
        {"vocab_size": 1_000_000_000},
        {"intermediate_size": 10**9},
        {"hidden_size": 10**12},
        {"num_hidden_layers": 10_000_000},
        {"num_hidden_layers": 10**15},
        {"num_labels": 10**12},
    ],
)
def test_a_configuration_larger_than_its_files_is_refused_at_once(folder, changes):
    edit(folder / "config.json", **changes)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(folder, device="cpu")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("count", [10_000_000, 10**15, 1e15])
def test_a_plan_refuses_layers_without_end(folder, count):
    edit(folder / "config.json", num_hidden_layers=count)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        config_of(folder)


def test_a_kernel_of_the_hub_is_code(folder):
    edit(folder / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(ModelError, match="somebody/attention"):
        load_model(folder, device="cpu")


@pytest.fixture
def offline(monkeypatch):
    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    return asked


def test_loading_an_adapter_asks_no_network(tiny_llama, tmp_path, offline):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    name = ProxyTuning.hold("here", LlamaForCausalLM.from_pretrained(tiny_llama))
    host = al.attach(model, ProxyTuning(expert=name, anti_expert=name))
    host.save(tmp_path / "adapter")
    edit(
        tmp_path / "adapter" / "method.json",
        fields={"expert": "somebody/expert", "anti_expert": "somebody/other", "expert_adapter": None, "alpha": 1.0},
    )
    with pytest.raises(ModelError, match="adapterlab pull somebody/expert"):
        al.load(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    assert not offline
    with pytest.raises(ModelError, match="could not be fetched"):  # who names it may fetch it
        pull("somebody/expert")
    assert offline


def test_an_adapter_that_needs_itself_is_refused(tiny_llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    name = ProxyTuning.hold("here", LlamaForCausalLM.from_pretrained(tiny_llama))
    al.attach(model, ProxyTuning(expert=name, anti_expert=name)).save(tmp_path / "adapter")
    fields = {"expert": str(tiny_llama), "anti_expert": None, "expert_adapter": str(tmp_path / "adapter"), "alpha": 1.0}
    edit(tmp_path / "adapter" / "method.json", fields=fields)
    with pytest.raises(al.errors.FormatError, match="names itself"):
        al.load(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")


def test_whether_code_may_run_is_said_wherever_transformers_could_ask():
    root, silent = Path(al.__file__).parent, []
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                said = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                if not said and not ast.unparse(node.func).startswith("PeftModel."):
                    silent.append(f"{file.relative_to(root)}: {ast.unparse(node)}")
    assert not silent


def test_shards_lie_in_the_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        load_model(folder, device="cpu")
