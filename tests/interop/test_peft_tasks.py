"""The task that a saved adapter names: PEFT's automatic classes load the same model and it computes the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import adapterlab as al
from adapterlab.errors import FormatError

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4
}  # fmt: skip
TOKENS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HALVES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip
CLASSES: dict[str, Any] = {"vocab_size": 128, "max_position_embeddings": 64, "num_labels": 3, **SIZES}
BERT = hf.BertConfig(vocab_size=128, max_position_embeddings=64, num_labels=2, **SIZES)
DECODER = {**TOKENS, **SIZES}
EYES: dict[str, Any] = {"image_size": 16, "patch_size": 8, **SIZES}


def llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**EYES), text_config=hf.LlamaConfig(**DECODER), image_token_index=120,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def clip() -> Any:
    text = {"vocab_size": 128, "max_position_embeddings": 64, **SIZES}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=EYES, projection_dim=16))


MAKERS: dict[str, Callable[[], Any]] = {
    "encoder": lambda: hf.BertModel(BERT),
    "encoder-without-cache": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=128, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64)
    ),
    "masked": lambda: hf.BertForMaskedLM(BERT),
    "classes": lambda: hf.BertForSequenceClassification(BERT),
    "classes-without-pooler": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**CLASSES, pad_token_id=1)),
    "tokens": lambda: hf.BertForTokenClassification(BERT),
    "answers": lambda: hf.BertForQuestionAnswering(BERT),
    "decoder": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "backbone": lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
    "halves": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**TOKENS, **HALVES, max_position_embeddings=64, forced_eos_token_id=None)
    ),
    "speech": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**TOKENS, **HALVES, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
                         suppress_tokens=None, begin_suppress_tokens=None)
    ),
    "images": lambda: hf.ViTForImageClassification(hf.ViTConfig(**EYES, num_labels=3)),
    "images-and-text": clip,
    "language-with-images": llava,
}  # fmt: skip
AUTO = {
    "CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering", "FEATURE_EXTRACTION": "FeatureExtraction",
}  # fmt: skip


def inputs(kind: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 118, (2, 7), generator=draw)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "speech":
        return {"input_features": torch.randn(2, 8, 32, generator=draw), "decoder_input_ids": ids}
    if kind == "halves":
        return {**text, "decoder_input_ids": ids[:, :4]}
    if kind == "images":
        return pixels
    if kind == "language-with-images":
        text["input_ids"] = ids.clone()
        text["input_ids"][:, 1:5] = 120
    return text if "images" not in kind else {**text, **pixels}


@torch.no_grad()
def answer(model: Any, kind: str) -> Any:
    dtype = next(model.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(kind).items()}
    found = model.eval()(**given)[0]
    return found[:, -7:] if "input_ids" in inputs(kind) else found  # without those of virtual tokens


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Any]:
    def make(kind: str) -> Any:
        torch.manual_seed(0)
        model = MAKERS[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(tmp_path / "base")
        return type(model).from_pretrained(tmp_path / "base").eval()

    return make


LORA, IA3 = al.LoRA(r=4), al.IA3()
PREFIX = al.PrefixTuning(length=3, init="normal")
PROMPT = al.PromptTuning(length=3, pool="virtual")
POOLED = al.PromptTuning(length=3, modules_to_save=("classifier",))  # the first real token is read
CASES: list[tuple[str, Any, str | None]] = [
    ("encoder", LORA, "FEATURE_EXTRACTION"),
    ("encoder", PREFIX, "FEATURE_EXTRACTION"),
    ("encoder", PROMPT, "FEATURE_EXTRACTION"),
    ("masked", LORA, None),
    ("classes", LORA, None),  # PEFT would look for the head in the file
    ("classes", LORA.replace(modules_to_save=("classifier",)), "SEQ_CLS"),
    ("classes", PROMPT.replace(modules_to_save=("classifier",)), "SEQ_CLS"),
    ("classes-without-pooler", PROMPT.replace(modules_to_save=("classifier",)), "SEQ_CLS"),
    ("tokens", LORA.replace(modules_to_save=("classifier",)), "TOKEN_CLS"),
    ("answers", PROMPT.replace(modules_to_save=("qa_outputs",)), "QUESTION_ANS"),
    ("decoder", IA3, "CAUSAL_LM"),
    ("decoder", PREFIX, "CAUSAL_LM"),
    ("backbone", PROMPT, "FEATURE_EXTRACTION"),
    ("halves", LORA, "SEQ_2_SEQ_LM"),
    ("speech", LORA, None),
    ("images", LORA.replace(modules_to_save=("classifier",)), None),
    ("images-and-text", IA3, None),
    ("language-with-images", LORA, None),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "method", "task"), CASES, ids=[f"{k}-{m.id}-{t}" for k, m, t in CASES])
def test_peft_computes_what_we_do(
    kind: str, method: Any, task: str | None, base: Any, randomise: Any, tmp_path: Path
) -> None:
    model = base(kind)
    plain = answer(model, kind)
    host = al.attach(model, method)
    randomise(host)
    host.save(tmp_path / "a")
    expected = answer(model.double(), kind)  # so that no rounding of either hides a difference
    assert (expected - plain).abs().max() > 0.01
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == task
    name = f"AutoPeftModelFor{AUTO[task]}" if task else "AutoPeftModel"
    theirs = getattr(peft, name).from_pretrained(str(tmp_path / "a"))
    assert type(theirs.get_base_model()) is MAKERS[kind]().__class__
    assert (answer(theirs.double(), kind) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("masked", PROMPT),
        ("classes", PREFIX),
        ("classes-without-pooler", POOLED),
        ("encoder-without-cache", PREFIX),
        ("language-with-images", PROMPT),
    ],
)
def test_virtual_tokens_that_peft_would_leave_out_are_not_written_for_it(
    kind: str, method: Any, base: Any, tmp_path: Path
) -> None:
    model = base(kind)
    al.attach(model, method).save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert torch.equal(answer(al.load(base(kind), tmp_path / "a").model, kind), answer(model, kind))


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_whose_virtual_tokens_are_in_the_mean_is_refused(tmp_path: Path) -> None:
    model = hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**CLASSES, classifier_pooling="mean", pad_token_id=0, cls_token_id=1, sep_token_id=2)
    )
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"computes something else in PEFT.*the mean of all tokens"):
        al.load(model, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_attention_is_refused_by_name(tmp_path: Path) -> None:
    def model() -> Any:
        return torch.nn.Sequential(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True))

    peft.get_peft_model(model(), peft.LoraConfig(target_modules=["self_attn"])).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"adapts '0\.self_attn' as a whole and 'out_proj' inside of it"):
        al.load(model(), tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_that_does_nothing_in_peft_is_refused(base: Any, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, token_dim=32, num_attention_heads=4, num_layers=2
    )
    peft.get_peft_model(base("encoder-without-cache"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match="DistilBertModel takes no cache, through which it comes"):
        al.load(base("encoder-without-cache"), tmp_path / "a")


class MyDecoder(hf.LlamaForCausalLM):
    """A class of somebody's own, derived from one that transformers knows."""


def test_a_class_derived_from_a_known_one_has_its_task(tmp_path: Path) -> None:
    al.attach(MyDecoder(hf.LlamaConfig(**DECODER)), LORA).save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
