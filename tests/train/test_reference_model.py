"""The base under an adapter as the reference model of TRL's trainers, and the examples of docs/trainers.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import adapterlab as al
from adapterlab.errors import ConfigError
from adapterlab.testing.models import batch, tiny

trl = pytest.importorskip("trl")
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "use_cpu": True,
    "learning_rate": 1e-2, "disable_tqdm": True, "bf16": False, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture
def adapted() -> Any:
    """A host whose adapter changes the logits, with dropout in it."""
    host = al.attach(tiny("llama"), al.LoRA(r=4, dropout=0.5), "one")
    for parameter in host.parameters("one"):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter)))
    return host


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    known = {f"w{i}": i + 4 for i in range(60)} | {"<p>": 0, "<s>": 1, "<e>": 2, "<u>": 3}
    plain = Tokenizer(models.WordLevel(known, unk_token="<u>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<p>", bos_token="<s>", eos_token="<e>", unk_token="<u>"
    )


def logits(model: Any) -> torch.Tensor:
    return model(**batch(model)).logits


def test_it_is_the_base_without_memory_of_its_own(adapted: Any) -> None:
    model = adapted.model
    with torch.no_grad(), adapted.using():
        model.eval()
        expected = logits(model)
    model.train()
    reference = al.reference_model(model)
    found = logits(reference)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    assert model.training
    assert adapted.active == ("one",)
    assert {id(p) for p in reference.parameters()} == {id(p) for p in model.parameters()}
    reference.forward = None  # what a trainer puts on the reference does not reach the model
    logits(model)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="carries no adapter"):
        al.reference_model(tiny("llama"))


def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a second model was loaded: {args}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.slow
def test_dpo(adapted: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    nothing_is_loaded(monkeypatch)
    model = adapted.model
    rows = Dataset.from_list([{"prompt": "w1 w2 w3 ", "chosen": "w4 w5 w6", "rejected": "w7 w8"}] * 4)
    with al.hf_trainable(model):
        trainer = DPOTrainer(
            model, args=DPOConfig(str(tmp_path), beta=0.5, gradient_checkpointing=False, **COMMON),
            train_dataset=rows, processing_class=words, callbacks=[al.AdapterlabCallback(adapted, "one")],
        )  # fmt: skip
    ids = torch.tensor([words("w1 w2 w3 w4 w5 w6")["input_ids"]])
    with torch.no_grad(), adapted.using():
        expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(trainer.ref_model(input_ids=ids).logits, expected)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert entries[0]["rewards/chosen"] != 0  # the adapter is far from its reference before the first step
    torch.testing.assert_close(trainer.ref_model(input_ids=ids).logits, expected)


@pytest.mark.slow
def test_grpo(adapted: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    nothing_is_loaded(monkeypatch)
    model = adapted.model
    config = GRPOConfig(
        str(tmp_path), beta=0.1, num_generations=2, max_completion_length=4, gradient_checkpointing=False, **COMMON
    )
    with al.hf_trainable(model):
        trainer = GRPOTrainer(
            model, lambda completions, **_: [float(len(set(c.split()))) for c in completions], config,
            train_dataset=Dataset.from_list([{"prompt": "w1 w2 w3"}] * 4), processing_class=words,
            callbacks=[al.AdapterlabCallback(adapted, "one")],
        )  # fmt: skip
    trainer.train()
    assert any(entry.get("kl", 0) > 0.01 for entry in trainer.state.log_history)


def test_a_reference_that_should_move_is_refused(adapted: Any) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments("unused", use_cpu=True)
    arguments.sync_ref_model = True
    with pytest.raises(ConfigError, match="sync_ref_model"):
        al.AdapterlabCallback(adapted, "one").on_train_begin(arguments, None, None)  # type: ignore[arg-type]


PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
EXAMPLES = re.findall(r"^## `(\w+)`\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_examples_of_the_page_run(
    name: str, code: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(al, "load_model", lambda *_, **__: (tiny("llama"), words), raising=False)
    monkeypatch.chdir(tmp_path)
    quick = 'max_steps=2, bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True'
    exec(compile(code.replace("max_steps=4", quick), name, "exec"), {"__name__": "example"})
    (folder,) = (tmp_path / "adapters").iterdir()
    model = tiny("llama")
    before = logits(model.eval())
    again = al.load(model, folder)
    assert not torch.equal(logits(again.model.eval()), before)


def test_the_page_has_an_example_of_each_trainer() -> None:
    assert [name for name, _ in EXAMPLES] == ["Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer"]
