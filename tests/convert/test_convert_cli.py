"""The verbs combine, export, extract, merge and analyze, on folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import adapterlab as al
from adapterlab.cli import build
from adapterlab.errors import AdapterlabError, ConfigError, FormatError, MergeError, OutputError

IDS = torch.arange(5, 30)[None]
CPU = ("--device", "cpu")


@pytest.fixture
def run() -> Callable[..., str]:
    """`run("verb", ...)` gives stdout; an error of the library is raised as it is."""

    def call(*args: object, columns: int = 200) -> str:
        result = CliRunner().invoke(build(), [str(a) for a in args], env={"COLUMNS": str(columns)})
        if isinstance(result.exception, AdapterlabError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    return call


@pytest.fixture
def base_folder(base, folder_of) -> Path:
    return folder_of(base())


@pytest.fixture
def north(base_folder, saved_adapter) -> Path:
    return saved_adapter(base_folder, al.LoRA(r=2, targets=["q", "v"]), "north", 1)


@pytest.fixture
def south(base_folder, saved_adapter) -> Path:
    return saved_adapter(base_folder, al.DoRA(r=2, targets=["q", "down"]), "south", 2)


def weights(base_folder: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    model, _ = al.load_model(base_folder, precision="fp32", device="cpu")
    for adapter in adapters:
        host = al.load(model, adapter, active=True)
        host.merge(list(host.methods)[-1])
    return {k: v.clone() for k, v in model.state_dict().items() if "_adapters" not in k}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_combine(run, base_folder, north, south, tmp_path) -> None:
    options = ["--weights", "0.5,-1", "--precision", "fp32", *CPU]
    out = run("combine", north, south, *options, "--output", tmp_path / "both")
    assert "relative error" in out
    plain, a, b = weights(base_folder), weights(base_folder, north), weights(base_folder, south)
    both = weights(base_folder, tmp_path / "both")
    for key, value in plain.items():
        wanted = value + 0.5 * (a[key] - value) - (b[key] - value)
        torch.testing.assert_close(both[key], wanted, atol=1e-4, rtol=1e-4)
    assert "0.5 × north + -1 × south (linear)" in (tmp_path / "both" / "README.md").read_text()
    made = json.loads(
        run("combine", north, south, "--how", "ties", "--rank", 3, "--json", "--output", tmp_path / "t", *CPU)
    )
    assert {m["rank"] for m in made["modules"]} <= {1, 2, 3}
    assert made["worst"]["error"] == max(m["error"] for m in made["modules"]) > 0
    assert al.load(al.load_model(base_folder, device="cpu")[0], made["folder"]).methods


def test_combine_two_of_one_name(run, base_folder, north, tmp_path) -> None:
    twin = tmp_path / "elsewhere" / "north"
    shutil.copytree(north, twin)
    out = run("combine", north, twin, "--how", "cat", "--weights", "1,-1", "--output", tmp_path / "zero", *CPU)
    assert "all" in out
    zero, plain = weights(base_folder, tmp_path / "zero"), weights(base_folder)
    assert all(torch.allclose(zero[key], plain[key], atol=1e-6) for key in plain)


def test_combine_refuses(run, base, folder_of, base_folder, north, saved_adapter, tmp_path) -> None:
    foreign = saved_adapter(folder_of(base(seed=5), "elsewhere_base"), al.LoRA(targets=["q"]), "foreign", 1)
    with pytest.raises(FormatError, match=r"different base models: .*elsewhere_base.*--model"):
        run("combine", north, foreign, "--output", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--weights takes numbers.*'a,b'"):
        run("combine", north, "--weights", "a,b", "--output", tmp_path / "x")
    with pytest.raises(ConfigError, match="is a base model"):
        run("combine", north, base_folder, "--output", tmp_path / "x")
    with pytest.raises(OutputError, match="not empty"):
        run("combine", north, "--output", north)
    assert not (tmp_path / "x").exists()


def test_export(run, base_folder, south, north, tmp_path, saved_adapter) -> None:
    out = run("export", south, "--energy", 1.0, "--precision", "fp32", "--output", tmp_path / "lora", *CPU)
    assert "energy kept" in out
    exact, made = weights(base_folder, south), weights(base_folder, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "method.json").read_text())["method"] == "lora"
    for key, value in exact.items():
        torch.testing.assert_close(made[key], value, atol=1e-4, rtol=1e-4)
    run("export", north, "--as", "peft", "--output", tmp_path / "peft", *CPU)
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ConfigError, match=r"--as gguf is unknown. Valid: adapterhub, lora, peft"):
        run("export", north, "--as", "gguf", "--output", tmp_path / "x")
    with pytest.raises(ConfigError, match="--as peft keeps"):
        run("export", north, "--as", "peft", "--rank", 2, "--output", tmp_path / "x")
    bottleneck = saved_adapter(base_folder, al.AdapterPfeiffer(), "bottleneck", 1)
    with pytest.raises(MergeError, match="cannot be merged"):
        run("export", bottleneck, "--output", tmp_path / "x", *CPU)
    assert not (tmp_path / "x").exists()


def test_overwrite_replaces_what_a_verb_made_and_never_an_input(run, base_folder, north, south, tmp_path) -> None:
    made, figures = tmp_path / "made", tmp_path / "figures"
    for _ in range(2):
        run("export", south, "--rank", 1, "--output", made, "--overwrite", *CPU)
        run("analyze", south, "--output", figures, "--no-picture", "--overwrite", *CPU)
    (figures / "notes.txt").touch()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").touch()
    verbs = [["merge", north], ["export", north], ["combine", north, south], ["analyze", north]]
    for verb in [*verbs, ["extract", base_folder, "--base", base_folder]]:
        for place in (photos, base_folder, north, figures, tmp_path):
            before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
            if place == north and verb[0] == "extract":
                continue  # an adapter, and no input
            with pytest.raises(OutputError, match=r"left alone|never replaced"):
                run(*verb, "--output", place, "--overwrite", *CPU)
            assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_extract(run, base, folder_of, base_folder, tmp_path) -> None:
    tuned = base()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        tuned.model.layers[0].self_attn.q_proj.weight += torch.randn(32, 2, generator=draw) @ torch.ones(2, 32)
        tuned.model.norm.weight += 1
    folder = folder_of(tuned, "tuned")
    args = ["extract", folder, "--base", base_folder, "--energy", 0.9999]
    out = run(*args, "--output", tmp_path / "x", *CPU)
    assert "Left out" in out
    assert "model.norm.weight" in out
    run(*args, "--keep", "--output", tmp_path / "y", *CPU)
    host = al.load(al.load_model(base_folder, precision="fp32", device="cpu")[0], tmp_path / "y")
    torch.testing.assert_close(logits(host.model), logits(tuned), atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "y" / "method.json").read_text())["base_model"] == str(base_folder)
    with pytest.raises(ConfigError, match="energy=7"):
        run("extract", folder, "--base", base_folder, "--energy", 7, "--output", tmp_path / "z")


def test_merge(run, base_folder, north, tmp_path) -> None:
    out = run("merge", north, "--dtype", "fp32", "--output", tmp_path / "m", *CPU)
    assert "same top token" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    host = al.load(al.load_model(base_folder, precision="fp32", device="cpu")[0], north)
    torch.testing.assert_close(logits(loaded), logits(host.model), atol=1e-4, rtol=1e-4)
    (tmp_path / "samples.txt").write_text("one sample\nanother one\n")
    args = ["merge", north, "--output", tmp_path / "n", "--json", *CPU]
    found = json.loads(run(*args, "--samples", tmp_path / "samples.txt"))
    assert found["verification"]["rows"] == 2
    assert found["dtype"] == "bfloat16"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "yes"}) + "\n" for i in range(3)))
    found = json.loads(run(*args, "--overwrite", "--data", f"eval_path={rows}"))
    assert found["verification"]["rows"] == 3
    with pytest.raises(OutputError, match="not empty"):
        run(*args)
    with pytest.raises(ConfigError, match="--tied never is unknown"):
        run(*args, "--overwrite", "--tied", "never")


def test_merge_a_tied_model(run, base, folder_of, saved_adapter, tmp_path) -> None:
    tied = folder_of(base(tie_word_embeddings=True))
    adapter = saved_adapter(tied, al.LoRA(r=2, targets=["embed"]), "north", 1)
    with pytest.raises(MergeError, match="tied"):
        run("merge", adapter, "--output", tmp_path / "m", *CPU)
    assert "tie_word_embeddings=false" in run("merge", adapter, "--output", tmp_path / "m", "--tied", "untie", *CPU)


def test_analyze(run, base, folder_of, base_folder, north, south, tmp_path) -> None:
    assert "effective rank" in run("analyze", north, *CPU)
    found = json.loads(run("analyze", north, "--other", south, "--json", *CPU))
    assert found["north"]["correlation"] is not None
    assert set(found["cosine"]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    tuned = base()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = folder_of(tuned, "tuned")
    pytest.importorskip("matplotlib")
    out = run("analyze", folder, "--base", base_folder, "--other", north, "--output", tmp_path / "report", *CPU)
    assert "correlation of" in out
    report = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert {"tuned", "north", "cosine"} == set(report)
    assert (tmp_path / "report" / "analysis.png").stat().st_size > 10_000
    run("analyze", north, "--no-picture", "--output", tmp_path / "plain", *CPU)
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["analysis.json"]
    with pytest.raises(ConfigError, match="--base"):
        run("analyze", folder, *CPU)


def test_analyze_says_what_each_module_kept(run, base_folder, tmp_path) -> None:
    host = al.attach(AutoModelForCausalLM.from_pretrained(base_folder), al.LoRA(r=3, targets=["q", "v"]))
    for i, layer in enumerate(host.adapters("default").values()):
        layer.B.data.normal_()
        layer.B.data[:, i:] = 0
    host.save(tmp_path / "pruned")
    out = run("analyze", tmp_path / "pruned", *CPU, columns=80)
    assert "pruned: rank 6 in all, layer by layer: q 0 2; v 1 3" in out.replace("\n", " ")


def test_tables_are_by_role_and_fit_80_columns(run, north, south, tmp_path) -> None:
    out = run("analyze", north, *CPU, columns=80)
    assert "q x 2" in out
    assert "layer by layer" not in out, "the ranks are alike"
    assert "in 1 " in run("analyze", north, "--rank", "1", *CPU, columns=80)
    assert "largest at model.layers" in out
    made = run("export", north, "--output", tmp_path / "lora", *CPU, columns=80)
    assert "q x 2" in made
    assert "Worst module: model.layers" in made
    both = run("analyze", north, "--other", south, *CPU, columns=80)
    assert max(len(line) for text in (out, made, both) for line in text.splitlines() if "x 2" in line) <= 80
