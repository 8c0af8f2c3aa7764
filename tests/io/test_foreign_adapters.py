"""Adapter folders of others: their patterns end, their sizes are checked first, their links are not followed."""

from __future__ import annotations

import json
import resource
import time

import pytest

import adapterlab as al
from adapterlab.errors import FormatError, TargetError

ENDLESS = r"(a|b|\w|.)+(.*)+[^\w.]"


def edit(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def folder(tiny, tmp_path):
    al.attach(tiny("llama"), al.LoRA(r=2, targets=["q", "v"])).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def fields(folder, **changes):
    found = json.loads((folder / "method.json").read_text())["fields"]
    edit(folder, "method.json", fields={**found, **changes})


def peft(folder, **changes):
    (folder / "method.json").unlink()
    edit(folder, "adapter_config.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "changes"),
    [
        (fields, {"targets": {"include": [ENDLESS]}}),
        (fields, {"targets": {"include": ["q"], "exclude": [ENDLESS]}}),
        (fields, {"rank_pattern": {ENDLESS: 4}}),
        (peft, {"rank_pattern": {ENDLESS: 4}}),
        (peft, {"alpha_pattern": {ENDLESS: 4}}),
    ],
)
def test_a_pattern_without_end_is_refused(tiny, folder, spoil, changes):
    spoil(folder, **changes)
    began = time.monotonic()
    with pytest.raises((FormatError, TargetError), match="takes too long"):
        al.load(tiny("llama"), folder)
    assert time.monotonic() - began < 3


def test_expressions_that_people_write_still_match(tiny, folder):
    peft(folder, target_modules=r".*(?:self_attn|attention).*(?:q_proj|v_proj)$", rank_pattern={r"layers\.\d+\.x": 4})
    assert len(al.load(tiny("llama"), folder).adapters("default")) == 4


@pytest.mark.parametrize(
    ("spoil", "changes"), [(fields, {"r": 20_000_000}), (peft, {"r": 20_000_000}), (peft, {"r": 10**30})]
)
def test_a_size_that_the_file_does_not_have_takes_no_memory(tiny, folder, spoil, changes):
    model = tiny("llama")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spoil(folder, **changes)
    with pytest.raises(FormatError, match="account for"):
        al.load(model, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert al.host(model) is None or not al.host(model).methods
