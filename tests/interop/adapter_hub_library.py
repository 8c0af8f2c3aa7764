"""What AdapterHub's library `adapters` computes and writes; run by a Python that has it, not by ours.

    python adapter_hub_library.py facts FILE      # what it does on tiny models, kept in adapter_hub.json
    python adapter_hub_library.py answers FOLDER  # load FOLDER/<case> each and write FOLDER/answers.json

It needs its own environment, as it wants an older transformers: `pip install adapters==1.3.0`. All numbers in models
and adapters are functions of their names, so that both sides make the same ones.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY, WIDTH = 128, 32
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=VOCABULARY, **_SIZES, **_QUIET)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**_TOKENS, **_SIZES, **_QUIET)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **_TOKENS, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_TOKENS, **_SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )
    ),
}  # fmt: skip


def numbers(name: str, shape: Iterable[int], size: float) -> torch.Tensor:
    """Numbers that look drawn at random, the same for a name everywhere."""
    shape = tuple(shape)
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * torch.sin(steps * steps * 0.7 + zlib.crc32(name.encode()) % 997)).view(shape).float()


@torch.no_grad()
def filled(model: Any) -> Any:
    """The model with such numbers, in eval mode; norms around one."""
    model.config._attn_implementation = "eager"  # under torch's attention the library masks prefixes of causal models
    for name, p in model.named_parameters():
        norm = "norm" in name.lower() or ".ln_" in name
        p.copy_(numbers(name, p.shape, 0.3) + (1 if norm and name.endswith("weight") else 0))
    return model.eval()


def batch(model: Any, padded: bool) -> dict[str, torch.Tensor]:
    """Two rows of tokens, perhaps with padding in the second."""
    ids = 3 + (torch.arange(18).view(2, 9) * 37) % (VOCABULARY - 3)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        given["attention_mask"][1, 5:] = 0
    return {**given, "labels": ids[:, :6].contiguous()} if model.config.is_encoder_decoder else given


@torch.no_grad()
def answer(model: Any, padded: bool = False) -> list[float]:
    """A few logits."""
    logits = model(**batch(model, padded)).logits.flatten()
    return [float(value) for value in logits[:: max(1, len(logits) // 8)][:8]]


def filled_adapter(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter; what the library has once more at every attention module is the same there."""
    roots = {
        name.partition("prefix_tunings.")[2]: name
        for name in shapes
        if "prefix_tunings." in name and ".pool." not in name
    }
    same = {name: roots.get(name.partition("prefix_tunings.")[2], name) for name in shapes}
    return {name: numbers(same[name], shape, 0.4) for name, shape in shapes.items()}


def _configs() -> dict[str, Any]:
    import adapters

    return {
        "houlsby": adapters.DoubleSeqBnConfig(),
        "pfeiffer": adapters.SeqBnConfig(reduction_factor=8),
        "pfeiffer-output": adapters.SeqBnConfig(original_ln_before=False, non_linearity="gelu", scaling=0.5),
        "parallel": adapters.ParBnConfig(),
        "parallel-learned": adapters.ParBnConfig(scaling="learned", reduction_factor=16),
        "mam": adapters.ConfigUnion(
            adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=8), adapters.ParBnConfig(reduction_factor=4)
        ),
        "ia3": adapters.IA3Config(),
        "lora": adapters.LoRAConfig(r=4, alpha=16),
        "lora-all": adapters.LoRAConfig(
            r=2, alpha=8, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
        ),
        "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=5),
        "prefix-network": adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=8),
        "compacter": adapters.CompacterConfig(reduction_factor=8),
        "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, phm_rank=3, scaling=0.5),
        **{
            kind: adapters.UniPELTConfig(
                prefix, adapters.SeqBnConfig(reduction_factor=8), adapters.LoRAConfig(r=3, alpha=2)
            )
            for kind, prefix in (
                ("unipelt", adapters.PrefixTuningConfig(flat=True, prefix_length=5)),
                ("unipelt-network", adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=8)),
            )
        },
    }


def _has(family: str, kind: str) -> bool:
    """Say whether what the library does there can be compared; see docs/interop.md."""
    if family == "t5":
        return not kind.startswith(("mam", "prefix", "compacter", "unipelt")) and kind != "fusion"
    return family in ("bert", "roberta") or (not kind.startswith("unipelt") and kind != "fusion")


def _facts() -> dict[str, Any]:
    """Case -> configuration file, shapes of the tensors by key, and logits."""
    import adapters
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    for family, make in MODELS.items():
        found[family] = {"base": answer(filled(make()))}
        for kind, config in _configs().items():
            if not _has(family, kind):
                continue
            model = filled(make())
            adapters.init(model)
            model.add_adapter("task", config=config)
            with tempfile.TemporaryDirectory() as folder:
                model.save_adapter(folder, "task", with_head=False)
                shapes = {
                    key: list(value.shape)
                    for key, value in torch.load(f"{folder}/pytorch_adapter.bin", weights_only=True).items()
                }
                Path(folder, "pytorch_adapter.bin").unlink()
                save_file(filled_adapter(shapes), f"{folder}/adapter.safetensors")
                written = json.loads(Path(folder, "adapter_config.json").read_text())
                found[family][kind] = {"config": written, "shapes": shapes, "logits": _loaded(make, folder)}
                if kind.startswith("unipelt"):
                    found[family][kind]["padded"] = _loaded(make, folder, padded=True)
        for kind, before in (("fusion", True), ("fusion-output", False)):
            if _has(family, kind):
                found[family][kind] = _fused(make, before)
    return found


def _fused(make: Callable[[], Any], before: bool) -> dict[str, Any]:
    """The same of two adapters that are fused: files by their paths in the folder of the setup."""
    import adapters
    from adapters.composition import Fuse
    from safetensors.torch import load_file, save_file

    model = filled(make())
    adapters.init(model)
    for name, factor in (("one", 8), ("two", 16)):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=factor, original_ln_before=before))
    model.add_adapter_fusion(Fuse("one", "two"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter_setup(folder, Fuse("one", "two"), use_safetensors=True)
        kept = [path for path in Path(folder).rglob("*adapter*.*") if path.is_file()]
        tensors = {path: load_file(path) for path in kept if path.suffix == ".safetensors"}
        shapes = {path: {key: list(value.shape) for key, value in held.items()} for path, held in tensors.items()}
        for path, held in shapes.items():
            save_file(filled_adapter(held), path)
        return {
            "files": {
                str(path.relative_to(folder)): json.loads(path.read_text()) for path in kept if path.suffix == ".json"
            },
            "shapes": {str(path.relative_to(folder)): held for path, held in shapes.items()},
            "logits": _loaded(make, folder),
        }


def _loaded(make: Callable[[], Any], folder: str | Path, padded: bool = False) -> list[float]:
    import adapters

    model = filled(make())
    adapters.init(model)
    if Path(folder, "adapter_setup.json").is_file():
        model.load_adapter_setup(str(folder), set_active=True, use_safetensors=True)
    else:
        name = model.load_adapter(str(folder), with_head=False, use_safetensors=True)
        model.set_active_adapters(name)
    return answer(model.eval(), padded)


def _answers(folder: Path) -> dict[str, Any]:
    cases = sorted(path for path in folder.iterdir() if path.is_dir())
    return {path.name: _loaded(MODELS[path.name.partition("_")[0]], path) for path in cases}


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    result = _facts() if what == "facts" else _answers(where)
    target = where if what == "facts" else where / "answers.json"
    target.write_text(json.dumps(result, sort_keys=True, separators=(",", ":")))
