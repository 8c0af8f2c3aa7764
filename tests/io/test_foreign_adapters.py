"""Adapter folders of others: their patterns end, their sizes are checked first, their links are not followed."""

from __future__ import annotations

import json
import resource
import shutil
import time

import pytest

import adapterlab as al
from adapterlab.compare.config import CompareConfig
from adapterlab.compare.preparing import claimed as comparison_folder
from adapterlab.compare.results import load as load_comparison
from adapterlab.errors import FormatError, TargetError
from adapterlab.evaluate.opening import locate
from adapterlab.train.folder import claimed

ENDLESS = r"(a|b|\w|.)+(.*)+[^\w.]"


def edit(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes, "seal": None}))


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


def run_folder(root):
    for part in ("checkpoint", "evaluation", "best", "trackers"):
        (root / part).mkdir(parents=True)
    for file in ("run.json", "config.yaml", "metrics.jsonl", "checkpoint/state.pt", "best/method.json"):
        (root / file).write_text("{}")
    return root


RUN_PARTS = ("metrics.jsonl", "run.json", "checkpoint", "evaluation", "best", "checkpoint/state.pt", "best/method.json")


@pytest.mark.parametrize("name", [*RUN_PARTS, "trackers/dead"])
def test_a_link_out_of_a_run_is_never_followed(tmp_path, name):
    run, outside = run_folder(tmp_path / "run"), tmp_path / "outside"
    place = run / name
    if place.is_dir():
        place.rename(outside)
    elif place.exists():
        place.replace(outside)
    place.symlink_to(outside)  # a dead one where nothing was
    before = outside.read_text() if outside.is_file() else None
    for use in (
        lambda: claimed(run, resume=True, overwrite=False).__enter__(),
        lambda: claimed(run, resume=False, overwrite=True).__enter__(),
        lambda: locate(run),
    ):
        with pytest.raises(FormatError, match="lies outside"):
            use()
    assert before is None or outside.read_text() == before


def test_links_that_stay_inside_and_folders_that_are_links_are_used(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / "latest").symlink_to("best")
    (tmp_path / "alias").symlink_to(run)
    claimed(tmp_path / "alias", resume=True, overwrite=False).__enter__()


@pytest.mark.parametrize("name", ["method.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_an_adapter_is_followed_only_in_the_cache_of_the_hub(tiny, folder, tmp_path, name):
    cached = tmp_path / "models--a--b" / "snapshots" / "1"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    shutil.copytree(folder, cached)
    for place, outside in ((cached, tmp_path / "models--a--b" / "blobs" / "1"), (folder, tmp_path / "outside")):
        (place / name).rename(outside)
        (place / name).symlink_to(outside)
    al.load(tiny("llama"), cached)
    with pytest.raises(FormatError, match="lies outside"):
        al.load(tiny("llama"), folder)


@pytest.mark.parametrize("name", ["comparison.json", "runs", "runs/lora/seed0/result.json"])
def test_a_link_out_of_a_comparison_is_never_followed(tmp_path, name):
    root = tmp_path / "comparison"
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(tmp_path)
    (root / "compare.yaml").write_text("{}")
    with pytest.raises(FormatError, match="lies outside"):
        load_comparison(root)
    config = CompareConfig(data={"task": "chain_sum"}, methods=["lora"], budget={"steps": 1}, output=root)
    with pytest.raises(FormatError, match="lies outside"):
        comparison_folder(config, overwrite=True).__enter__()
