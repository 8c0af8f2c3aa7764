"""A plain model of a base and an adapter: merged, written as a folder of transformers, loaded again and checked."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adapterlab.convert.changes import oriented
from adapterlab.convert.verifying import TEXTS, Row, Verification, compare, token_rows
from adapterlab.errors import ConfigError, MergeError, nearest
from adapterlab.foreign.model import base_name, plain_class
from adapterlab.hosts import Host
from adapterlab.io.atomic import Kind, check_free, new_folder, write_json
from adapterlab.models.catalogue import public_name
from adapterlab.models.progress import quiet_transformers
from adapterlab.paths import user_path

Quantized = Literal["error", "dequantize", "requantize"]
REPORT = "merge.json"
MERGED = Kind("a merged model", (REPORT,), (REPORT,), listing=REPORT)


@dataclass(frozen=True)
class MergedModel:
    """A model that was written, and how well it reproduces the live one.

    Attributes:
        folder: it lies in.
        method: id of the adapter's method.
        base_model: name of the base.
        dtype: of the weights.
        untied: the output layer has got a weight of its own.
        verification: of the folder's model, loaded again.
        dequantized: the same before the weights were packed again; None where they were not.
    """

    folder: Path
    method: str
    base_model: str | None
    dtype: str
    untied: bool
    verification: Verification
    dequantized: Verification | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "folder": str(self.folder)}


def merge_into_base(
    host: Host,
    tokenizer: Any,
    folder: str | Path,
    name: str | None = None,
    *,
    samples: Sequence[str] | Sequence[Row] = TEXTS,
    tied: Literal["error", "untie"] = "error",
    quantized: Quantized = "error",
    overwrite: bool = False,
) -> MergedModel:
    """Write the model with an adapter merged into it, as a folder that transformers loads without adapterlab.

    The folder is loaded again and compared with the live model before it takes its place, so it is either right or
    not there. The host is left as it was. The weights have the dtype of the base: load that as it should be written.

    Args:
        host: of the model.
        tokenizer: to write beside it; None for models without one.
        folder: where to.
        name: of the adapter; needed when there are several.
        samples: what to compare on: texts, or rows of the model's arguments without batch dimension.
        tied: what to do where a weight is shared with another module: refuse, or give the module its own.
        quantized: what to do with packed weights: refuse, write them as plain ones, or pack the merged ones again.
        overwrite: replace a merged model that is there.

    Raises:
        MergeError: the adapter is not linear, a weight is tied or packed and it was not said how to merge, or the
            merged model does not compute what the live one does. Nothing is written then.
        OutputError: the folder is not empty, holds something else than a merged model or the base itself, or cannot be
            written.
    """
    name = host.only(name)
    if quantized not in Quantized.__args__:  # type: ignore[attr-defined]
        raise ConfigError(f"quantized={quantized!r} is unknown. {nearest(quantized, Quantized.__args__)}")  # type: ignore[attr-defined]
    if not hasattr(host.model, "save_pretrained"):
        raise ConfigError(f"A folder is written for models of transformers; this is a {type(host.model).__name__}.")
    base, folder = base_name(host.model), user_path(folder)
    check_free(folder, overwrite=overwrite, kind=MERGED, inputs=[base])
    named = base and public_name(base)
    rows = _rows(samples, tokenizer, host.model)
    packing = getattr(host.model.config, "quantization_config", None)
    packed = any(site.quantized for site in host.all_sites())
    if packed and quantized == "requantize" and packing is None:
        raise MergeError(
            f"quantized='requantize' packs as {type(host.model).__name__}.config.quantization_config says, which "
            "is not there. Use quantized='dequantize' and pack what was written, or load the base with such a config."
        )
    with quiet_transformers(), host.using(name), new_folder(folder, overwrite=overwrite, kind=MERGED) as work:
        untied = _write_plain(host, name, work, tied, "error" if quantized == "error" else "dequantize")
        verification, dequantized = compare(host, _reload(host.model, work), rows), None
        if packed and quantized == "requantize":
            dequantized = verification
            _pack_again(host.model, work, packing)
            verification = compare(host, _reload(host.model, work), rows)
        elif verification.lost and not packed:
            raise MergeError(_lost(verification, host.model.dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        dtype = str(host.model.dtype).removeprefix("torch.")
        report = MergedModel(folder, host.methods[name].id, named, dtype, untied, verification, dequantized)
        files = sorted(file.name for file in work.iterdir())
        write_json(work / REPORT, {**{k: v for k, v in report.to_dict().items() if k != "folder"}, "files": files})
    return report


def _rows(samples: Sequence[Any], tokenizer: Any, model: Any) -> list[Any]:
    if not samples:
        raise ConfigError("There are no samples to compare on. Give texts, or leave them out to use the built-in ones.")
    if not isinstance(samples[0], str):
        return list(samples)
    if tokenizer is None:
        raise ConfigError("Texts need a tokenizer. Give it, or rows of the model's arguments as samples.")
    return list(token_rows(samples, tokenizer, model))


def _write_plain(host: Host, name: str, work: Path, tied: Any, quantized: Any) -> bool:
    """Write the merged model with plain weights; say whether the output layer was untied."""
    before = bool(getattr(host.model.config, "tie_word_embeddings", False))
    host.merge(name, tied=tied, quantized=quantized)
    try:
        twin = _plain_twin(host)
        twin.save_pretrained(work)
        return before and not twin.config.tie_word_embeddings
    finally:
        host.restore(name)


def _plain_twin(host: Host) -> Any:
    """A model of the same class without adapters or packed weights, which shares the tensors of this one."""
    model = host.model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        twin = plain_class(model)(config)
    dtype = model.dtype
    state: dict[str, Tensor] = model.state_dict()
    for site in host.all_sites():
        weight = site.module._parameters.get("weight")
        if site.quantized:
            state[f"{site.path}.weight"] = oriented(site, site.weight()).to(dtype)
        elif weight is not None and hasattr(model.config, "quantization_config") and site.kind == "linear":
            state[f"{site.path}.weight"] = weight.detach().to(dtype)  # what a merge unpacked may be in another dtype
    twin.load_state_dict({key: state[key] for key in twin.state_dict()}, assign=True)
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = model.generation_config
    return twin


def _reload(model: Any, folder: Path) -> Any:
    """Load a folder as its user will."""
    cls = plain_class(model)
    packed = "quantization_config" in (folder / "config.json").read_text(encoding="utf-8")
    place: dict[str, Any] = {"device_map": {"": model.device}} if packed else {}
    loaded, info = cls.from_pretrained(
        folder, dtype=model.dtype, output_loading_info=True, trust_remote_code=False, **place
    )
    faults = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if faults:
        raise MergeError(
            f"The merged {cls.__name__} does not load again as it was written: {', '.join(map(str, faults[:5]))}. "
            "Nothing was written. Keep the adapter as it is (host.save)."
        )
    return (loaded if packed else loaded.to(model.device)).eval()


def _pack_again(model: Any, work: Path, packing: Any) -> None:
    """Replace a plain model in a folder by its packed form, with the settings of the base."""
    cls = plain_class(model)
    again = cls.from_pretrained(
        work, dtype=model.dtype, quantization_config=packing, device_map={"": model.device}, trust_remote_code=False
    )
    for file in work.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    again.save_pretrained(work)


def _lost(found: Verification, dtype: torch.dtype) -> str:
    return (
        f"The merged model differs from the live one by {found.mean_difference:.3g} on average, and the adapter itself "
        f"changes the logits by {found.effect:.3g}: merging loses what it does. Nothing was written. In {dtype}, small "
        "updates vanish beside large weights: load the base in float32 (--dtype fp32), or keep the adapter as it is."
    )
