"""Prompt and prefix tuning against HF PEFT, both ways."""

from __future__ import annotations

import inspect
import types
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterlab as al
from adapterlab.errors import FormatError
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.prompt.prompt_tuning import PromptTuning
from adapterlab.testing import models

TASKS = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert-classes": "SEQ_CLS",
         "bert-tokens": "TOKEN_CLS", "t5": "SEQ_2_SEQ_LM"}  # fmt: skip
P = 4
CASES = [("prompt", f) for f in TASKS] + [("prefix", f) for f in TASKS if f != "t5"]


def config_of(kind: str, family: str, **options: Any) -> Any:
    cls = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    return cls(task_type=TASKS[family], num_virtual_tokens=P, **options)


@pytest.fixture(autouse=True)
def peft_finds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21.2 asks models that have no head of their own for `past_key_values`, which newer ones call `cache`."""

    def signature(function: Any) -> Any:
        found = inspect.signature(function)
        old = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY)
        kinds = [*(p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD), old]
        return found.replace(parameters=kinds) if "cache" in found.parameters else found

    seen = types.SimpleNamespace(**{**vars(inspect), "signature": signature})
    monkeypatch.setattr(peft.peft_model, "inspect", seen)


def real(logits: Any, kind: str, family: str) -> Any:
    """PEFT returns predictions for the virtual tokens of a prompt too."""
    return logits[:, P:] if kind == "prompt" and TASKS[family] in ("CAUSAL_LM", "TOKEN_CLS") else logits


def inputs_of(batch: dict[str, Any], family: str) -> dict[str, Any]:
    return batch if family == "t5" else {k: v for k, v in batch.items() if k != "labels"}


def apart(ours: Any, theirs: Any, batch: dict[str, Any]) -> float:
    """Largest difference on real tokens: we number positions by the mask, so padding has other positions."""
    mask = batch["attention_mask"] == 1
    difference = (ours - theirs).abs()
    return float((difference[mask] if difference.shape[:2] == mask.shape else difference).max())


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_we_read_what_peft_writes(
    kind: str, family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    theirs = peft.get_peft_model(tiny(family), config_of(kind, family)).eval()
    batch = inputs_of(batch_for(tiny(family)), family)
    expected = real(logits(theirs, batch), kind, family)
    theirs.save_pretrained(tmp_path)
    model = tiny(family)
    assert apart(logits(model, batch), expected, batch) > 0.01
    al.load(model, tmp_path)
    assert apart(logits(model, batch), expected, batch) < 1e-5


OURS: dict[str, Any] = {
    "prompt": PromptTuning(length=P, pool="virtual"),
    "prefix": PrefixTuning(length=P),
    "prefix-network": PrefixTuning(length=P, hidden=6),
}


@pytest.mark.parametrize(("case", "family"), [(c, f) for c in OURS for f in TASKS if (c[:6], f) in CASES])
def test_peft_reads_what_we_write(
    case: str, family: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    kind = case[:6]
    model = tiny(family)
    batch = inputs_of(batch_for(model), family)
    saved = ("classifier",) if family.startswith("bert") else ()
    host = al.attach(model, OURS[case].replace(modules_to_save=saved))
    with torch.no_grad():
        for value in host.parameters("default"):
            value.add_(torch.randn_like(value) * 0.3)
    expected = logits(model, batch)
    host.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert apart(real(logits(theirs, batch), kind, family), expected, batch) < 1e-5
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), expected)
    (tmp_path / "a" / "method.json").unlink()
    assert apart(logits(al.load(tiny(family), tmp_path / "a").model, batch), expected, batch) < 1e-5


@pytest.mark.parametrize(
    ("family", "method"),
    [("t5", PrefixTuning(length=P)), ("llama", PrefixTuning(length=P, offset=0)),
     ("bert-classes", PromptTuning(length=P))],
    ids=["three prefixes", "positions kept", "pools the first real token"],
)  # fmt: skip
def test_what_peft_does_not_have_is_saved_in_our_format_alone(
    family: str, method: Any, tiny: Any, batch_for: Any, logits: Any, inside_attention: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    if isinstance(method, PrefixTuning):
        inside_attention(model)
    batch = batch_for(model)
    al.attach(model, method).save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert torch.equal(logits(al.load(tiny(family), tmp_path / "a").model, batch), logits(model, batch))


def test_a_prefix_of_the_wrong_size_is_refused(tiny: Any, tmp_path: Path) -> None:
    peft.get_peft_model(tiny("llama"), config_of("prefix", "llama")).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"\(4, 64\).*\(4, 128\)"):
        al.load(tiny("gpt2"), tmp_path / "a")
    peft.get_peft_model(tiny("t5"), config_of("prefix", "t5")).save_pretrained(tmp_path / "b")
    with pytest.raises(FormatError, match=r"encoder-decoder|through the attention interface"):
        al.load(tiny("t5"), tmp_path / "b")


WINDOWED = ["mistral-window-sdpa", "mistral-window-eager", "gemma2-eager"]


def windowed(tiny: Any, name: str) -> Any:
    """A model whose tokens see six tokens back, in all or some layers."""
    family, _, kernel = name.rpartition("-")
    model = models.tiny(family) if family in models.MAKERS else tiny(family)
    model.config.sliding_window = 6
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 6
    model.set_attn_implementation(kernel)
    return model


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_passes_over_a_prefix_as_in_peft(name: str, tiny: Any, batch_for: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = windowed(tiny, name)
    theirs = peft.get_peft_model(windowed(tiny, name), config_of("prefix", "llama")).eval()
    torch.nn.init.normal_(theirs.prompt_encoder.default.embedding.weight)
    theirs.save_pretrained(tmp_path / "a")
    host = al.load(model, tmp_path / "a")
    ids = batch_for(model)["input_ids"][:1]
    for length in (1, 4, 9):
        with torch.no_grad():
            given = {"input_ids": ids[:, :length]}
            assert (model(**given).logits - theirs(**given).logits).abs().max() < 1e-5
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    continued = [model.generate(ids[:, :3], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*continued)
    host.save(tmp_path / "b")
    assert (tmp_path / "b" / "adapter_config.json").exists()
    al.attach(windowed(tiny, name), PrefixTuning(length=P)).save(tmp_path / "c")  # seen by all, which PEFT has not
    assert not (tmp_path / "c" / "adapter_config.json").exists()
