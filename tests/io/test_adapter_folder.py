"""Adapter folders: what is written, what damage is answered with, and that nothing is lost when writing fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterlab as al
from adapterlab.errors import FormatError, OutputError, TrainingError
from adapterlab.io import atomic, folder, read_info
from adapterlab.io.atomic import check_free, new_folder, write_json, write_text
from adapterlab.io.finite import not_finite

FILES = {"adapter_model.safetensors", "adapter_config.json", "method.json", "README.md"}


@pytest.fixture
def saved(tiny: Any, randomise: Any, tmp_path: Path) -> Path:
    """A LoRA adapter on the tiny Llama, all its tensors random."""
    host = al.attach(tiny("llama"), al.LoRA(r=4, targets=["q", "v"], alpha=6))
    randomise(host)
    return host.save(tmp_path / "deep" / "er" / "adapter", base_model="org/tiny", notes={"data": "none", "loss": 1.5})


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def others(path: Path) -> list[str]:
    """What lies beside a folder; leftovers of a failed write would."""
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_what_is_written(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == FILES
    info = read_info(saved)
    assert (info.method, info.base_model, info.name, info.written_by) == ("lora", "org/tiny", "default", "adapterlab")
    assert info.fields["r"] == 4
    assert info.modules == tuple(
        f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("q", "v")
    )  # fmt: skip
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    mask = atomic._umask()
    assert saved.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (saved / "method.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert others(saved) == []


def test_a_saved_adapter_comes_back_to_the_bit(saved: Path, tiny: Any) -> None:
    host = al.load(tiny("llama"), saved, "again")
    assert host.active == ("again",)
    assert host.methods["again"] == al.LoRA(r=4, targets=["q", "v"], alpha=6)
    host.save(saved.parent / "second", base_model="org/tiny")
    first, second = (load_file(saved.parent / n / "adapter_model.safetensors") for n in ("adapter", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_second_adapter_waits_unless_asked(saved: Path, tiny: Any) -> None:
    model = tiny("llama")
    host = al.load(model, saved, "a")
    assert al.load(model, saved, "b") is host
    assert host.active == ("a",)
    al.load(model, saved, "c", active=True)
    assert host.active == ("a", "c")


@pytest.mark.parametrize("method", ["full", "freeze"])
@pytest.mark.parametrize("family", ["llama-tied", "t5"])
def test_methods_without_a_peft_form(
    method: str, family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    host = al.attach(model, al.method(method)())
    randomise(host)
    expected = logits(model, batch_for(model))
    host.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    again = al.load(tiny(family), tmp_path / "a")
    assert torch.equal(logits(again.model, batch_for(model)), expected)
    with again.using():
        assert torch.equal(logits(again.model, batch_for(model)), logits(tiny(family), batch_for(model)))


def test_an_inactive_adapter_is_saved_with_its_values(
    tiny: Any, batch_for: Any, randomise: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("qwen2")
    host = al.attach(model, al.LoRA(r=2, bias="all"))
    randomise(host)
    expected = logits(model, batch_for(model))
    with host.using():
        host.save(tmp_path / "a")
    assert torch.equal(logits(al.load(tiny("qwen2"), tmp_path / "a").model, batch_for(model)), expected)


# ------------------------------------------------------------------ the card


@pytest.mark.parametrize("base", ["org/tiny", 'odd: "name" # é', "/a/folder", None])
def test_the_card_starts_with_valid_metadata(base: str | None, tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=4, targets=["q"]))
    host.save(tmp_path / "a", base_model=base, notes={"data set": "rows: 3"})
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta.get("base_model") == base
    assert meta["library_name"] == "peft"
    assert "lora" in meta["tags"]
    summary = host.summary()
    assert f"{summary.trainable:,} of {summary.total:,}" in body
    assert "- data set: rows: 3" in body
    settings = json.loads(body.split("```json\n")[1].split("```")[0])
    assert settings["r"] == 4


# ------------------------------------------------------------------ damage


def untouched(model: Any, plain: Any) -> bool:
    same = all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    return al.host(model) is None and same and model.state_dict().keys() == plain.state_dict().keys()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil(f: Path) -> None:
    file = f / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)][0, 0] = float("inf")
    save_file(tensors, file)
    if (f / "method.json").exists():  # as an early version saved it
        edit(f / "method.json", sha256=None, seal=None)


DAMAGE: dict[str, tuple[Any, str]] = {
    "flipped": (lambda f: flip(f / "adapter_model.safetensors"), "SHA-256"),
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 200), "SHA-256"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "future": (lambda f: edit(f / "method.json", format=99), r"format 99.*reads format 1.*Update"),
    "half json": (lambda f: (f / "method.json").write_text('{"format": 1'), "JSON"),
    "a list": (lambda f: (f / "method.json").write_text("[]"), "list"),
    "binary json": (lambda f: (f / "method.json").write_bytes(b"\xff\xfe\x00"), "JSON"),
    "lacking": (lambda f: (f / "method.json").write_text('{"format": 1, "method": "lora"}'), "lacks 'fields'"),
    "no such method": (lambda f: edit(f / "method.json", method="lorra"), "'lorra'"),
    "bad field": (lambda f: edit(f / "method.json", fields={"r": 0}), "r = 0"),
    "new field": (lambda f: edit(f / "method.json", fields={"rr": 1}), "'rr'"),
    "fields of a wrong type": (lambda f: edit(f / "method.json", fields=3), "fields"),
    "modules": (lambda f: edit(f / "method.json", modules=["a.b"], seal=None), r"adapted modules differ.*a\.b"),
    "another scale": (lambda f: edit(f / "method.json", fields={"r": 4, "alpha": 7}), 'is not what was saved.*"seal"'),
    "not finite": (lambda f: spoil(f), r"not finite, first in .*lora_B"),
    "peft not finite": (lambda f: [(f / "method.json").unlink(), spoil(f)], r"not finite, first in .*lora_B"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "holds no adapter.*it is empty"),
    "gone": (lambda f: shutil.rmtree(f), "no such folder"),
    "peft truncated": (
        lambda f: [(f / "method.json").unlink(), os.truncate(f / "adapter_model.safetensors", 200)],
        "is damaged",
    ),
    "peft without type": (
        lambda f: [(f / "method.json").unlink(), (f / "adapter_config.json").write_text("{}")], "type 'None'",
    ),
    "peft without tensors": (
        lambda f: [(f / "method.json").unlink(), save_file({}, f / "adapter_model.safetensors")], "no module",
    ),
    "peft half": (
        lambda f: [(f / "method.json").unlink(), (f / "adapter_config.json").write_text('{"peft')], "JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_model_untouched(kind: str, saved: Path, tiny: Any) -> None:
    harm, message = DAMAGE[kind]
    harm(saved)
    model = tiny("llama")
    with pytest.raises(FormatError, match=f"(?s){message}"):
        al.load(model, saved)
    assert untouched(model, tiny("llama"))


def test_a_missing_and_a_foreign_tensor_are_listed(saved: Path, tiny: Any) -> None:
    (saved / "method.json").unlink()
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(k for k in tensors if "lora_B" in k)
    del tensors[gone]
    save_file({**tensors, "base_model.model.model.norm.extra": torch.zeros(2)}, file)
    model = tiny("llama")
    with pytest.raises(FormatError, match=r"(?s)\.B: missing.*norm\.extra: not in this adapter"):
        al.load(model, saved)
    assert untouched(model, tiny("llama"))


def test_another_base_is_told_by_shapes_and_by_modules(saved: Path, tiny: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(FormatError, match=r"(?s)made for 'org/tiny'.*saved \(4, 32\), here \(4, 64\)"):
        al.load(wide, saved)
    assert al.host(wide) is None
    with pytest.raises(FormatError, match=r"(?s)made for 'org/tiny'.*GPT2LMHeadModel"):
        al.load(tiny("gpt2"), saved)
    config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(FormatError, match=r"(?s)layers\.2"):
        al.load(LlamaForCausalLM(config), saved)


def test_a_failed_load_leaves_other_adapters(saved: Path, tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("llama")
    host = al.load(model, saved, "good")
    before = logits(model, batch_for(model))
    flip(saved / "adapter_model.safetensors")
    with pytest.raises(FormatError):
        al.load(model, saved, "bad")
    assert tuple(host.methods) == ("good",)
    assert torch.equal(logits(model, batch_for(model)), before)


# ------------------------------------------------------------------ writing


def test_a_folder_that_is_not_empty_is_kept(saved: Path, tiny: Any) -> None:
    before = content(saved)
    host = al.attach(tiny("llama"), al.LoRA(r=2))
    with pytest.raises(OutputError, match=r"not empty.*overwrite"):
        host.save(saved)
    assert content(saved) == before
    host.save(saved, overwrite=True)
    assert read_info(saved).fields["r"] == 2
    assert others(saved) == []
    with pytest.raises(OutputError, match="is a file"):
        host.save(saved / "README.md")


def test_only_an_adapter_is_overwritten_and_only_a_finite_one_saved(saved: Path, tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(OutputError, match=r"Only an adapter(.|\n)*one\.jpg"):
        host.save(tmp_path / "photos", overwrite=True)
    before = content(saved)
    with torch.no_grad():
        next(iter(host.tensors("default").values())).view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match=r"'default' holds values that are not finite, first in .*lora_A"):
        host.save(saved, overwrite=True)
    assert content(saved) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_the_first_tensor_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    good = {
        "none": torch.zeros(0, dtype=dtype),
        "count": torch.ones(2, dtype=torch.int64),
        "a": torch.ones(3).to(dtype),
    }
    assert not_finite(good) is None
    for value in (float("nan"), float("inf"), -float("inf"))[: 1 if dtype.itemsize == 1 else 3]:  # it has no infinity
        assert not_finite({**good, "bad": torch.tensor([1.0, value]).to(dtype)}) == "bad"


def test_an_empty_folder_may_be_filled(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    al.attach(tiny("llama"), al.LoRA(r=2)).save(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES


FAILURES: dict[str, tuple[BaseException, str]] = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), r"disk is full.*MiB free"),
    "full disk, by safetensors": (Exception("I/O error: No space left on device (os error 28)"), "disk is full"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
}


@pytest.mark.parametrize("step", ["save_file", "write_json", "write_text"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_write_leaves_the_old_folder(
    failure: str, step: str, saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, message = FAILURES[failure]
    before = content(saved)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(folder, step, fail)
    host = al.attach(tiny("llama"), al.LoRA(r=2))
    with pytest.raises(OutputError, match=message) as raised:
        host.save(saved, overwrite=True)
    assert str(saved) in str(raised.value)
    assert content(saved) == before
    with pytest.raises(OutputError):
        host.save(saved.parent / "new")
    assert others(saved) == []


def test_an_interrupt_leaves_the_old_folder(saved: Path) -> None:
    before = content(saved)

    def interrupted() -> None:
        with new_folder(saved, overwrite=True) as work:
            (work / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(saved) == before
    assert others(saved) == []


def test_the_old_folder_comes_back_when_the_last_step_fails(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = content(saved), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error"), new_folder(saved, overwrite=True) as work:
        (work / "new").write_text("x")
    assert content(saved) == before
    assert others(saved) == []


def test_a_parent_that_is_a_file(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"another folder|Choose another path"):
        al.attach(tiny("llama"), al.LoRA(r=2)).save(tmp_path / "file" / "a")
    assert (tmp_path / "file").read_text() == "x"


def test_text_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a" / "b.json"
    write_json(file, {"é": [1]})
    assert json.loads(file.read_text("utf-8")) == {"é": [1]}
    assert file.read_text("utf-8").endswith("\n")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OutputError, match="disk is full"):
        write_text(file, "new")
    assert json.loads(file.read_text("utf-8")) == {"é": [1]}
    assert [p.name for p in file.parent.iterdir()] == ["b.json"]


def test_check_free(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "x").touch()
    check_free(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        check_free(tmp_path)


def test_tensors_that_cannot_be_read_are_named(saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(FormatError, match=r"adapter_model.safetensors is damaged .*Permission denied"):
        al.load(tiny("llama"), saved)
