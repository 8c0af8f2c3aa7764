"""`modules_to_save`: copies of whole modules, live and merged; what they do to tied tables; heads that are new."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import adapterlab as al
from adapterlab.core.adapter import Copy
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, MergeError

HEAD = {"targets": ["q"], "modules_to_save": ("lm_head",)}


def test_two_live_copies_of_a_module_are_refused(tiny: Any, batch_for: Any, logits: Any, randomise: Any) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2, **HEAD), "a")
    host.attach(al.LoRA(r=2, **HEAD), "b")
    assert host.active == ("b",)
    host.attach(al.LoRA(r=2, targets=["lm_head"]), "outside")  # adds to what the copy answers
    randomise(host)
    with pytest.raises(AttachError, match=r"'a' has its own copy of lm_head(.|\n)*no effect"):
        host.activate("a", "b")
    with pytest.raises(AttachError, match="own copy of lm_head"), host.rows([("a", "b"), "a"]):
        pass
    batch = batch_for(host.model)
    with host.rows(["a", "b"]):  # each row has its own
        mixed = logits(host.model, batch)
    for row, name in enumerate("ab"):
        with host.using(name):
            torch.testing.assert_close(mixed[row], logits(host.model, batch)[row])


def test_a_copy_hides_nothing_inside_of_it(tiny: Any) -> None:
    host = al.attach(tiny("bert-classes"), al.LoRA(r=2, targets=["query"], modules_to_save=("bert.pooler",)), "a")
    host.attach(al.LoRA(r=2, targets=["bert.pooler.dense"]), "inside")
    assert host.active == ("inside",)
    with pytest.raises(AttachError, match=r"'a' has its own copy of bert\.pooler(.|\n)*'inside' has there"):
        host.activate("a", "inside")


def test_a_copy_is_merged_in_the_dtype_of_the_base(tiny: Any) -> None:
    host = al.attach(tiny("llama").bfloat16(), al.LoRA(r=2, **HEAD))
    host.merge()
    assert host.model.lm_head.weight.dtype == torch.bfloat16
    host.model(input_ids=torch.arange(3, 9)[None])
    host.restore()


class OddNorm(torch.nn.Module):
    """It squares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight**2 * x


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (torch.nn.LayerNorm(8), 0.0),
        (torch.nn.LayerNorm(8, bias=False), 0.0),
        (LlamaRMSNorm(8), 0.0),
        (GemmaRMSNorm(8), 1.0),
        (OddNorm(), None),
    ],
)
def test_a_copy_of_a_norm_is_a_gain_and_a_shift(norm: Any, offset: float | None) -> None:
    torch.manual_seed(0)
    for p in norm.parameters():
        p.data = torch.randn(8)
    adapter = Copy(Site("norm", norm), copy.deepcopy(norm))
    for p in adapter.parameters():
        p.data = torch.randn(8)
    assert adapter.site.norm_offset == offset
    change = adapter.serving()
    assert (change is None) == (offset is None)
    if change is not None:
        x = torch.randn(5, 8)
        found = change.gain * norm(x) + (0 if change.shift is None else change.shift)
        torch.testing.assert_close(found, adapter.copy(x), rtol=1e-4, atol=1e-4)
        norm.weight.data[3] = -offset  # what it returns there is lost
        assert adapter.serving() is None


def test_buffers_of_a_copy_are_merged_and_restored() -> None:
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "norm": torch.nn.BatchNorm1d(4)})
    net.forward = lambda x: net["norm"](net["body"](x))  # type: ignore[method-assign]
    host = al.attach(net, al.LoRA(r=2, targets=["body"], modules_to_save=("norm",)))
    before = net["norm"].running_mean.clone()
    net.train()(torch.randn(8, 4) + 3)
    x = torch.randn(2, 4)
    live = net.eval()(x)
    host.merge()
    torch.testing.assert_close(net(x), live)
    host.restore()
    assert torch.equal(net["norm"].running_mean, before)


@pytest.mark.parametrize("family", ["llama-tied", "bert-masked"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("table", ["in", "out"])
def test_the_configuration_says_what_is_tied_after_a_merge(
    family: str, whole: bool, table: str, tiny: Any, batch_for: Any, logits: Any, randomise: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    module = model.get_input_embeddings() if table == "in" else model.get_output_embeddings()
    path = next(p for p, m in model.named_modules() if m is module)
    query = "q_proj" if family == "llama-tied" else "query"
    targets, saved = ([query], (path,)) if whole else ([path], ())
    host = al.attach(model, al.LoRA(r=2, targets=targets, modules_to_save=saved))
    randomise(host)
    host.merge(tied="error" if whole else "untie")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    batch = batch_for(model)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, batch), logits(model, batch))
    host.restore()
    assert model.config.tie_word_embeddings is True
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_model_that_computes_by_its_ties_keeps_them(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-tied")
    plain = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.logits = found.logits * (0.5 if self.config.tie_word_embeddings else 1.0)
        return found

    monkeypatch.setattr(type(model), "forward", forward)
    host = al.attach(model, al.LoRA(r=2, **HEAD))
    with pytest.raises(MergeError, match="computes something else when its tables are not tied"):
        host.merge()


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, Path]:
    """Two encoders without task heads, as folders; the second without a pooler on the way to one."""
    models = {"bert": BertForMaskedLM(BertConfig(**SIZES)), "roberta": RobertaForMaskedLM(RobertaConfig(**SIZES))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in models}


@pytest.mark.parametrize(
    ("base", "cls", "heads"),
    [
        ("bert", AutoModelForSequenceClassification, ("classifier", "bert.pooler.dense")),
        ("bert", AutoModelForQuestionAnswering, ("qa_outputs",)),
        ("roberta", AutoModelForSequenceClassification, ("classifier",)),
    ],
)
@pytest.mark.parametrize("method", [al.LoRA(r=2), al.BitFit()], ids=["beside", "in place"])
def test_a_new_head_trains_and_is_saved(
    base: str, cls: Any, heads: tuple[str, ...], method: al.Method, bases: dict[str, Path], tmp_path: Path
) -> None:
    host = al.attach(cls.from_pretrained(bases[base]), method)
    assert host.methods["default"].modules_to_save == heads
    trained = host.named_parameters("default")
    assert all(any(key.startswith(f"adapter.{head}.") for key in trained) for head in heads)
    host.save(tmp_path / "a")
    x = torch.arange(3, 9)[None]
    again = al.load(cls.from_pretrained(bases[base]), tmp_path / "a")  # whose head has other random numbers
    for wanted, found in zip(host.model.eval()(x).to_tuple(), again.model.eval()(x).to_tuple(), strict=True):
        assert torch.equal(wanted, found)


def test_a_head_is_new_only_where_its_numbers_are(bases: dict[str, Path], tiny: Any, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"])
    model.save_pretrained(tmp_path / "with head")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "with head")
    for known in (loaded, tiny("bert-classes"), tiny("llama")):
        assert al.attach(known, al.LoRA(r=2)).methods["default"].modules_to_save == ()
    with pytest.raises(AttachError, match=r"classifier is new(.|\n)*Leave it out of the targets"):
        al.attach(model, al.LoRA(r=2, targets=["query", "classifier"]))
    frozen = al.attach(model, al.LoRA(r=2, modules_to_save=()))
    frozen.save(tmp_path / "a")
    again = AutoModelForSequenceClassification.from_pretrained(bases["bert"])
    with pytest.warns(UserWarning, match=r"classifier, bert.pooler.dense of .* brings none: its numbers are random"):
        al.load(again, tmp_path / "a")
