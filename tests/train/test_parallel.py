"""Two processes train what one trains: whole models beside each other, and one that is split among them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import parallel_cases
from adapterlab.errors import AttachError, ConfigError, FormatError
from adapterlab.hosts import attach, load
from adapterlab.models import load_model
from adapterlab.registry import method
from adapterlab.testing.models import tiny, token_rows
from adapterlab.testing.parallel import pair
from adapterlab.train import Training, fit, run, train
from adapterlab.train.config import TrainConfig
from adapterlab.train.parallel import kind_of
from adapterlab.train.parallel.flat import buckets
from tiny_runs import make_config

LORA = method("lora")


@pytest.mark.slow
def test_a_pair_of_processes(root: Path) -> None:
    """One start for all of them."""
    found = pair(parallel_cases.work, root)
    for text in [each.pop("refusal") for each in found]:
        assert "full on" in text, text
        assert "cannot fit on cpu (for each of 2 processes): its weights alone take" in text, text
    wrong = [text for each in found for text in each.values() if isinstance(text, str)]
    assert not wrong, "\n".join(wrong)
    _check_shares([each["shares"] for each in found])
    _check_split([each["split"] for each in found])
    for name, off in found[0]["ways"].items():
        assert off < (0.3 if "bf16" in name else 5e-3), f"{name}: {off}"
    _check_runs(root, [each["runs"] for each in found])


@pytest.mark.slow
def test_two_processes_train_a_method_of_each_family_as_one_does(tmp_path: Path) -> None:
    for found in pair(parallel_cases.methods, tmp_path):
        cells = {f"{id} {kind}": cell for id, row in found.items() for kind, cell in row.items()}
        assert not {key: cell for key, cell in cells.items() if cell["status"] != "passed"}


def _check_shares(found: list[dict[str, Any]]) -> None:
    """Sums in one piece, and one call that says who has what; what nobody has stays away."""
    assert [each["calls"] for each in found] == [2, 2]
    assert all(each["in place"] for each in found), "gradients are never there twice"
    wanted = [[float(2 * i + 1 if i % 2 else i)] * 3 for i in range(30)] + [None] * 10
    assert found[0]["grads"] == found[1]["grads"] == wanted


def _check_split(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["parts"] == each["of"] > 0
        assert 0.45 < each["weights"] < 0.55
        assert each["moments"] == each["weights"]
        assert "reads" in each["refused"]["full"]


def _check_runs(root: Path, found: list[dict[str, float]]) -> None:
    assert len({loss for each in found for loss in each.values()}) == 1
    names = ("best/adapter_model.safetensors", "last/adapter_model.safetensors")
    for name in names:
        digests = {hashlib.sha256((root / run / name).read_bytes()).hexdigest() for run in ("whole", "killed")}
        assert len(digests) == 1, f"{name} differs after a kill"
    checkpoint = root / "left" / "checkpoint"
    assert sorted(file.name for file in checkpoint.rglob("*.safetensors")) == ["0.safetensors", "1.safetensors"]
    assert (checkpoint / "state.pt").stat().st_size < 200_000, "the first process wrote what others hold"
    _check_one_goes_on(root, names[1])


def _check_one_goes_on(root: Path, name: str) -> None:
    """One process goes on from what two have left, where a step has as many rows."""
    alone = parallel_cases.config(root, "left")
    with pytest.raises(ConfigError, match=r"processes: 8 in the checkpoint, 4 now"):
        fit(alone, quiet=True, resume=True)
    alone["training"] |= {"accumulation": 4}
    part = next((root / "left" / "checkpoint").rglob("1.safetensors"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"1\.safetensors is damaged"):
        fit(alone, quiet=True, resume=True)
    part.write_bytes(content)
    fit(alone, quiet=True, resume=True)
    one, two = (load_file(root / run / name) for run in ("left", "whole"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=5e-5)


def test_buckets_hold_what_is_alike() -> None:
    given = [
        torch.zeros(n, dtype=d) for n, d in [(4, torch.float32), (4, torch.int8), (2, torch.float32), (9, torch.int8)]
    ]
    assert list(buckets(given, 24)) == [[0, 2], [1, 3]]
    assert list(buckets(given, 20)) == [[0], [2], [1, 3]]
    assert list(buckets(given, 1)) == [[0], [2], [1], [3]], "what is larger than a piece is one"


# ---------------------------------------------------------------------- one process, several places


def _placed(folder: Path) -> Any:
    """A model whose second layer waits on the disk until it is called."""
    return _on_places(tiny("llama"), folder)


def _on_places(model: Any, folder: Path) -> Any:
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(len(model.model.layers))}
    rest = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    return dispatch_model(model, {**rest, **layers, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_model_on_several_places_trains_as_on_one(tmp_path: Path, recompute: Any) -> None:
    found = []
    for model in (tiny("llama"), _placed(tmp_path / "weights")):
        torch.manual_seed(0)
        host = attach(model, LORA(r=2, dropout=0.0))
        settings = Training(steps=3, batch_size=2, lr=1e-2, recompute=recompute)
        status = train(host, "default", token_rows(), settings, eval_rows=token_rows())
        found.append((host, status))
    (one, status), (several, placed) = found
    assert one.model.model.layers[1].mlp.up_proj.weight.device.type == "cpu"
    assert several.model.model.layers[1].mlp.up_proj.weight.is_meta
    assert placed.train_loss == pytest.approx(status.train_loss, rel=1e-5)
    assert placed.eval_loss == pytest.approx(status.eval_loss, rel=1e-5)
    folder = several.save(tmp_path / "adapter")
    assert load(tiny("llama"), folder).methods.keys() == {"default"}
    for key, value in one.state_dict("default").items():
        torch.testing.assert_close(several.state_dict("default")[key], value, rtol=1e-4, atol=1e-5)


def test_a_run_places_its_model_over_all_there_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one place, loading puts a layer on the disk as it would where memory is short."""
    asked = []

    def loaded(name: str, **options: Any) -> Any:
        asked.append(options["device"])
        model, tokenizer = load_model(name, **options)
        return _on_places(model, root / "offloaded"), tokenizer

    given = make_config(root, steps=3, batch_size=2, lr=1e-3) | {"device": None}
    given["method"]["dropout"] = 0.0
    wanted = fit({**given, "output": str(root / "one")}, quiet=True)
    monkeypatch.setattr(run, "load_model", loaded)
    found = fit({**given, "parallel": "device_map"}, quiet=True)
    assert asked == ["auto"]
    assert found is not None
    assert wanted is not None
    assert found.train_loss == pytest.approx(wanted.train_loss, rel=1e-4)
    one, spread = (load_file(result.last / "adapter_model.safetensors") for result in (wanted, found))
    assert one.keys() == spread.keys()
    for key, value in one.items():
        torch.testing.assert_close(spread[key], value, rtol=1e-3, atol=1e-4)


def test_what_waits_elsewhere_is_read_and_not_changed(tmp_path: Path) -> None:
    model = _placed(tmp_path)
    weight = tiny("llama").model.layers[1].mlp.up_proj.weight
    host = attach(model, method("dora")(r=2, targets=("up",)))
    assert torch.equal(host.adapters("default")["model.layers.1.mlp.up_proj"].site.weight(), weight)
    host.detach("default")
    with pytest.raises(AttachError, match=r"layers\.1\..* is kept in another memory"):
        attach(model, method("full")())


def test_kinds_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel=device_map places the model"):
        TrainConfig(data={"path": "rows.jsonl"}, parallel="device_map", device="cpu")
    with pytest.raises(ValueError, match="cpu_offload goes with parallel=fsdp, zero2 and zero3"):
        TrainConfig(data={"path": "rows.jsonl"}, parallel="ddp", cpu_offload=True)
    engine: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2)
    with pytest.raises(ConfigError, match="zero2 and zero3 divide here without its package"):
        kind_of(engine, tiny("llama"))
    flat = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    engine = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2, state=flat)
    with pytest.raises(ConfigError, match="started with FSDP1"):
        kind_of(engine, tiny("llama"))
    with pytest.raises(ConfigError, match="accelerate was started with FSDP"):
        kind_of(engine, tiny("llama"), "ddp")
    alone = kind_of(Accelerator(cpu=True), tiny("llama"), "fsdp")
    assert alone.kind == "alone", "one process has nothing to split"
