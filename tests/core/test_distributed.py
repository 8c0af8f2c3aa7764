"""Two processes give the gradients of one: data parallel and fully sharded, one method of each family; and TRL."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adapterlab import registry
from adapterlab.core.host import Host
from adapterlab.core.method import Method
from adapterlab.testing import Case, batch

WORLD = 2
KINDS = ("data parallel", "fully sharded")


def representatives() -> list[type[Method]]:
    """The first trained method of each family."""
    methods = [method for method in map(registry.method, registry.ids()) if method.trains]
    return list({method.family: method for method in reversed(methods)}.values())


def _gradients(host: Host, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**given).loss.backward()
    found = {}
    for key, parameter in host.named_parameters("one").items():
        if parameter.grad is not None:
            grad = parameter.grad
            found[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def _distance(method: type[Method], kind: str, rank: int) -> float:
    """Largest difference to the gradients of one process, relative to the largest gradient."""
    whole, shared = Case(method).attach(), Case(method).attach()
    rows = batch(whole.model, rows=2 * WORLD, padding=False)
    wanted = _gradients(whole, whole.model, rows)
    mine = {key: value[rank::WORLD] for key, value in rows.items()}
    model = shared.model
    if kind == "data parallel":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in shared.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    got = _gradients(shared, model, mine)
    assert got.keys() == wanted.keys(), f"gradients of other tensors: {sorted(got.keys() ^ wanted.keys())[:4]}"
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((got[key] - wanted[key]).abs().max()) for key in wanted) / largest


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for method in representatives():
        for kind in KINDS:
            try:
                results[f"{method.id}, {kind}"] = _distance(method, kind, rank)
            except Exception:
                results[f"{method.id}, {kind}"] = traceback.format_exc(limit=-3)
            (Path(folder) / f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    mp.start_processes(_work, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
    for rank in range(WORLD):
        results = json.loads((tmp_path / f"results-{rank}.json").read_text())
        assert len(results) == len(KINDS) * len(representatives())
        wrong = {key: value for key, value in results.items() if isinstance(value, str) or not value < 1e-5}
        assert not wrong, "\n".join(f"{key}: {value}" for key, value in wrong.items())


@pytest.mark.slow
def test_trl_trains_with_our_callback(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from adapterlab.train import AdapterlabCallback

    words = {f"w{i}": i + 4 for i in range(100)} | {"<p>": 0, "<s>": 1, "<e>": 2, "<u>": 3}
    plain = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<p>", bos_token="<s>", eos_token="<e>", unk_token="<u>"
    )
    host = Case(registry.method("lora")).attach(fresh=True)
    base = {k: v.clone() for k, v in host.model.state_dict().items() if not host.is_adapter_path(k)}
    config = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, bf16=False, logging_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": "w1 w2 w3 w4 w5 w6"}] * 8)
    events = [AdapterlabCallback(host, "one")]
    trainer = SFTTrainer(host.model, config, train_dataset=rows, processing_class=tokenizer, callbacks=events)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(base[k], v) for k, v in host.model.state_dict().items() if k in base)
