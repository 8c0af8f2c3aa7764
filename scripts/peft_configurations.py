"""Try the configurations of HF PEFT's own tests: what PEFT saves under each is loaded here and has to answer the same.

    python scripts/peft_configurations.py PEFT_CHECKOUT [--only WORD] [--verbose]

Nothing of the tests runs. Their lists of configurations and their small modules are read from the files; the models
that they take from the hub are replaced by random ones of the same class.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import adapterlab as al
from adapterlab.errors import AdapterlabError

LISTS = {
    "test_custom_models.py": ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"),
    "test_decoder_models.py": ("ALL_CONFIGS",),
    "test_encoder_decoder_models.py": ("ALL_CONFIGS",),
    "test_feature_extraction_models.py": ("ALL_CONFIGS",),
    "test_seq_classifier.py": ("ALL_CONFIGS",),
    "test_lora_variants.py": ("TEST_CASES",),
    "test_target_parameters.py": ("ALL_CONFIGS",),
}
SMALL = {
    "vocab_size": 128, "hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32, "d_kv": 8,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "intermediate_size_mlp": 64, "d_ff": 64,
    "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "rotary_dim": 4, "max_position_embeddings": 64,
    "n_positions": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
CLASSES = {"qwen2": "Qwen2ForCausalLM", "gpt2": "GPT2LMHeadModel"}
# What a refusal says -> the reason in a few words; of options, their names are the reason.
REASONS = {
    r"options .*would differ: (\w+)": r"option `\1`",
    r"No method here reads": "a type that no method here has",
    r"groups, a dilation": "LoRA or DoRA on a convolution with groups",
    r"one axis and a whole w2": "LoKr on a convolution of one axis, w2 whole",
    r"Conv\dd \(conv\), and this method adapts linear": "IA³, HRA or rotations on convolutions",
    r"adapts 'mha' as a whole": "torch's `MultiheadAttention` as a whole",
    r"reaches the decoder's self-attention alone": "prefix of an encoder-decoder",
    r"computes its positions itself": "prefix where positions cannot be moved (OPT)",
}
SAME, REFUSED, THEIRS, DIFFERS = KINDS = ("loads, agrees", "refused", "fails in PEFT", "differs")


@dataclass(frozen=True)
class Case:
    """One configuration on one model."""

    origin: str
    model: str
    config: type
    options: dict[str, Any]
    made: Any


@dataclass(frozen=True)
class Outcome:
    """What became of it, and why."""

    kind: str
    reason: str = ""


def namespace(file: Path) -> dict[str, Any]:
    """Run what defines lists and modules in a test file: imports that are there, constants and classes of torch."""
    found: dict[str, Any] = {"__name__": file.stem}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            for alias in node.names:
                _run(type(node)(**{**vars(node), "names": [alias]}), found)
        elif isinstance(node, ast.Assign) or (isinstance(node, ast.ClassDef) and "Test" not in node.name):
            _run(node, found)
    return found


def _run(node: ast.stmt, within: dict[str, Any]) -> None:
    try:
        exec(compile(ast.Module([node], []), "<tests>", "exec"), within)
    except Exception:  # of another package, or of another release of PEFT: what needs it is not listed
        return


def cases(checkout: Path) -> Iterator[Case]:
    """Read the lists."""
    for name, lists in LISTS.items():
        found = namespace(checkout / "tests" / name)
        models = next((value for key, value in found.items() if key.endswith("MODELS_TO_TEST")), [None])
        for entry in (entry for key in lists for entry in found.get(key, ())):
            configs = [(p, entry[i + 1]) for i, p in enumerate(entry[:-1]) if isinstance(p, type)]
            if len(configs) == 1 and isinstance(entry[-1], dict) and len(entry) > 3 and isinstance(entry[-2], dict):
                configs = [(configs[0][0], entry[-2]), (configs[0][0], entry[-1])]
            named = [part for part in entry if isinstance(part, str)]
            for model in models if models != [None] else [_model(name, named, two=len(configs) == 2)]:
                for config, options in configs:
                    yield Case(name, model, config, options, found)


def _model(file: str, named: list[str], *, two: bool) -> str:
    """Which model an entry is for: it may name it, or its file has one for all, or one for each way of adapting."""
    if file == "test_lora_variants.py":
        return "CustomModel"
    return named[-1] if not two else "ModelEmbConv1D" if "trainable_tokens" in named[-1] else "MLP"


def model_of(case: Case) -> Any:
    """Make the model of a case, with the same numbers each time."""
    torch.manual_seed(0)
    if case.model in case.made:
        model = case.made[case.model]()
    elif case.origin == "test_custom_models.py":
        model = case.made["MockTransformerWrapper"].from_pretrained(case.model)
    else:
        word = re.search(r"\w+For[A-Z]\w+|\w+LMHeadModel|\w+Model\b|gpt2$|qwen2$", case.model)
        assert word is not None, case.model
        cls = getattr(transformers, CLASSES.get(word.group(), word.group()))
        plain = cls.config_class()
        config = cls.config_class(**{key: value for key, value in SMALL.items() if hasattr(plain, key)})
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    """Arguments for a model: tokens, or what the modules of the tests take."""
    if not isinstance(model, transformers.PreTrainedModel):
        given = (torch.arange(90).view(9, 10), torch.ones(9, 1, 10, 10))
        return dict(zip(inspect.signature(model.forward).parameters, given, strict=False))
    ids = torch.randint(3, 118, (2, 8), generator=torch.Generator().manual_seed(1))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**tokens, "decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else tokens


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model answers, as one tensor."""
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


def tried(case: Case, folder: Path) -> Outcome:
    """Let PEFT save an adapter with random numbers, and load it here."""
    try:
        inputs = inputs_of(case, model_of(case))
        theirs = peft.get_peft_model(model_of(case), case.config(**copy.deepcopy(case.options))).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(model_of(case), folder).eval()
        wanted = answer(again, inputs)
    except Exception as error:
        return Outcome(THEIRS, f"{type(error).__name__}: {error}")
    model = model_of(case)
    try:
        al.load(model, folder)
    except AdapterlabError as error:
        return Outcome(REFUSED, f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER"))
    except Exception as error:
        return Outcome(DIFFERS, f"an error that is none of ours: {type(error).__name__}: {error}")
    got = answer(model, inputs)
    if wanted.shape != got.shape and wanted.dim() > 1:
        wanted = wanted[:, -got.shape[1] :]  # without those of virtual tokens
    apart = float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
    return Outcome(SAME) if apart < 1e-4 else Outcome(DIFFERS, f"outputs are {apart:.2g} apart")


def reason(outcome: Outcome) -> str:
    """The reason of a refusal in a few words."""
    for pattern, words in REASONS.items():
        if (found := re.search(pattern, outcome.reason)) is not None:
            return found.expand(words)
    return outcome.reason


def table(head: str, columns: tuple[str, ...], rows: dict[str, list[int]]) -> str:
    """A table in markdown: a name and its counts in each row."""
    lines = [f"| {head} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(str, counts))} |" for name, counts in rows.items())])


def main() -> None:
    """Try all; print what PEFT's types come to, and why some are refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="", help="a word that the file, model or configuration has to have")
    parser.add_argument("--verbose", action="store_true", help="a line for each, not those that differ alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: list[tuple[str, Outcome]] = []
    for case in cases(given.checkout):
        if given.only not in f"{case.origin} {case.model} {case.config.__name__} {case.options}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = tried(case, Path(folder))
        found.append((case.config.__name__.removesuffix("Config"), outcome))
        if given.verbose or outcome.kind == DIFFERS:
            what = f"{case.origin} | {case.model} | {case.config.__name__} {case.options}"
            print(f"{outcome.kind} | {what} | {' '.join(outcome.reason.split())}", flush=True)
    counts = Counter((name, outcome.kind) for name, outcome in found)
    read = sorted({name for name, kind in counts if kind in (SAME, DIFFERS)})
    others = {name for name, _ in found} - {*read}
    rows = {name: [counts[name, kind] for kind in KINDS] for name in read}
    rows[f"{len(others)} types without a method here"] = [sum(counts[o, kind] for o in others) for kind in KINDS]
    rows["all"] = [sum(row[at] for row in rows.values()) for at in range(len(KINDS))]
    print(table("PEFT's type", KINDS, rows))
    why = Counter(reason(outcome) for _, outcome in found if outcome.kind == REFUSED)
    print("\n" + table("refused, because of", ("count",), {name: [count] for name, count in why.most_common()}))


if __name__ == "__main__":
    main()
