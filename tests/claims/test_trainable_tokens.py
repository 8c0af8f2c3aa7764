"""Trainable tokens: a frozen model learns a new word by its vector alone, and nothing else of it moves by a bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.core import rows
from adapterlab.core.rows import Rows
from adapterlab.errors import AttachError, ConfigError, FormatError, TargetError
from tiny_folder import write_model

IDS = (64, 5, 127, 30)
FAMILIES = ["llama", "llama-tied", "gemma2", "gpt2", "t5", "bert-masked"]


def measure(model: Any, token: int, steps: int = 400) -> tuple[float, float]:
    """Teach a word that was added to a vocabulary: what is left of the loss, and of the distance of its vector.

    A teacher has another vector for it; the student sees sentences with the word, and what the teacher makes of them.
    """
    model.resize_token_embeddings(129, mean_resizing=False)
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        concept = teacher.get_input_embeddings().weight
        concept[128] = concept[7] - concept[11] + concept[13]
        model.get_input_embeddings().weight[128] = 0.1
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (24, 10), generator=draw)
    ids[torch.arange(24), torch.randint(0, 6, (24,), generator=draw)] = 128
    target = teacher(ids).logits.detach().log_softmax(-1)
    host = al.attach(model, al.TrainableTokens(tokens=[token]))
    optimizer = torch.optim.Adam(host.parameters("default"), lr=0.02)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = F.kl_div(model(ids).logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    learned = next(iter(host.adapters("default").values())).values[0].detach()
    return losses[-1] / losses[0], float((learned - concept[128]).norm() / (0.1 - concept[128]).norm())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.slow
def test_a_new_word_is_learned_by_its_vector(family: str, tiny: Any) -> None:
    left, distance = measure(tiny(family), 128)
    assert left < 1e-3
    assert distance < 0.05


@pytest.mark.slow
def test_the_vector_of_another_word_does_not_do(tiny: Any) -> None:
    assert measure(tiny("llama"), 50)[0] > 0.5


def put_in(model: Any, values: Tensor, ids: tuple[int, ...] = IDS) -> Any:
    """The plain model with these rows in its input table, and in all that are tied to it."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain.get_input_embeddings().weight[list(ids)] = values.to(plain.dtype)
    return plain


def moved(model: Any, randomise: Any, **options: Any) -> Any:
    host = al.attach(model, al.TrainableTokens(tokens=IDS, **options))
    randomise(host)
    return host


def own_rows(host: Any) -> Tensor:
    values = host.parameters("default")
    assert len(values) == 1
    return values[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_table_with_the_rows_in_it(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny(family).double()
    batch = batch_for(model)
    batch["input_ids"][:, 1:4] = torch.tensor([64, 30, 5])
    base, untouched = logits(model, batch), copy.deepcopy(model)
    host = al.attach(model, al.TrainableTokens(tokens=IDS))
    torch.testing.assert_close(logits(model, batch), base, rtol=1e-12, atol=1e-12)
    assert own_rows(host).shape == (4, 32)
    randomise(host)
    plain = put_in(untouched, own_rows(host).detach())
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=1e-9, atol=1e-9)
    assert (logits(model, batch) - base).abs().max() > 0.01
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    wanted = plain.get_input_embeddings().weight.grad[list(IDS)]
    torch.testing.assert_close(own_rows(host).grad, wanted, rtol=1e-7, atol=1e-9)
    host.verify(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_ties_and_undoing_is_exact(
    family: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any
) -> None:
    model = tiny(family).bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    host = moved(model, randomise)
    batch, tied = batch_for(model), model.config.tie_word_embeddings
    live = logits(model, batch)
    plain = put_in(tiny(family).bfloat16(), own_rows(host).detach())
    host.merge()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.testing.assert_close(logits(model, batch), live, rtol=0.02, atol=0.02)
    assert torch.equal(logits(model, batch), logits(plain, batch))
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied
    host.restore()
    assert torch.equal(logits(model, batch), live)
    host.detach("default")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_rows_are_stored_and_optimized_and_the_base_keeps_its_bits(
    tiny: Any, batch_for: Any, logits: Any, tmp_path: Path
) -> None:
    model = tiny("llama-tied")
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    host = al.attach(model, al.TrainableTokens(tokens=IDS))
    optimizer = torch.optim.AdamW(host.parameters("default"), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**batch_for(model)).loss.backward()
        optimizer.step()
    assert {tuple(v.shape) for s in optimizer.state.values() for v in s.values() if v.dim()} == {(4, 32)}
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters() if path in before)
    assert all(p.grad is None for path, p in model.named_parameters() if path in before)
    host.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in stored.values()} == {(4, 32)}
    again = al.load(tiny("llama-tied"), tmp_path / "a")
    assert torch.equal(logits(again.model, batch_for(model)), logits(model, batch_for(model)))


def test_a_head_of_its_own_gets_rows_of_its_own(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("llama")
    host = moved(model, randomise, targets=["embed", "head"])
    table, head = (host.adapters("default")[path].rows for path in ("model.embed_tokens", "lm_head"))
    plain = put_in(tiny("llama"), table.detach())
    with torch.no_grad():
        plain.lm_head.weight[list(IDS)] = head
    torch.testing.assert_close(logits(model, batch_for(model)), logits(plain, batch_for(model)), rtol=1e-5, atol=1e-5)
    assert len(host.parameters("default")) == 2
    host = al.attach(tiny("llama-tied"), al.TrainableTokens(tokens=[1], targets=["embed", "head"]))
    assert len(host.parameters("default")) == 1


def test_rows_of_a_batch_have_their_own_tokens(tiny: Any, batch_for: Any, randomise: Any, logits: Any) -> None:
    model = tiny("llama-tied")
    host = moved(model, randomise)
    host.attach(al.TrainableTokens(tokens=[9, 64]), "other", active=False)
    randomise(host, "other", seed=3)
    batch = {"input_ids": batch_for(model)["input_ids"]}
    batch["input_ids"][:, 2] = 64
    with pytest.raises(AttachError, match=r"both have the rows of the tokens 64 of"):
        host.activate("default", "other")
    alone = []
    for name in ("default", "other"):
        with host.using(name):
            alone.append(logits(model, batch))
    with host.rows(["default", "other"]):
        torch.testing.assert_close(logits(model, batch), torch.stack([alone[0][0], alone[1][1]]), rtol=1e-5, atol=1e-5)


def test_tokens_by_text_and_new_ones(tmp_path: Path, logits: Any) -> None:
    write_model(tmp_path / "model")
    model, tokenizer = al.load_model(tmp_path / "model")
    host = al.attach(model, al.TrainableTokens(tokens=["<e>", "7", 5]))
    assert host.methods["default"].tokens == (*tokenizer.convert_tokens_to_ids(["<e>", "7"]), 5)
    host.detach("default")
    with pytest.raises(AttachError, match=r"'<ne>' is no single token .* Nearest: '?<"):
        al.attach(model, al.TrainableTokens(tokens=["<ne>"]))
    new = len(tokenizer)
    with pytest.raises(
        AttachError, match=rf"{new} lie beyond .* ids 0 to {new - 1}.*resize_token_embeddings\({new + 1}\)"
    ):
        al.attach(model, al.TrainableTokens(tokens=[new]))
    model.resize_token_embeddings(new + 1)
    host = al.attach(model, al.TrainableTokens(tokens=[new]))
    own_rows(host).data.fill_(0.3)
    batch = {"input_ids": torch.tensor([[5, new, 6]])}
    host.save(tmp_path / "adapter")
    torch.manual_seed(5)  # the new row is filled with other numbers
    fresh, _ = al.load_model(tmp_path / "model")
    with pytest.raises(FormatError, match="resize_token_embeddings"):
        al.load(fresh, tmp_path / "adapter")
    fresh.resize_token_embeddings(new + 1)
    answer = logits(al.load(fresh, tmp_path / "adapter").model, batch)
    assert torch.equal(answer[..., :new], logits(model, batch)[..., :new])  # the head's new row is random


def test_what_cannot_be_is_refused_with_the_next_step(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="tokens name 5 twice"):
        al.TrainableTokens(tokens=[5, 5])
    with pytest.raises(ConfigError, match="tokens"):
        al.TrainableTokens(tokens=[])
    with pytest.raises(AttachError, match=r"does not say where its tokenizer is.*give the ids"):
        al.attach(tiny("llama"), al.TrainableTokens(tokens=["a"]))
    with pytest.raises(AttachError, match="has no table that embeds its input"):
        al.attach(tiny("vit"), al.TrainableTokens(tokens=[1]))
    with pytest.raises(TargetError, match="norm"):
        al.attach(tiny("llama"), al.TrainableTokens(tokens=[1], targets=["model.norm"]))
    model = tiny("llama")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(AttachError, match="max_norm"):
        al.attach(model, al.TrainableTokens(tokens=[1]))


def _without_gain(self: Any, tokens: Tensor, y: Tensor) -> Tensor:
    place, chosen = self.places(tokens)
    return torch.where(chosen[..., None], F.embedding(place, self.values), y)


def _without_bias(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return y.index_copy(-1, self.ids, F.linear(x, self.values))


def _without_order(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    ordered = self.ids.sort()[0]
    place = torch.searchsorted(ordered, tokens).clamp_(max=len(ordered) - 1)
    return place, ordered[place] == tokens


def _apart(self: Any, site: Any, ids: Any, lender: Any = None) -> None:
    _made(self, site, ids)


_made: Any = Rows.__init__
_places: Any = Rows.places
_scored: Any = Rows.scored
BROKEN: dict[str, Mutation] = {
    "the table is not looked up": (Rows, "looked_up", lambda self, tokens, y: y),
    "a multiplied table forgets its factor": (Rows, "looked_up", _without_gain),
    "a tied head does not see them": (Rows, "scored", lambda self, x, y: y),
    "a tied head sees them twice": (Rows, "scored", lambda self, x, y: 2 * _scored(self, x, y) - y),
    "a head forgets its bias": (Rows, "scored", _without_bias),
    "rows in the order of ids": (Rows, "places", _without_order),
    "every token has a row": (Rows, "places", lambda self, t: (_places(self, t)[0], torch.ones_like(t).bool())),
    "a tied head has rows of its own": (Rows, "__init__", _apart),
    "the first holder alone": (rows, "_holders", lambda host, site, sites: [site]),
}
test_the_claim_fails_when_a_line_is_broken = fails_without(
    *[
        # every family has one line of its own: a factor, a bias, ties
        lambda tiny, batch_for, randomise, logits, family=family: (
            test_outputs_and_gradients_are_those_of_the_table_with_the_rows_in_it(
                family, tiny, batch_for, randomise, logits
            )
        )
        for family in ("gemma2", "bert-masked")
    ],
    lines=BROKEN,
)
MERGED: dict[str, Mutation] = {
    "nothing is merged": (Rows, "merged", lambda self, weight, bias: (weight, bias)),
    "differences are merged": (
        Rows,
        "merged",
        lambda self, w, b: (self.table(self.table(w).index_add(0, self.ids, self.values.to(w.dtype))), b),
    ),
}


@pytest.mark.parametrize("line", MERGED)
def test_a_broken_merge_is_seen(
    line: str, tiny: Any, batch_for: Any, randomise: Any, logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MERGED[line])
    with pytest.raises(AssertionError):
        test_merging_keeps_ties_and_undoing_is_exact("llama-tied", tiny, batch_for, randomise, logits)


def test_rows_are_a_small_part(tiny: Any) -> None:
    model = tiny("llama-tied")
    assert isinstance(model.lm_head, nn.Linear)
    assert al.attach(model, al.TrainableTokens(tokens=IDS)).summary().trainable == 4 * 32
