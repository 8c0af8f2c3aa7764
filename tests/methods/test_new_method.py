"""The scaffold for new methods: what it writes works, and it refuses what would not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapterlab as al
from adapterlab.registry import _registered

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the parts of the repository that the scaffold looks at."""
    (tmp_path / "src/adapterlab/methods").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/new_method.py", tmp_path / "scripts")
    shutil.copy(ROOT / "src/adapterlab/methods/lora.py", tmp_path / "src/adapterlab/methods")
    return tmp_path


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, checkout / "scripts/new_method.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def made(checkout):
    """The scaffold's method, imported under the name it would have in the package."""
    done = run(checkout, "zz_new_thing")
    assert done.returncode == 0, done.stderr
    file = checkout / "src/adapterlab/methods/zz_new_thing.py"
    spec = importlib.util.spec_from_file_location("adapterlab.methods.zz_new_thing", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name], _registered["zz_new_thing"]


def test_it_says_what_it_wrote_and_what_comes_next(checkout):
    done = run(checkout, "zz_new_thing")
    assert "wrote src/adapterlab/methods/zz_new_thing.py" in done.stdout
    assert "wrote tests/claims/test_zz_new_thing.py" in done.stdout
    assert "pytest tests/claims/test_zz_new_thing.py" in done.stdout


def test_the_method_attaches_trains_merges_and_is_found(made, tiny, batch_for, randomise, logits):
    assert al.ZzNewThing is made.ZzNewThing
    assert al.method("zz_new_thing") is made.ZzNewThing
    for kind in ("llama", "gpt2"):
        model = tiny(kind)
        batch = batch_for(model)
        before = logits(model, batch)
        host = al.attach(model, made.ZzNewThing())
        assert torch.equal(logits(model, batch), before)
        host.verify(batch)
        randomise(host)
        live = logits(model, batch)
        host.merge()
        assert torch.allclose(logits(model, batch), live, atol=1e-4)


def test_the_claim_fails_until_it_is_written(made, checkout):
    text = (checkout / "tests/claims/test_zz_new_thing.py").read_text()
    namespace: dict = {"__name__": "claim"}
    exec(compile(text, "claim", "exec"), namespace)
    with pytest.raises(pytest.fail.Exception, match="write the claim"):
        namespace["test_claim"]()
    with pytest.raises(pytest.fail.Exception, match="break the method here"):
        namespace["test_claim_fails_when_the_method_is_broken"]()


def test_the_other_tests_it_writes_pass(made, checkout, tiny):
    namespace: dict = {"__name__": "claim"}
    exec(compile((checkout / "tests/claims/test_zz_new_thing.py").read_text(), "claim", "exec"), namespace)
    namespace["test_trainable_count_is_the_formula"](tiny)
    namespace["test_starts_at_the_base"](tiny)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("LoRA", "lower-case letters.*received 'LoRA'"),
        ("a-b", "received 'a-b'"),
        ("a__b", "received 'a__b'"),
        ("1st", "received '1st'"),
        ("_x", "received '_x'"),
        ("class", "no Python keyword"),
        ("lora", "taken by src/adapterlab/methods/lora.py"),
        ("lo_ra", "taken by src/adapterlab/methods/lora.py.*Choose another"),
    ],
)
def test_bad_ids_are_refused_and_nothing_is_written(checkout, id, message):
    before = sorted(checkout.rglob("*"))
    done = run(checkout, id)
    assert done.returncode == 1
    assert re.search(message, done.stderr, flags=re.DOTALL)
    assert sorted(checkout.rglob("*")) == before


def test_an_existing_test_is_not_overwritten(checkout):
    (checkout / "tests/claims").mkdir(parents=True)
    (checkout / "tests/claims/test_thing.py").write_text("mine")
    assert "exists already" in run(checkout, "thing").stderr
    assert (checkout / "tests/claims/test_thing.py").read_text() == "mine"
    assert not (checkout / "src/adapterlab/methods/thing.py").exists()


def test_it_needs_one_id(checkout):
    assert "usage" in run(checkout).stderr
    assert "usage" in run(checkout, "a", "b").stderr
