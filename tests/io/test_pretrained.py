"""Whoever saves a model with adapters leaves adapter folders: Trainer, `save_pretrained`, a library around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import adapterlab as al
from adapterlab.errors import AttachError, FormatError, OutputError
from adapterlab.hosts import Host
from adapterlab.train import AdapterlabCallback

X = torch.arange(3, 10)[None]
ROWS = [{"input_ids": X[0], "labels": X[0]}] * 8
FILES = {"adapter_config.json", "adapter_model.safetensors", "method.json"}


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=X).logits
    return found


def spread(host: Host, *names: str) -> None:
    for name in names or ("default",):
        for parameter in host.named_parameters(name).values():
            parameter.data.normal_(0, 0.1)


def trainer(model: nn.Module, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])  # type: ignore[arg-type]


METHODS = {
    "lora and a head": al.LoRA(r=2, modules_to_save=("lm_head",)),
    "derived base values": al.PiSSA(r=2),
    "not in PEFT": al.AdapterHoulsby(),
    "base parameters": al.BitFit(bias_mode="add", norm_gain=True),
    "shared tensors": al.PrefixTuning(length=3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_trainer_leaves_adapters_and_finds_them_again(method: al.Method, tiny: Any, tmp_path: Path) -> None:
    def attached() -> Any:
        torch.manual_seed(1)
        return al.attach(tiny("llama"), method).model

    judged = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    trained = trainer(attached(), tmp_path / "run", load_best_model_at_end=True, **judged)  # the worst is the best
    trained.train()
    trained.save_model(str(tmp_path / "last"))
    best = Path(str(trained.state.best_model_checkpoint))
    wanted = answers(trained.model)
    for folder in (tmp_path / "last", best):
        assert not (folder / "config.json").exists()
        assert torch.equal(answers(al.load(tiny("llama"), folder).model), wanted)
    again = trainer(attached(), tmp_path / "more")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(answers(again.model), answers(al.load(tiny("llama"), tmp_path / "run" / "checkpoint-4").model))


def test_peft_reads_what_save_pretrained_leaves(tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    host = al.attach(tiny("llama"), al.LoRA(r=2, modules_to_save=("lm_head",)))
    spread(host)
    host.model.save_pretrained(tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == FILES
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a")
    torch.testing.assert_close(answers(theirs), answers(host.model))


def test_several_adapters_are_saved_and_loaded_together(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2), "a")
    host.attach(al.AdapterHoulsby(), "b")
    host.attach(al.LoRA(r=3), "waiting", active=False)
    spread(host, "a", "b", "waiting")
    host.model.save_pretrained(tmp_path / "all", state_dict=None)
    assert {file.name for file in (tmp_path / "all").iterdir()} == {"a", "b", "waiting", "model.safetensors"}
    loaded = al.load(tiny("llama"), tmp_path / "all")
    assert (loaded.active, [*loaded.methods]) == (("a", "b"), ["a", "b", "waiting"])
    assert torch.equal(answers(loaded.model), answers(host.model))
    assert al.load(tiny("llama"), tmp_path / "all", "waiting").active == ("waiting",)
    with pytest.raises(FormatError, match=r"holds the adapters a, b, waiting.*'c'"):
        al.load(tiny("llama"), tmp_path / "all", "c")


class Around(nn.Module):
    """A model of another library, which saves the one inside as sentence-transformers does."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside: Any = inside

    def forward(self, **kwargs: Any) -> Any:
        return self.inside(**kwargs)


def test_the_saved_model_may_be_a_part_or_stand_around(tiny: Any, tmp_path: Path) -> None:
    around = Around(tiny("llama"))
    spread(al.attach(around, al.LoRA(r=2, targets=["q", "v"])))
    around.inside.save_pretrained(str(tmp_path / "part"), safe_serialization=True)
    assert torch.equal(answers(al.load(tiny("llama"), tmp_path / "part").model), answers(around))
    outer = tiny("llama")
    spread(al.attach(outer.model, al.LoRA(r=2)))
    outer.lm_head.weight.data.mul_(1.5)  # around what was attached to, the head trains
    outer.save_pretrained(tmp_path / "whole")
    assert torch.equal(answers(al.load(tiny("llama"), tmp_path / "whole").model), answers(outer))
    assert json.loads((tmp_path / "whole" / "method.json").read_text())["fields"]["modules_to_save"] == ["lm_head"]
    model = al.attach(tiny("llama"), al.LoRA(r=2, targets=["q", "lm_head"])).model
    with pytest.raises(AttachError, match=r"reach outside of it \(default: lm_head\)"):
        model.model.save_pretrained(tmp_path / "n")


def test_given_tensors_are_saved_instead_of_the_present_ones(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2))
    spread(host)
    mean = {key: value * 0.5 for key, value in host.model.state_dict().items()}
    host.model.save_pretrained(tmp_path / "mean", state_dict=mean)
    saved = al.load(tiny("llama"), tmp_path / "mean").state_dict("default")
    for key, value in host.state_dict("default").items():
        torch.testing.assert_close(saved[key], value * 0.5)
    host.model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_state_that_peft_injected_into_is_loaded(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    around = Around(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    spread(al.attach(around.inside, al.LoRA(r=2)))
    around.inside.save_pretrained(tmp_path / "a")
    theirs = Around(LlamaForCausalLM.from_pretrained(tmp_path / "a"))  # as the trainer of sentence-transformers does
    again = Around(tiny("llama"))
    al.attach(again.inside, al.LoRA(r=2))
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(answers(again), answers(around))


def test_a_merged_model_is_saved_whole(tiny: Any, tmp_path: Path) -> None:
    host = al.attach(tiny("llama"), al.LoRA(r=2))
    spread(host)
    host.merge()
    host.model.save_pretrained(tmp_path / "m")
    assert torch.equal(answers(LlamaForCausalLM.from_pretrained(tmp_path / "m")), answers(host.model))
    host.attach(al.LoRA(r=2), "b")
    with pytest.raises(OutputError, match="default is merged into the weights, and b is not"):
        host.model.save_pretrained(tmp_path / "n")
    host.detach("b")
    host.restore()
    with pytest.raises(OutputError, match="holds the weights of a whole model"):
        host.model.save_pretrained(tmp_path / "m", state_dict=None)
    host.detach("default")
    host.model.save_pretrained(tmp_path / "plain")
    assert torch.equal(answers(LlamaForCausalLM.from_pretrained(tmp_path / "plain")), answers(tiny("llama")))


def test_a_state_of_other_adapters_is_refused_where_loaders_only_warn(tiny: Any) -> None:
    first, second = (al.attach(tiny("llama"), al.LoRA(r=2, targets=t)).model for t in (["q"], ["q", "v"]))
    for into, state in ((first, second.state_dict()), (second, first.state_dict())):
        with pytest.raises(AttachError, match="that of other adapters"):
            into.load_state_dict({k: v for k, v in state.items() if "_adapters" in k}, strict=False)
    missing = first.load_state_dict(tiny("llama").state_dict(), strict=False).missing_keys
    assert len(missing) == 4  # the base's state is one, and says so


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_foreign_module_in_trainer_has_adapters_in_its_checkpoints(tiny: Any, tmp_path: Path) -> None:
    class Loss(Around):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return self.inside(input_ids=input_ids, labels=labels)

    def attached() -> Loss:
        found = Loss(tiny("llama"))
        al.attach(found, al.LoRA(r=2, targets=["q"]))
        return found

    model = attached()
    made = trainer(model, tmp_path)
    made.add_callback(AdapterlabCallback(al.host(model), "default"))  # type: ignore[arg-type]
    made.train()
    host = al.load(Loss(tiny("llama")), tmp_path / "checkpoint-4")
    assert torch.equal(answers(host.model), answers(model))
    made.save_model(str(tmp_path / "last"))
    with pytest.raises(FormatError, match=r"state of a model with adapters(.|\n)*load_state_dict"):
        al.load(Loss(tiny("llama")), tmp_path / "last")


Changes = Callable[[Any], Any]


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_layers(model: Any) -> Any:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = compiled(layer)
    return model


@pytest.mark.parametrize("change", [compiled, compiled_layers])
@pytest.mark.parametrize("early", [True, False])
def test_names_are_the_same_around_compiling(change: Changes, early: bool, tiny: Any, tmp_path: Path) -> None:
    plain = tiny("llama").double()  # to the bit: no kernel takes these
    model = change(plain) if early else plain
    host = al.attach(model, al.LoRA(r=2, bias="all", modules_to_save=("lm_head",)))
    spread(host)
    model = model if early else change(model)
    host.save(tmp_path / "a")
    host.save_base(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert torch.equal(answers(al.load(base, tmp_path / "a").model), answers(model))
    assert al.host(model) is host
    host.detach("default")
    assert torch.equal(answers(model), answers(tiny("llama").double()))
