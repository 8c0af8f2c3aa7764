"""What makes a folder a base model."""

from __future__ import annotations

from pathlib import Path

from adapterlab.errors import ModelError
from adapterlab.json_text import parsed

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_FILES = ("adapter_config.json", "method.json")


def missing_files(folder: Path) -> list[str]:
    """Name the files that a model folder lacks: its configuration, its weights, or shards of them."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        return [*lacking, "model.safetensors"]
    if weights.name.endswith(".index.json"):
        try:
            shards = sorted(set(parsed(weights.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return [*lacking, f"a readable {weights.name}"]
        lacking += [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    return lacking


def check_folder(folder: Path) -> Path:
    """Check that a folder holds a base model.

    Returns:
        The folder, absolute.

    Raises:
        ModelError: it is a file, an adapter, or lacks files.
    """
    if not folder.is_dir():
        raise ModelError(f"{str(folder)!r} is a file. Give the folder that holds config.json and the weights.")
    if adapter := next((folder / name for name in _ADAPTER_FILES if (folder / name).is_file()), None):
        _refuse_adapter(folder, adapter)
    if missing := missing_files(folder):
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        found = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        models = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        hint = f" Models lie one level below: {', '.join(models[:5])}." if models else ""
        raise ModelError(
            f"{str(folder)!r} is not a complete model: {', '.join(missing)} missing. "
            f"It holds: {found or 'nothing'}.{hint} Save a model there with model.save_pretrained() and "
            f"tokenizer.save_pretrained(), or name another folder."
        )
    return folder.absolute()


def _refuse_adapter(folder: Path, adapter: Path) -> None:
    if (folder / "config.json").is_file():  # a model saved together with an adapter is still a model
        return
    try:
        content = parsed(adapter.read_text())
    except ValueError:
        content = {}
    base = content.get("base_model_name_or_path") or content.get("base_model") or content.get("base")
    known = f"for base {base!r}" if base else f"and {adapter.name} does not name its base"
    raise ModelError(
        f"{str(folder)!r} holds an adapter {known}, not a base model. Load the base first, then put the adapter on "
        f"it: model, tokenizer = adapterlab.load_model({str(base or '<base>')!r}); "
        f"adapterlab.load(model, {str(folder)!r})."
    )
