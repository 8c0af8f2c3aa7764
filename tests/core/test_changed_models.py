"""A model that was changed after attaching: nothing less than what was attached is saved or merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
from adapterlab.errors import AttachError


def cut(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def replace(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32, bias=False)


def resize(model: Any) -> None:
    model.resize_token_embeddings(140)


def stretch(model: Any) -> None:
    model.model.embed_tokens.weight.data = torch.zeros(140, 32)


CHANGES = {
    cut: "layers.1.self_attn.q_proj is no longer in the model", replace: r"q_proj was replaced \(Linear\)",
    resize: "lm_head was replaced", stretch: r"embed_tokens was resized: weight had the shape \(128, 32\)",
}  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), CHANGES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_what_went_with_a_change_is_missed_at_every_save(
    change: Callable[[Any], None], fault: str, tiny: Any, tmp_path: Path
) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2, targets=["q", "lm_head", "embed_tokens"]))
    change(host.model)
    for keep in (host.save, host.model.save_pretrained):
        with pytest.raises(AttachError, match=fault):
            keep(tmp_path / "a")
    with pytest.raises(AttachError, match=fault):
        host.state_dict("default")
    with pytest.raises(AttachError, match=fault):
        host.merge()
    assert not any((tmp_path / "a").glob("*")) if (tmp_path / "a").exists() else True


def test_owned_parameters_are_missed_too(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.Full(keep_base=True))
    replace(host.model)
    with pytest.raises(AttachError, match=r"q_proj\.weight was replaced"):
        host.save(tmp_path / "a")


def test_a_change_beside_the_adapter_is_nobodys_loss(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2, targets=["layers.0.self_attn.q_proj"]))
    cut(host.model)
    host.save(tmp_path / "a")


def test_copies_of_a_model_on_several_devices_are_refused(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"DataParallel holds the model already(.|\n)*model\.module"):
        al.attach(nn.DataParallel(tiny("llama")), al.LoRA(r=2))
