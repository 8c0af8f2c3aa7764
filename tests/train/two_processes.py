"""Trainings over two processes that are interrupted, killed, and given different things. Used by test_two_processes.

    python two_processes.py ROOT

The parent computes nothing with torch, so that ranks can be forked from it instead of importing everything again. It
prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers.models.llama.modeling_llama  # noqa: F401

from adapterlab import cli
from adapterlab.evaluate import filling, prepared
from adapterlab.train import run, watch
from adapterlab.train.loop import Listener, Loop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_runs import make_config, write_data

ROOT = Path(sys.argv[1])
Trouble = Callable[[int], Sequence[Any]]
NOTHING: Mapping[int, Sequence[str]] = {}


class At(Listener):
    """Does something when a rank has done a step."""

    def __init__(self, step: int, action: Callable[[], Any]):
        self.step, self.action = step, action

    def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
        if loop.status.step == self.step:
            self.action()


def prepare() -> None:
    """Many rows begin at ten, and nothing encodes beside."""
    os.environ.update(ADAPTERLAB_HOME=str(ROOT / "home"), OMP_NUM_THREADS="1")
    datasets.config.HF_DATASETS_CACHE = ROOT / "cache"
    for module in ("data.sources", "data.splits", "evaluate.rows"):
        sys.modules[f"adapterlab.{module}"].FEW = 10  # type: ignore[attr-defined]
    sys.modules["adapterlab.data.sources"].HELD = 0  # type: ignore[attr-defined]
    prepared.SIZE = 8
    prepared.helpers = filling.helpers = lambda: 0  # type: ignore[attr-defined,assignment]


def configuration(output: str, data: Any, **training: Any) -> Path:
    """Write the configuration of a run; without dropout, so that one process and two compute the same."""
    method = {"name": "lora", "r": 2, "dropout": training.pop("dropout", 0.0), "targets": ["q", "down"]}
    fields = make_config(ROOT, **{"steps": 6, "eval_every": 3, "save_every": 2, **training})
    file = ROOT / f"{output}.yaml"
    file.write_text(json.dumps({**fields, "method": method, "data": data, "output": str(ROOT / output)}))
    return file


def ranks(
    world: int, words: Sequence[str], trouble: Trouble = lambda rank: (), own: Mapping[int, Sequence[str]] = NOTHING
) -> dict[str, Any]:
    """Run the command line in processes, and return how they ended, what they said, and how long it took.

    Args:
        world: how many.
        words: of the command line.
        trouble: what happens to a rank, by its number.
        own: words that a rank has beside.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    children: list[int] = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            if world > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({key: str(value) for key, value in place.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(one(rank, [*words, *own.get(rank, ())], trouble))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [(ROOT / f"said-{rank}").read_text() for rank in range(world)]
    return {"codes": codes, "said": said, "seconds": time.monotonic() - began}


def one(rank: int, words: Sequence[str], trouble: Trouble) -> int:
    """Be a rank."""
    with (ROOT / f"said-{rank}").open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    listeners = [*trouble(rank)]
    fit, batch, rows = run.fit, Loop.batch, []

    def recording(self: Loop, indices: Sequence[int]) -> Any:
        rows.append([self.status.step, [int(i) for i in indices]])
        return batch(self, indices)

    def with_trouble(*args: Any, callbacks: Sequence[Listener], **options: Any) -> Any:
        return fit(*args, callbacks=[*callbacks, *listeners], **options)

    Loop.batch = recording  # type: ignore[method-assign]
    sys.modules["adapterlab.train"].fit = with_trouble  # type: ignore[attr-defined]
    try:
        cli.main([*words])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        (ROOT / f"rows-{rank}.json").write_text(json.dumps(rows))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def seen(world: int) -> list[Any]:
    """Step and rows of all batches of the last run, of each rank."""
    return [json.loads((ROOT / f"rows-{rank}.json").read_text()) for rank in range(world)]


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def boom() -> None:
    raise ValueError("boom")


def hang() -> None:
    time.sleep(60)


def on(rank: int, step: int, action: Callable[[], Any]) -> Trouble:
    """A rank does something after a step."""
    return lambda own: [At(step, action)] if own == rank else []


def other_rows(rank: int) -> Sequence[Any]:
    """Rank 1 finds other rows in a file of the same name."""
    if rank == 1:
        load = run.load_data
        run.load_data = lambda cfg, *rest: load(cfg.model_copy(update={"limit": 30}), *rest)  # type: ignore[attr-defined]
    return []


def stuck(rank: int) -> Sequence[Any]:
    """Rank 1 waits for ever, as inside a collective of a GPU, when rank 0 dies."""
    watch._GRACE = 0.5
    return [At(1, kill if rank == 0 else hang)]


def main() -> dict[str, Any]:
    prepare()
    write_data(ROOT / "more.jsonl", 24, seed=1)
    joined = [{"path": str(ROOT / "rows.jsonl"), "eval_size": 6}, {"path": str(ROOT / "more.jsonl"), "eval_size": 4}]
    stream = {"path": str(ROOT / "rows.jsonl"), "eval_size": 4, "streaming": True, "window": 16}
    whole = {"group_by_length": True, "steps": None, "epochs": 1}  # each rank encodes all rows, at the same time
    short = {"accumulation": 1, "dropout": 0.2, "steps": 4, "eval_every": 2}
    found: dict[str, Any] = {}

    def go(name: str, world: int, file: Path, *words: str, **options: Any) -> None:
        found[name] = {**ranks(world, ["train", str(file), *words], **options), "rows": []}
        if all(code >= 0 for code in found[name]["codes"]):
            found[name]["rows"] = seen(world)

    go("alone", 1, configuration("alone", joined, accumulation=2, **whole))
    go("pair", 2, configuration("pair", joined, accumulation=1, **whole))
    go("stream", 2, configuration("stream", stream, **short))
    stopped = configuration("stopped", stream, **short)
    go("stopped", 2, stopped, trouble=on(1, 2, lambda: kill(signal.SIGTERM)))
    go("killed", 2, stopped, "--resume", trouble=on(1, 3, kill))
    go("continued", 2, stopped, "--resume")
    trouble = configuration("trouble", joined, accumulation=1, **whole)
    go("first killed", 2, trouble, trouble=stuck)
    go("raised", 2, trouble, "--overwrite", trouble=on(1, 1, boom))
    go("other rows", 2, trouble, "--overwrite", trouble=other_rows)
    go("other settings", 2, trouble, "--overwrite", own={1: ["training.lr=0.02", "method.r=3"]})
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
