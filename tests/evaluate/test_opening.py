from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from adapterlab.errors import FormatError, ModelError
from adapterlab.evaluate.opening import locate, open_target


def test_a_run_an_adapter_and_a_model_are_told_apart(run_folder: Path, adapter: Path, base_folder: Path) -> None:
    run = locate(run_folder, checkpoint="last")
    assert (run.kind, run.base, run.adapter, run.label) == ("run", str(base_folder), run_folder / "last", "run")
    assert run.data is not None
    assert run.precision == "fp32"
    alone = locate(adapter)
    assert (alone.kind, alone.base, alone.label) == ("adapter", str(base_folder), "north")
    assert locate(adapter, model="other").base == "other"
    assert locate(base_folder).kind == locate("smollm2-135m").kind == "model"
    opened = open_target(run, device="cpu")
    assert opened.host is not None
    assert opened.host.active == ("run",)


def test_a_peft_folder_without_its_base(adapter: Path) -> None:
    (adapter / "method.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(FormatError, match=r"does not name its base model\. Give it: --model"):
        locate(adapter)
    assert locate(adapter, model="smollm2-135m").base == "smollm2-135m"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": {"model": 3, "data": {}}}', '{"config": null}'])
def test_a_damaged_run_file(run_folder: Path, content: str) -> None:
    (run_folder / "run.json").write_text(content)
    with pytest.raises(FormatError, match=rf"run\.json.*name the adapter folder itself.*{run_folder.name}/best"):
        locate(run_folder)


def test_missing_checkpoints(run_folder: Path) -> None:
    with pytest.raises(FormatError, match=r"no checkpoint 'lst'. Nearest: last.*Choose it with --checkpoint"):
        locate(run_folder, checkpoint="lst")
    shutil.rmtree(run_folder / "best")
    with pytest.raises(FormatError, match=r"no checkpoint 'best'.*last"):
        locate(run_folder)
    shutil.rmtree(run_folder / "last")
    with pytest.raises(FormatError, match="holds no adapter yet"):
        locate(run_folder)


def test_a_run_that_lost_its_run_file(run_folder: Path) -> None:
    (run_folder / "run.json").unlink()
    with pytest.raises(FormatError, match=r"best and last, but no run\.json.*run/best"):
        locate(run_folder)


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(ModelError, match="smolm2"):
        open_target(locate("smolm2"))
