"""How far `adapterlab plan --devices N` is off: predicted against measured memory of processes that share a step.

    python benchmarks/plan_devices.py [--fresh | --quick]

Each case is three steps of the library's own loop with a random Llama of 8 layers: in one process, and in two that talk
through gloo, as copies (ddp) and with parts of the base (fsdp, zero2). What is compared is

- tensors: those alive before the third step and the most that torch's allocator gave out in it, against the plan's;
- process: the highest resident memory in that step, in runs without the profiler, against the plan's whole process;
- sent: bytes of the collective calls of that step, as a ring sends them, against the plan's traffic.

Cases that are in benchmarks/results/plan_devices.json already are not measured again. `--quick` compares the tensors of
two methods on a smaller model, and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench as bench

RESULTS = bench.RESULTS / "plan_devices.json"
TABLE = bench.RESULTS / "plan_devices.md"
SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QUICK = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
METHODS = ("lora", "full", "adapter_houlsby")
KINDS = (None, "ddp", "fsdp", "zero2")
BATCH, LENGTH, WORLD = 2, 256, 2
MIB = 2**20
_BYTES = {"float": 4, "double": 8, "long": 8, "long int": 8, "c10::BFloat16": 2, "unsigned char": 1}
_STEPS = 100  # of a run, of which three are done


def _shape(case: dict[str, Any]) -> dict[str, Any]:
    return {**SHAPE, **QUICK} if case.get("quick") else SHAPE


def _cases() -> list[dict[str, Any]]:
    recompute = {"lora": ("none", "full")}
    return [
        {"method": method, "parallel": kind, "recompute": how}
        for method in METHODS
        for how in recompute.get(method, ("none",))
        for kind in KINDS
    ]


# ---------------------------------------------------------------------- one process of a case


def work(case: dict[str, Any], rank: int, meeting: str) -> dict[str, float]:
    """Train three steps; return what the third one took."""
    import torch
    import torch.distributed as dist

    world = WORLD if case["parallel"] else 1
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in place.items()})  # accelerate reads them
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(bench.SEED)
    found = _tensors(case) if case["figure"] == "tensors" else _process(case)
    if world > 1:
        dist.destroy_process_group()
    return found


def _tensors(case: dict[str, Any]) -> dict[str, float]:
    train = _ready(case)
    resting = _live()
    with _Allocated() as third:
        train()
    return {"tensors": resting + third.peak, "sent": _sent(third.events)}


def _live() -> int:
    """Bytes of all tensors between two steps. The allocator's record does not see what gloo's own threads give back."""
    import torch

    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    local = [getattr(one, "_local_tensor", one) for one in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (one.untyped_storage() for one in local)}.values())


def _process(case: dict[str, Any]) -> dict[str, float]:
    import torch

    train = _ready(case)
    memory = bench.Memory(torch.nn.Module())
    train()
    return {"process": memory.loaded + memory.above()}


def _ready(case: dict[str, Any]) -> Callable[[], object]:
    """Make the loop of a run, do two steps, and return what does another."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapterlab.hosts import attach
    from adapterlab.plan.planning import make_method
    from adapterlab.train import Training
    from adapterlab.train.loop import Loop
    from adapterlab.train.parallel import kind_of

    shape = _shape(case)
    host = attach(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)), make_method(case["method"]))
    drawn = torch.randint(3, shape["vocab_size"], (BATCH * WORLD, LENGTH)).tolist()
    accelerator = Accelerator(cpu=True)
    training = Training(steps=_STEPS, batch_size=BATCH, recompute=case["recompute"], packing=False)
    loop = Loop(
        host, "default", [{"input_ids": ids, "labels": ids} for ids in drawn], training, accelerator=accelerator,
        parallel=kind_of(accelerator, host.model, case["parallel"] or "auto"),
    )  # fmt: skip
    loop.step()
    loop.step()
    return loop.step


class _Allocated:
    """What torch's allocator gave out inside the context, less what it took back."""

    def __enter__(self) -> _Allocated:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.events = self.profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in self.events if event.name() == "[memory]")
        total = self.peak = 0
        for _, change in changes:
            total += change
            self.peak = max(self.peak, total)


def _sent(events: Any) -> float:
    """Bytes that rings send for the collective calls.

    gloo makes an all-reduce of the whole of each reduce-scatter, whose event names the parts: it is taken off again.
    """
    ring = WORLD - 1
    calls = {"gloo:all_reduce": 2 * ring / WORLD, "gloo:all_gather": ring, "c10d::_reduce_scatter_base_": -ring}
    return sum(
        calls[event.name()] * math.prod(event.shapes()[0]) * _BYTES[event.dtypes()[0]]
        for event in events
        if event.name() in calls and event.shapes()[0]
    )


# ---------------------------------------------------------------------- all cases


def _measured(case: dict[str, Any], folder: Path) -> dict[str, float]:
    """The larger figures of the processes of a case."""
    found: dict[str, float] = {}
    for figure in ("tensors",) if case.get("quick") else ("tensors", "process"):
        meeting = folder / f"{figure} {sorted(map(str, case.values()))}"
        commands = [
            [sys.executable, __file__, "--case", json.dumps({**case, "figure": figure}), "--rank", str(rank),
             "--meeting", str(meeting)]
            for rank in range(WORLD if case["parallel"] else 1)
        ]  # fmt: skip
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        for one in running:
            out, errors = one.communicate(timeout=600)
            if one.returncode:
                raise SystemExit(f"{case} failed:\n{errors[-1500:]}")
            for key, value in json.loads(out.splitlines()[-1]).items():
                found[key] = max(found.get(key, 0), value)
    return found


def _predicted(case: dict[str, Any]) -> dict[str, float]:
    from transformers import AutoConfig

    from adapterlab.plan import plan
    from adapterlab.plan.child import apart

    across = {"devices": WORLD, "parallel": case["parallel"]} if case["parallel"] else {}
    with apart():
        found = plan(
            AutoConfig.for_model(**_shape(case)), case["method"], batch=BATCH, length=LENGTH, precision="fp32",
            recompute=case["recompute"], device="cpu:64GB", **across,
        )  # fmt: skip
    sent = found.traffic.sent if found.traffic else 0
    return {"tensors": found.peak, "process": found.process, "sent": sent, "moment": found.moment}


def _table(cases: list[dict[str, Any]]) -> str:
    def row(case: dict[str, Any]) -> list[str]:
        measured, predicted = case["measured"], case["predicted"]
        cells = [case["method"], case["parallel"] or "one process", case["recompute"]]
        for figure in ("tensors", "process", "sent"):
            had, said = measured[figure], predicted[figure]
            off = f" ({100 * (said / had - 1):+.1f} %)" if had else ""
            cells.append(f"{said / MIB:,.1f} / {had / MIB:,.1f}{off}" if had or said else "–")
        return cells

    header = ("method", "processes", "recompute", "tensors, MiB", "process, MiB", "sent a step, MiB")
    return (
        f"Predicted / measured, {BATCH} x {LENGTH} tokens in each process, float32, "
        f"{SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}.\n\n"
        + bench.markdown(header, map(row, cases)) + "\n"
    )  # fmt: skip


def _quick() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases():
            if case["method"] in ("lora", "full") and case["recompute"] == "none":
                quick = {**case, "quick": True}
                had, said = _measured(quick, Path(folder)), _predicted(quick)
                numbers = " ".join(f"{key} {said[key] / MIB:.1f} / {had[key] / MIB:.1f}" for key in ("tensors", "sent"))
                print(f"{case['method']}, {case['parallel'] or 'one process'}: {numbers} MiB ({said['moment']})")


def main() -> None:
    """Measure what is not measured, predict, and write the table; or be one process of a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget the cases that are done")
    parser.add_argument("--quick", action="store_true", help="compare a few on a smaller model, and write nothing")
    for name in ("--case", "--rank", "--meeting"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(work(json.loads(given.case), int(given.rank), given.meeting)))
        return
    if given.quick:
        return _quick()
    done = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not given.fresh else {"cases": []}
    kept = {json.dumps({key: one[key] for key in _cases()[0]}): one["measured"] for one in done["cases"]}
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases():
            measured = kept.get(json.dumps(case)) or _measured(case, Path(folder))
            cases.append({**case, "measured": measured, "predicted": _predicted(case)})
            print(_table(cases[-1:]).splitlines()[-1], flush=True)
            bench.write(RESULTS, json.dumps({"conditions": bench.circumstances(), "cases": cases}, indent=1) + "\n")
    bench.write(TABLE, _table(cases))


if __name__ == "__main__":
    main()
