"""Runs of the tokens of one batch with adapters of their own, against batches of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterlab as al
from adapterlab.core.segments import segments
from adapterlab.data import PackingCollator
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.errors import AttachError

KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: al.LoRA(r=2),
    "wide": lambda: al.LoRA(r=5, alpha=3.0, targets=["q", "down", "head"]),
    "dora": lambda: al.DoRA(r=3, targets=["q", "v", "up"]),
    "ia3": lambda: al.IA3(),
    "behind": lambda: al.AdapterPfeiffer(m=4),
    "beside": lambda: al.AdapterParallel(m=4),
    "around": lambda: al.AdapterPfeiffer(m=4, targets=[r".*self_attn"]),
    "prefix": lambda: al.PrefixTuning(length=3),
    "mixture": lambda: al.MoLoRA(r=2, targets=["v"]),
}
EACH: list[Any] = [
    "lora", "wide", None, "dora", "ia3", "prefix", "behind", ("beside", "wide"), "lora", "mixture", "around", "beside"
]  # fmt: skip


@pytest.fixture
def hosted(tiny: Any, randomise: Any) -> Callable[..., Any]:
    """`hosted("lora", "dora")`: a tiny model that carries such adapters, with values in all tensors."""

    def make(*kinds: str, family: str = "llama", **options: Any) -> Any:
        host: Any = None
        model = tiny(family).double()
        for kind in kinds:
            host = al.attach(model, KINDS[kind]().replace(**options) if options else KINDS[kind](), kind)
        randomise(host, size=0.3)
        return host

    return make


def names(who: Any) -> tuple[Any, ...]:
    return who if isinstance(who, tuple) else (who,) if who else ()


def samples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 3 to 7 tokens, of which the first bear no label."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 100, (3 + 2 * i % 5,), generator=draw).tolist() for i in range(count)]
    return [{"input_ids": ids, "labels": [-100 if j < i % 3 else t for j, t in enumerate(ids)]} for i, ids in
            enumerate(rows)]  # fmt: skip


def gradients(host: Any) -> dict[str, Tensor]:
    found = {f"{n}:{k}": p.grad.clone() for n in host.methods for k, p in host.named_parameters(n).items()
             if p.grad is not None}  # fmt: skip
    host.model.zero_grad()
    return found


def separate(host: Any, rows: Any, owners: Any, loss: Any) -> tuple[float, dict[str, Tensor]]:
    """Each row in a batch of its own; gradients add up."""
    total = 0.0
    for row, who in zip(rows, owners, strict=True):
        with host.using(*names(who)):
            value = loss(PackingCollator()([row]), 1)
            if value.requires_grad:
                value.backward()
        total += float(value.detach())
    return total, gradients(host)


@pytest.mark.parametrize("mode", ["none", "full", "cheap"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_samples_equal_separate_runs(family: str, mode: Any, hosted: Any) -> None:
    """Loss and gradients of methods of every kind, LoRA on the head among them, which sees labelled tokens alone."""
    kinds = [kind for kind in KINDS if family == "llama" or kind not in ("dora", "wide", "mixture", "around")]
    host = hosted(*kinds, family=family)
    owners = [who for who in EACH if set(names(who)) <= set(kinds)]
    rows = samples(len(owners))
    host.activate()
    loss = Loss(host.model)
    assert loss.path == "chunked"
    host.model.train()
    with fast_attention(host.model):
        expected, wanted = separate(host, rows, owners, loss)
        host.recompute(mode)
        with host.tokens([(who, len(row["input_ids"])) for who, row in zip(owners, rows, strict=True)]):
            found = loss(PackingCollator()(rows), 1)
        found.backward()  # outside: what is computed again sees the map of its forward pass
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    together = gradients(host)
    assert together.keys() == wanted.keys()
    assert {key.split(":")[0] for key in together} == set(kinds)
    for key, value in wanted.items():
        torch.testing.assert_close(together[key], value, rtol=1e-7, atol=1e-9, msg=key)


def test_single_precision(tiny: Any, randomise: Any) -> None:
    """LoRAs of several ranks in one node."""
    host = al.attach(tiny("llama"), al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=8, targets=["q", "down"]), "b")
    randomise(host, size=0.1)
    draw, owners = torch.Generator().manual_seed(0), ["a", ("a", "b"), None, "b"]
    rows = [
        {"input_ids": (ids := torch.randint(3, 100, (40,), generator=draw).tolist()), "labels": ids} for _ in owners
    ]
    loss = Loss(host.model)
    with fast_attention(host.model):
        expected, wanted = separate(host, rows, owners, loss)
        with host.tokens([(who, 40) for who in owners]):
            found = loss(PackingCollator()(rows), 1)
            found.backward()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    for key, value in gradients(host).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=key)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kinds", [("lora", "wide"), ("lora", "dora"), ("ia3", "dora"), ("behind", "beside")])
def test_any_runs_of_tokens_at_one_module(kinds: tuple[str, str], training: bool, hosted: Any) -> None:
    """Borders in the middle of rows, an owner that comes again; a reference that knows no map."""
    host = hosted(*kinds)
    path = next(path for path in host.adapters(kinds[0]) if path in host.adapters(kinds[1]))
    module, draw = host.module(path), torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, getattr(module, "in_features", 32), generator=draw, dtype=torch.float64)
    runs: list[Any] = [(kinds[0], 5), (None, 2), (kinds[1], 6), (kinds[0], 2), (kinds, 3)]
    leaves = [p for name in kinds for p in host.adapters(name)[path].parameters()]
    with torch.set_grad_enabled(training):
        with host.tokens(runs):
            found = module(x).flatten(0, 1)
        alone = []
        for token, who in enumerate(who for who, count in runs for _ in range(count)):
            with host.using(*names(who)):
                alone.append(module(x).flatten(0, 1)[token])
        wanted = torch.stack(alone)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if training:
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
    assert not any(m._forward_pre_hooks for m in host.model.modules()), "nothing is left behind"


def test_logits_that_were_asked_for(hosted: Any) -> None:
    """A head with adapters sees the last positions alone, or those that are named."""
    host = hosted("wide", "lora")
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    runs = [("wide", 4), ("lora", 1), ("wide", 2), (None, 5)]
    with torch.no_grad(), host.tokens(runs):
        whole = host.model(input_ids=ids).logits
        torch.testing.assert_close(host.model(input_ids=ids, logits_to_keep=3).logits, whole[:, -3:])
        chosen = torch.tensor([0, 3, 4])
        torch.testing.assert_close(host.model(input_ids=ids, logits_to_keep=chosen).logits, whole[:, chosen])
    with torch.no_grad(), host.rows(["wide", "lora"]):
        torch.testing.assert_close(host.model(input_ids=ids, logits_to_keep=2).logits, host.model(ids).logits[:, -2:])


def test_labelled_tokens_of_rows_keep_their_adapter(hosted: Any) -> None:
    """The head sees as many tokens as rows, or a multiple, and they are none."""
    host = hosted("wide", "lora")
    loss = Loss(host.model)
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 2:], labels[1, :3] = -100, -100
    batch = {"input_ids": ids, "labels": labels}
    for owners in (["wide", "lora"], [None, "wide"]):
        with torch.no_grad(), host.rows(owners):
            found = loss(batch, 1)
        expected = 0.0
        for i, who in enumerate(owners):
            with torch.no_grad(), host.using(*names(who)):
                expected += float(loss({key: value[i : i + 1] for key, value in batch.items()}, 1))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", ["none", "full", "cheap"])
def test_dropout_of_each_from_its_own_generator(mode: Any, hosted: Any) -> None:
    """Masks are those of a run alone, whoever else is there, and the same when activations are computed again."""
    host = hosted("lora", "wide", "behind", dropout=0.4)
    rows, owners = samples(3), ["wide", "behind", "lora"]
    host.activate()
    loss = Loss(host.model)
    host.model.train()
    host.recompute(mode)
    with fast_attention(host.model):
        for i, who in enumerate(owners):
            torch.manual_seed(i)
            with host.using(who):
                loss(PackingCollator()([rows[i]]), 1).backward()
        wanted = gradients(host)
        torch.manual_seed(7)
        given = {who: torch.Generator().manual_seed(i) for i, who in enumerate(owners)}
        runs = [(who, len(row["input_ids"])) for who, row in zip(owners, rows, strict=True)]
        with host.tokens(runs, generators=given):
            loss(PackingCollator()(rows), 1).backward()
        found = gradients(host)
        with host.tokens(runs, generators={"lora": given["lora"]}):
            loss(PackingCollator()(rows), 1).backward()
    again = gradients(host)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=key)
    assert not all(torch.allclose(again[key], value) for key, value in wanted.items())


def test_an_adapter_that_comes_again_gets_all_its_gradient(hosted: Any) -> None:
    host = hosted("lora", "wide")
    rows, owners = samples(4), ["lora", "wide", "lora", "lora"]
    loss = Loss(host.model)
    _, wanted = separate(host, rows, owners, loss)
    with fast_attention(host.model), host.tokens([(w, len(r["input_ids"])) for w, r in zip(owners, rows, strict=True)]):
        loss(PackingCollator()(rows), 1).backward()
    for key, value in gradients(host).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-7, atol=1e-9, msg=key)


def test_compositions_own_tokens(hosted: Any) -> None:
    host = hosted("lora", "wide", "behind")
    rows = samples(2)
    mean, behind = al.Average("lora", "wide", weights=[2, -1]), al.Stack("behind", "lora")
    loss = Loss(host.model)
    expected, _ = separate(host, rows, [mean, behind], loss)
    with (
        fast_attention(host.model),
        host.tokens([(mean, len(rows[0]["input_ids"])), (behind, len(rows[1]["input_ids"]))]),
    ):
        assert float(loss(PackingCollator()(rows), 1).detach()) == pytest.approx(expected, rel=1e-9)


def test_block_adapters_generate_together_with_a_cache(hosted: Any) -> None:
    """The blocks of all rows are computed once, and with them the cache."""
    host = hosted("behind", "around", "lora", "prefix")
    ids, owners = torch.arange(3, 28).view(5, 5), ["behind", "lora", None, "around", "prefix"]
    options: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2
    }  # fmt: skip
    with host.rows(owners):
        together = host.model.generate(ids, **options)
    for row, who in enumerate(owners):
        with host.using(*names(who)):
            assert torch.equal(together[row], host.model.generate(ids[row : row + 1], **options)[0]), who


def test_errors_name_the_rule(hosted: Any) -> None:
    host = hosted("lora", "behind", "prefix")
    ids, batch = torch.arange(3, 15).view(2, 6), PackingCollator()(samples(2))
    host.attach(al.PromptTuning(length=2), "prompt", active=False)
    host.attach(al.Full(), "whole", active=False)

    def refused(runs: Any, said: str, **given: Any) -> None:
        with pytest.raises(AttachError, match=said), fast_attention(host.model), host.tokens(runs):
            host.model(**(given or {"input_ids": ids}))

    refused([("lora", 5), (None, 6)], r"names 11 tokens(.|\n)*2 rows of 6 tokens, 12 in all")
    refused([("lola", 12)], r"no adapter 'lola'")
    refused([("lora", -1)], "whole number of tokens")
    refused([(al.Split("lora", "behind", sizes=[1, 1]), 12)], r"Split(.|\n)*entries of their own")
    refused([(al.Parallel("lora", "behind"), 12)], "Parallel makes rows")
    refused([("prefix", 3), (None, 9)], "a sample has several owners")
    refused([("prefix", 2), (None, batch["input_ids"].numel() - 2)], "a sample has several owners", **batch)
    refused([("prompt", 3), (None, 9)], r"'prompt' (.|\n)*may mix tokens")
    refused([("whole", 12)], "lives in the base's own weights")
    with pytest.raises(AttachError, match="no adapter 'lola'"):
        host.tokens([("lora", 12)], generators={"lola": torch.Generator()}).__enter__()
    assert host.state.segments is None
    assert not host.state.batches


def test_a_map_is_what_its_parts_say() -> None:
    whole = segments([(("a",), 2), (("a",), 1), ((), 3), (("b",), 0), (("a",), 2)])
    assert [tuple(part) for part in whole.parts] == [(("a",), 0, 3), ((), 3, 6), (("a",), 6, 8)]
    assert whole is segments([(("a",), 3), ((), 3), (("a",), 2)]), "what was derived is found again"
    here = whole.among(("a",))
    assert here.groups(1)[()] == slice(3, 6)
    assert here.groups(2)[("a",)].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15]
    assert whole.among(("c",)).used == ()
    assert [tuple(p) for p in whole.chosen(torch.tensor([0, 4, 7, 7])).parts] == [
        (("a",), 0, 1),
        ((), 1, 2),
        (("a",), 2, 4),
    ]
    by_token = segments([(("a",), 4), ((), 2)], by_token=True)
    assert by_token.settled(3, 2).parts == segments([(("a",), 2), ((), 1)]).parts
    assert not by_token.settled(3, 2).by_token
    assert by_token.settled(2, 3).by_token
    assert not by_token.settled(2, 3).whole_samples
    assert by_token.settled(1, 6, torch.tensor([0, 1, 4, 6])).whole_samples
    assert segments([(("a",), 1), ((), 1)]).tokens(4, 3).parts == segments([(("a",), 6), ((), 6)], by_token=True).parts
