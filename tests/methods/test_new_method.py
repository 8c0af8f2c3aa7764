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
from adapterlab.registry import _registered, families

ROOT = Path(__file__).resolve().parents[2]
METHODS = Path("src/adapterlab/methods")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the parts of the repository that the scaffold looks at."""
    for family in families():
        (tmp_path / METHODS / family).mkdir(parents=True)
        shutil.copy(ROOT / METHODS / family / "__init__.py", tmp_path / METHODS / family)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/new_method.py", tmp_path / "scripts")
    for file in ("lora.py", "_factors.py"):
        shutil.copy(ROOT / METHODS / "low_rank" / file, tmp_path / METHODS / "low_rank")
    return tmp_path


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, checkout / "scripts/new_method.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def made(checkout):
    """The scaffold's method, imported under the name it would have in the package."""
    done = run(checkout, "multiplicative/zz_new_thing")
    assert done.returncode == 0, done.stderr
    name, file = "adapterlab.methods.multiplicative.zz_new_thing", METHODS / "multiplicative/zz_new_thing.py"
    spec = importlib.util.spec_from_file_location(name, checkout / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name], _registered["zz_new_thing"]


@pytest.fixture
def claim(made, checkout):
    """The names of the claim test that it writes."""
    namespace: dict = {"__name__": "claim"}
    exec(compile((checkout / "tests/claims/test_zz_new_thing.py").read_text(), "claim", "exec"), namespace)
    return namespace


def test_it_says_what_it_wrote_and_what_comes_next(checkout):
    done = run(checkout, "low_rank/zz_new_thing")
    assert "wrote src/adapterlab/methods/low_rank/zz_new_thing.py" in done.stdout
    assert "wrote tests/claims/test_zz_new_thing.py" in done.stdout
    assert "pytest tests/claims/test_zz_new_thing.py" in done.stdout


def test_the_method_attaches_trains_merges_and_is_found(made, tiny, batch_for, randomise, logits):
    assert al.ZzNewThing is made.ZzNewThing
    assert al.method("zz_new_thing") is made.ZzNewThing
    assert made.ZzNewThing.family == "multiplicative"
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


def test_the_claim_it_writes_holds_and_each_mutation_breaks_it(claim):
    claim["test_the_claim_holds"]()
    names = {name for name, _ in claim["BROKEN"].values()}
    assert names == {"gain", "around"}, "every line of the mathematics is broken once"
    for line in claim["BROKEN"]:
        with pytest.MonkeyPatch.context() as patch:
            claim["test_the_claim_fails_when_a_line_is_broken"](line, patch)


def test_the_other_test_it_writes_passes(claim, tiny, batch_for, randomise, logits):
    claim["test_start_count_and_merge"]("gpt2", tiny, batch_for, randomise, logits)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("low_rank/LoRA", "lower-case letters.*received 'LoRA'"),
        ("low_rank/a-b", "received 'a-b'"),
        ("low_rank/a__b", "received 'a__b'"),
        ("low_rank/1st", "received '1st'"),
        ("low_rank/_x", "received '_x'"),
        ("low_rank/", "received ''"),
        ("prompt/class", "no Python keyword"),
        ("low_rank/lora", "taken by src/adapterlab/methods/low_rank/lora.py"),
        ("prompt/lo_ra", "taken by src/adapterlab/methods/low_rank/lora.py.*Choose another"),
        ("thing", "received 'thing' without a family.*low_rank, mixture.*For example: bottleneck/thing"),
        ("lowrank/thing", "no family 'lowrank'.*Nearest: low_rank.*Families: bottleneck.*an __init__.py"),
        ("src/low_rank/thing", "no family 'src/low_rank'"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(checkout, place, message):
    before = sorted(checkout.rglob("*"))
    done = run(checkout, place)
    assert done.returncode == 1
    assert re.search(message, done.stderr, flags=re.DOTALL)
    assert sorted(checkout.rglob("*")) == before


def test_what_a_family_shares_takes_no_id(checkout):
    assert run(checkout, "low_rank/factors").returncode == 0


def test_an_existing_test_is_not_overwritten(checkout):
    (checkout / "tests/claims").mkdir(parents=True)
    (checkout / "tests/claims/test_thing.py").write_text("mine")
    assert "exists already" in run(checkout, "mixture/thing").stderr
    assert (checkout / "tests/claims/test_thing.py").read_text() == "mine"
    assert not (checkout / METHODS / "mixture/thing.py").exists()


def test_it_needs_one_name_and_lists_the_families(checkout):
    assert "usage" in run(checkout).stderr
    assert "Families: bottleneck, composite" in run(checkout).stderr
    assert "usage" in run(checkout, "a/b", "c/d").stderr
