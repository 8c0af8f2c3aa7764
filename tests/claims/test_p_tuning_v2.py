"""P-tuning v2: deep prompts label tokens that prompts at the input cannot, with a head that is trained beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import adapterlab as al
from adapterlab.methods.prompt import p_tuning_v2
from adapterlab.methods.prompt.p_tuning_v2 import PTuningV2
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.methods.prompt.prompt_tuning import PromptTuning

SMALL: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_labels": 3, "max_position_embeddings": 64,
}  # fmt: skip
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def encoder() -> BertForTokenClassification:
    torch.manual_seed(0)
    config = BertConfig(**{**SMALL, "num_hidden_layers": 4, "vocab_size": 128}, **STILL)
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def rows(seed: int) -> Tensor:
    return torch.randint(3, 128, (32, 8), generator=torch.Generator().manual_seed(seed))


def measure(method: al.Method, steps: int = 80) -> float:
    """Accuracy on new rows of labels that the frozen encoder gives where it is steered in every layer."""
    model = encoder()
    torch.manual_seed(1)
    teacher = al.attach(model, PTuningV2(length=4, dropout=0.0), "teacher")
    with torch.no_grad():
        said = torch.stack([model(rows(seed)).logits for seed in range(9)])
    labels = (said - said.flatten(0, 2).mean(0)).argmax(-1)  # about as many of each class
    teacher.detach("teacher")
    torch.manual_seed(2)
    host = al.attach(model, method)
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.03)
    for step in range(steps):
        loss = F.cross_entropy(model(rows(step % 8)).logits.flatten(0, 1), labels[step % 8].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(rows(8)).logits.argmax(-1) == labels[8]).float().mean())


@pytest.mark.slow
def test_deep_prompts_label_tokens_better_than_input_prompts() -> None:
    """As many trained numbers: 2 · 4 · 4 · 32 in the layers, 32 · 32 at the input; both train the head."""
    shallow = measure(PromptTuning(length=32, modules_to_save=("classifier",)))
    assert measure(PTuningV2(length=4)) >= shallow + 0.05


@pytest.mark.parametrize("family", ["bert-classes", "bert-tokens", "llama", "vit"])
def test_the_head_trains_and_is_saved_whole(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, inside_attention: Any, tmp_path: Any
) -> None:
    heads = {"bert-classes": {"classifier", "bert.pooler"}, "bert-tokens": {"classifier"}, "vit": {"classifier"}}
    model = tiny(family)
    inside_attention(model)
    batch = batch_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = al.attach(model, PTuningV2(length=3))
    host.verify(batch)
    found = {path for path, a in host.adapters("default").items() if any("copy" in n for n, _ in a.named_parameters())}
    assert found == heads.get(family, set())
    inside = sum(p.numel() for n, p in model.named_parameters() if any(n.startswith(f"{h}.") and "_adapters" not in n
                                                                       for h in found))  # fmt: skip
    assert host.summary().trainable == 2 * 3 * 2 * (16 if family == "llama" else 32) + inside
    randomise(host)
    host.save(tmp_path / "a")
    again = al.load(tiny(family), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    host.detach("default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_head_is_the_users_choice(tiny: Any) -> None:
    for settings, trained in (
        ({"head": False}, set()),
        ({"head": False, "modules_to_save": ("classifier",)}, {"classifier"}),
        ({"modules_to_save": ("classifier",)}, {"classifier", "bert.pooler"}),
    ):
        host = al.attach(tiny("bert-classes"), PTuningV2(length=3, **settings))
        attached = host.adapters("default")
        assert {p for p in attached if p in ("classifier", "bert.pooler")} == trained


def test_a_decoder_that_classifies_has_a_head_too() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)).eval()
    host = al.attach(model, PTuningV2(length=3))
    assert "score" in host.adapters("default")
    ids = torch.randint(1, 24, (2, 7))
    host.verify({"input_ids": ids, "labels": torch.tensor([0, 2])})
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    right = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        plain = model(ids).logits
        for padded in (left, right):
            mask = (padded != 0).long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            answer = model(padded, attention_mask=mask, position_ids=places).logits
            assert (answer - plain).abs().max() < 1e-5


def by_hand(model: Any, ids: Tensor, prefixes: list[Tensor], mask: Tensor) -> Tensor:
    """The paper's formula on BERT in float64: keys and values in front, positions from P on, real tokens' mask."""
    bert = model.bert.double()
    length, heads = prefixes[0].shape[2], 4
    e = bert.embeddings
    places = torch.arange(ids.shape[1]) + length
    weight = e.word_embeddings.weight[ids] + e.position_embeddings.weight[places] + e.token_type_embeddings.weight[0]
    x = e.LayerNorm(weight)
    hide = torch.cat([torch.zeros(len(ids), length), (1 - mask) * -1e9], 1)[:, None, None]
    for layer, (pk, pv) in zip(bert.encoder.layer, prefixes, strict=True):
        part = layer.attention
        q, k, v = (
            m(x).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (part.self.query, part.self.key, part.self.value)
        )
        k = torch.cat([pk.double().expand(len(x), -1, -1, -1), k], 2)
        v = torch.cat([pv.double().expand(len(x), -1, -1, -1), v], 2)
        scores = (q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 + hide).softmax(-1)
        y = (scores @ v).transpose(1, 2).flatten(2)
        x = part.output.LayerNorm(part.output.dense(y) + x)
        x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
    return x


def test_it_is_the_written_formula(tiny: Any, batch_for: Any, randomise: Any) -> None:
    model = tiny("bert-tokens")
    batch = batch_for(model)
    host = al.attach(model, PTuningV2(length=3))
    randomise(host)
    prefixes = [
        a.get_parameter("prefix").detach()
        for a in host.adapters("default").values()
        if isinstance(a, PrefixTuning.Layer)
    ]
    head: Any = host.adapters("default")["classifier"].get_submodule("copy")
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        states = by_hand(tiny("bert-tokens"), batch["input_ids"], prefixes, batch["attention_mask"])
        wanted = states @ head.weight.double().T + head.bias.double()
    real = batch["attention_mask"] == 1
    assert (found - wanted).abs()[real].max() < 1e-5


def test_dropout_acts_on_the_pairs_in_training_alone(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("bert-tokens")
    batch = batch_for(model)
    al.attach(model, PTuningV2(length=3))
    model.eval()
    with torch.no_grad():
        still = [model(**batch).logits for _ in range(2)]
        model.train()
        moving = [model(**batch).logits for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


def test_it_classifies_sequences() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, **STILL)).eval()
    host = al.attach(model, PTuningV2(length=4))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=2e-2)
    ids = torch.randint(0, 24, (64, 8), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 0] % 3
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(ids).logits.argmax(-1) == labels).float().mean() > 0.9


PAIRS = PrefixTuning.Layer.pairs
BROKEN: dict[str, Mutation] = {
    "positions kept": (PrefixTuning, "first_position", 0),
    "keys and values exchanged": (PrefixTuning.Layer, "pairs", lambda self: PAIRS(self).flip(0)),
    "heads exchanged": (PrefixTuning.Layer, "pairs", lambda self: PAIRS(self).flip(1)),
    "places exchanged among keys": (
        PrefixTuning.Layer, "pairs", lambda self: torch.stack([PAIRS(self)[0].flip(1), PAIRS(self)[1]])
    ),
    "one layer alone trains": (
        PrefixTuning.Layer, "pairs", lambda self: PAIRS(self) if self.site.layer == 0 else PAIRS(self).detach()
    ),
    "no dropout": (F, "dropout", lambda x, p=0.5, training=True, inplace=False: x),
    "the head is frozen": (p_tuning_v2, "task_heads", lambda model: []),
}  # fmt: skip


def all_layers_train(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-tokens")
    host = al.attach(model, PTuningV2(length=3))
    model(**batch_for(model)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in host.parameters("default"))


test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_head_is_the_users_choice,
    test_it_is_the_written_formula,
    test_dropout_acts_on_the_pairs_in_training_alone,
    all_layers_train,
    lines=BROKEN,
)
