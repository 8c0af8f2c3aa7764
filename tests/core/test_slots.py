"""Stacked slots: many low-rank adapters in one batch, one graph for every mix."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import adapterlab as al
from adapterlab.errors import AttachError


@pytest.fixture
def many(tiny: Any, randomise: Any) -> Any:
    model = tiny("llama").eval()
    for i, name in enumerate("abc"):
        al.attach(model, al.LoRA(r=2 + i, targets=["q", "v", "down"][: i + 1]), name)
    host = al.host(model)
    assert host is not None
    randomise(host, "a", "b", "c")
    host.activate()
    return host


def test_each_row_gets_its_own_adapter(many: Any, logits: Any, batch_for: Any) -> None:
    model = many.model
    batch = batch_for(model, 4)
    names = ["c", None, "a", "b"]
    with many.rows(names):
        expected = logits(model, batch)
    base = logits(model, batch)
    with many.stack("a", "b", "c") as stack:
        stack.rows(names)
        found = logits(model, batch)
        beams = model.generate(batch["input_ids"], max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], base[1])
    assert not torch.allclose(found[0], base[0], atol=1e-2)
    assert torch.equal(logits(model, batch), base)
    with many.rows(names):
        wanted = model.generate(batch["input_ids"], max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    assert torch.equal(beams, wanted)


def test_twelve_mixes_run_one_graph_where_names_need_one_each(many: Any, batch_for: Any) -> None:
    model, graphs = many.model, []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    batch = {"input_ids": batch_for(model, 3)["input_ids"]}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    mixes = list(itertools.product(["a", "b", "c", None], repeat=3))[5:17]
    with many.stack("a", "b", "c") as stack, torch.no_grad():
        for mix in mixes:
            stack.rows(mix)
            found = compiled(**batch).logits
    assert len(mixes) == 12
    assert len(graphs) == 1
    with many.rows(mixes[-1]), torch.no_grad():
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-5)
    graphs.clear()
    torch._dynamo.reset()
    for name in "abc":
        with many.using(name), torch.no_grad():
            compiled(**batch)
    assert len(graphs) == 3


def test_what_is_not_low_rank_is_refused(many: Any) -> None:
    many.attach(al.IA3(), "d", active=False)
    with pytest.raises(AttachError, match=r"IA3.* is not a plain low-rank update.*host\.rows"), many.stack("a", "d"):
        pass
    many.attach(al.DoRA(), "e", active=False)
    with pytest.raises(AttachError, match="not a plain low-rank update"), many.stack("e"):
        pass
    with many.stack("a") as stack, pytest.raises(AttachError, match="'b' is not in this stack"):
        stack.rows(["b"])
    with pytest.raises(AttachError, match="no adapter 'z'"):
        many.stack("z")
