"""P-tuning: vectors from a network, anywhere in a template, say what no words of the vocabulary say as well."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.prompt._input_prompt import InputPrompt, layer_of
from adapterlab.methods.prompt.p_tuning import Encoder, PTuning
from adapterlab.optim import adamw

WORDS, HOLE = (17, 4, 99), 500  # no token of the vocabulary has the id of the places
QUIET: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def as_words(model: Any, method: PTuning, words: tuple[int, ...] = WORDS) -> al.Host:
    """A prompt whose vectors are those of words."""
    host = al.attach(model, method)
    with torch.no_grad():
        host.parameters("default")[0].copy_(model.get_input_embeddings()(torch.tensor(words)))
    return host


def template(seed: int = 5) -> tuple[Tensor, Tensor]:
    """Two rows with three places each, in front, in the middle and at the end; and the same with words in them."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
    places = torch.tensor([[0, 4, 8], [2, 3, 6]])
    return ids.scatter(1, places, HOLE), ids.scatter(1, places, torch.tensor(WORDS).expand(2, -1))


# ---------------------------------------------------------------------- the network


def test_the_networks_are_the_written_ones(tiny: Any, randomise: Any) -> None:
    """The MLP by its formula in float64, the LSTM by PEFT's module with the same weights."""
    made: dict[str, Tensor] = {}
    for kind in ("mlp", "lstm"):
        host = al.attach(tiny("llama"), PTuning(length=5, encoder=kind, hidden=6))
        randomise(host)
        layer: Any = layer_of(host, "default")
        network, made[kind] = layer.network, layer.vectors().detach().double()
        if kind == "mlp":
            x = network.embedding.weight.double()
            for part in network.mlp[::2]:
                x = x @ part.weight.double().T + part.bias.double()
                x = x if part is network.mlp[-1] else x.clamp(min=0)
            assert torch.allclose(made[kind], x, atol=1e-5)
            continue
        sizes = {"token_dim": 32, "num_transformer_submodules": 1, "num_attention_heads": 4, "num_layers": 2}
        theirs = peft.PromptEncoder(
            peft.PromptEncoderConfig(
                num_virtual_tokens=5, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", **sizes
            )
        ).eval()
        names = {"lstm.": "lstm_head.", "mlp.": "mlp_head."}
        state = {
            functools.reduce(lambda k, pair: k.replace(*pair), names.items(), key): value
            for key, value in network.state_dict().items()
        }
        theirs.load_state_dict(state)
        assert torch.allclose(made[kind], theirs(torch.arange(5)[None])[0].double(), atol=1e-5)


def test_vectors_of_an_lstm_depend_on_each_other(tiny: Any) -> None:
    for kind, expected in (("mlp", 1), ("lstm", 5)):
        torch.manual_seed(0)
        layer: Any = layer_of(al.attach(tiny("llama"), PTuning(length=5, encoder=kind)), "default")
        before = layer.vectors().detach()
        with torch.no_grad():
            layer.network.embedding.weight[2] += 1
        assert ((layer.vectors() - before).abs().amax(1) > 1e-4).sum() == expected


# ---------------------------------------------------------------------- places


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-masked", "bert-classes", "t5"])
def test_words_at_the_places_equal_reading_them(family: str, tiny: Any) -> None:
    model = tiny(family)
    marked, read = template()
    mask = torch.ones_like(marked)
    if family != "llama":  # padding outside of the template
        mask[1, -2:] = 0
    more = {"labels": torch.tensor([[5, 6, 7], [8, 9, 3]])} if family == "t5" else {}
    with torch.no_grad():
        expected = model(input_ids=read, attention_mask=mask, **more).logits
        as_words(model, PTuning(length=3, encoder=None, placeholder=HOLE))
        out = model(input_ids=marked, attention_mask=mask, **more)
        plain = model(input_ids=read, attention_mask=mask, **more).logits
    assert (out.logits - expected).abs().max() < 1e-5
    assert torch.equal(plain, expected)  # a row without places is read as the base reads it


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_anchors_in_front_equal_reading_them(family: str, tiny: Any) -> None:
    model, ids = tiny(family), template()[1]
    front = torch.tensor([[17, 50, 4, 60, 99]] * 2)
    with torch.no_grad():
        expected = model(torch.cat([front, ids], 1)).logits[:, 5:]
        as_words(model, PTuning(length=3, encoder=None, anchors={3: 60, 1: 50}))
        assert (model(ids).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_from_a_template_agrees_with_and_without_cache(family: str, tiny: Any) -> None:
    model = tiny(family)
    marked, read = template()
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), marked], 1)
    wanted = [model.generate(read, num_beams=n, **QUIET)[:, -5:] for n in (1, 3)]
    as_words(model, PTuning(length=3, encoder=None, placeholder=HOLE))
    for cache in (True, False):
        for beams, answer in zip((1, 3), wanted, strict=True):
            assert torch.equal(model.generate(marked, num_beams=beams, use_cache=cache, **QUIET)[:, -5:], answer)
        if family != "t5":
            mask = (padded != 0).long()
            answer = model.generate(padded, attention_mask=mask, use_cache=cache, **QUIET)
            assert torch.equal(answer[:, -5:], wanted[0])
    if family != "t5":
        answer = model.generate(padded, attention_mask=mask, cache_implementation="static", **QUIET)
        assert torch.equal(answer[:, -5:], wanted[0])


def test_rows_must_have_all_places_or_none(tiny: Any) -> None:
    model = tiny("llama")
    al.attach(model, PTuning(length=2, placeholder=HOLE))
    with pytest.raises(AttachError, match=r"Row 0 .* 3 times.*2 virtual"):
        model(template()[0])
    with pytest.raises(AttachError, match="Call it with input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


# ---------------------------------------------------------------------- the claim

SUBJECTS, RELATIONS, FILLERS = 8, 3, 20
FIRST = {"subject": 4, "object": 4 + SUBJECTS, "filler": 4 + 2 * SUBJECTS}
FIRST["relation"] = FIRST["filler"] + FILLERS
MARK = FIRST["relation"] + 2 * RELATIONS
CLS, SEP, MASK = 1, 2, 3


def sentences(relation: Tensor, subject: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """[CLS] w w [MASK] w w subject w w [SEP], and the object: another permutation of the subjects for each relation."""
    one = torch.ones_like(subject)[:, None]
    row = [
        one * CLS,
        words[:, :2],
        one * MASK,
        words[:, 2:4],
        subject[:, None] + FIRST["subject"],
        words[:, 4:],
        one * SEP,
    ]
    return torch.cat(row, 1), (subject * (2 * relation + 1) + relation) % SUBJECTS + FIRST["object"]


def told(relation: Tensor, draw: torch.Generator) -> Tensor:
    """Six words of which two say the relation: one of its words in the first half, and one in the second."""
    rows = len(relation)
    words = torch.randint(FILLERS, (rows, 6), generator=draw) + FIRST["filler"]
    for half, place in enumerate(torch.randint(3, (2, rows), generator=draw)):
        said = FIRST["relation"] + 2 * relation + half
        words.scatter_(1, (3 * half + place)[:, None], said[:, None])
    return words


@pytest.fixture(scope="module")
def knowing() -> BertForMaskedLM:
    """A masked language model that knows three relations between subjects and objects."""
    torch.manual_seed(2)  # one that words of chance do not happen to ask well
    config = BertConfig(
        vocab_size=MARK, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, draw = BertForMaskedLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        relation = torch.randint(RELATIONS, (64,), generator=draw)
        subject = torch.randint(SUBJECTS, (64,), generator=draw)
        ids, wanted = sentences(relation, subject, told(relation, draw))
        loss = F.cross_entropy(model(ids).logits[:, 3], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def of_words(model: BertForMaskedLM, words: Tensor) -> float:
    """Cross-entropy at the answer of one relation with six words in the template."""
    subject = torch.arange(SUBJECTS)
    ids, wanted = sentences(torch.full_like(subject, 1), subject, words.expand(SUBJECTS, -1))
    return float(F.cross_entropy(model(ids).logits[:, 3], wanted))


def measure(model: BertForMaskedLM, encoder: Any, steps: int = 120) -> float:
    """The same with six tuned vectors."""
    torch.manual_seed(1)
    host = al.attach(model, PTuning(length=6, encoder=encoder, placeholder=MARK, hidden=24))
    try:
        optimizer = torch.optim.Adam(host.parameters("default"), lr=1e-2)
        subject = torch.arange(SUBJECTS)
        ids, wanted = sentences(torch.full_like(subject, 1), subject, torch.full((SUBJECTS, 6), MARK))
        for _ in range(steps):
            loss = F.cross_entropy(model(ids).logits[:, 3], wanted)
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        return float(loss.detach())
    finally:
        host.detach("default")


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.slow
def test_tuned_vectors_beat_words(encoder: str, knowing: BertForMaskedLM) -> None:
    draw = torch.Generator().manual_seed(4)
    tried = torch.randint(FIRST["filler"], MARK, (10, 6), generator=draw)  # as many as a person tries
    assert measure(knowing, encoder) <= 0.8 * min(of_words(knowing, words) for words in tried)


# ---------------------------------------------------------------------- training, saving


def test_the_network_is_dropped_after_training(tiny: Any, batch_for: Any, logits: Any, tmp_path: Any) -> None:
    for kind in ("mlp", "lstm"):
        model = tiny("llama")
        batch, host = batch_for(model), al.attach(model, PTuning(length=3, encoder=kind, anchors={1: 9}))
        with_network = host.save(tmp_path / f"{kind}-training").joinpath("adapter_model.safetensors").stat().st_size
        wanted = logits(model, batch)
        again = al.load(tiny("llama"), tmp_path / f"{kind}-training")
        assert torch.equal(logits(again.model, batch), wanted)
        assert again.state_dict("default").keys() == host.state_dict("default").keys()
        host.methods["default"].finish(host, "default")
        assert [tuple(p.shape) for p in host.parameters("default")] == [(3, 32)]
        assert (logits(model, batch) - wanted).abs().max() < 1e-6
        without = host.save(tmp_path / kind).joinpath("adapter_model.safetensors").stat().st_size
        assert without < with_network / 10
        assert torch.equal(logits(al.load(tiny("llama"), tmp_path / kind).model, batch), logits(model, batch))
        kept = al.attach(tiny("llama"), PTuning(length=3, encoder=kind, keep_encoder=True))
        kept.methods["default"].finish(kept, "default")
        assert len(kept.parameters("default")) > 1


def test_the_base_trains_beside_the_prompt_at_its_own_rate(tiny: Any, batch_for: Any) -> None:
    model = tiny("bert-masked")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = al.attach(model, PTuning(length=3, train_base=True, ratio=5))
    optimizer = host.methods["default"].optimizer(
        host, "default", lambda groups: adamw(groups, lr=1e-3, weight_decay=0.1)
    )
    prompt, base = optimizer.param_groups
    assert (prompt["lr"], prompt["weight_decay"]) == (5e-3, 0.0)
    assert (base["lr"], base["weight_decay"]) == (1e-3, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(host.parameters("default"))
    assert len(base["params"]) == len(host.base_parameters())
    model(**batch_for(model)).loss.backward()
    optimizer.step()
    assert not torch.equal(
        model.bert.encoder.layer[0].output.dense.weight, before["bert.encoder.layer.0.output.dense.weight"]
    )
    host.detach("default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    frozen = al.attach(tiny("bert-masked"), PTuning(length=3))
    assert not any(key.startswith("base.") for key in frozen.tensors("default"))


def test_bad_settings_say_what_to_do(tiny: Any) -> None:
    for settings, message in (
        ({"anchors": {1: 5}, "placeholder": 3}, "write them into the rows"),
        ({"length": 2, "anchors": {3: 5}}, "places 0 to 2; received 3"),
        ({"dropout": 0.1}, "encoder='lstm'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PTuning(**settings)
    with pytest.raises(ConfigError, match="999 is not in the vocabulary of 128"):
        al.attach(tiny("llama"), PTuning(anchors={0: 999}))


FORWARD, READ, ROWS, TRAINED = Encoder.forward, Encoder.read, InputPrompt.Layer.for_rows, PTuning.Layer.trained


def _without_table(self: Any) -> Tensor:
    return self.mlp(self.read(0 * self.embedding.weight))


BROKEN: dict[str, Mutation] = {
    "E does nothing": (Encoder, "forward", _without_table),
    "no network after the LSTM": (Encoder, "forward", lambda self: FORWARD(self) - self.mlp[-1].bias),
    "the LSTM reads backwards": (Encoder, "read", lambda self, x: READ(self, x.flip(0)).flip(0)),
    "rows do not see each other": (
        Encoder, "read", lambda self, x: torch.cat([READ(self, row[None]) for row in x]) if self.lstm else x
    ),
    "no nonlinearity": (torch.nn.ReLU, "forward", lambda self, x: x),
    "another nonlinearity": (torch.nn.ReLU, "forward", lambda self, x: F.gelu(x)),
    "vectors in another order": (InputPrompt.Layer, "for_rows", lambda self, x: ROWS(self, x).flip(1)),
    "one vector for all places": (
        InputPrompt.Layer, "for_rows", lambda self, x: ROWS(self, x)[:, :1].expand(-1, self.count, -1)
    ),
    "nothing learns": (PTuning.Layer, "trained", lambda self: TRAINED(self).detach()),
    "anchors elsewhere": (PTuning.Layer, "free", property(lambda self: list(range(self.length)))),
    "the network stays": (PTuning, "finish", lambda self, host, name: None),
    "one rate for all": (PTuning, "optimizer", lambda self, host, name, make: make(host.parameters(name))),
}  # fmt: skip


def one_rate_is_noticed(tiny: Any, batch_for: Any) -> None:
    host = al.attach(tiny("bert-masked"), PTuning(length=3, train_base=True))
    made = host.methods["default"].optimizer(host, "default", lambda groups: adamw(groups, lr=1e-3))
    assert len(made.param_groups) == 2


test_the_claims_fail_when_a_line_is_broken = fails_without(
    test_the_networks_are_the_written_ones,
    test_vectors_of_an_lstm_depend_on_each_other,
    functools.partial(test_words_at_the_places_equal_reading_them, "llama"),
    functools.partial(test_anchors_in_front_equal_reading_them, "llama"),
    functools.partial(test_tuned_vectors_beat_words, "mlp"),
    test_the_network_is_dropped_after_training,
    one_rate_is_noticed,
    lines=BROKEN,
)
