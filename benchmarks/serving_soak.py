"""Random traffic on a server for a long time: nothing may grow, and every answer must stay the right one.

    python benchmarks/serving_soak.py --minutes 60
    python benchmarks/serving_soak.py --quick

One server, over HTTP, with a tiny random model, since this is not about speed: the more requests, the more it shows.
Adapters of all methods that can be served are asked for at random by several clients, with too little memory for all of
them; some requests are streams that are left in the middle, some are nonsense; adapters are registered under new names,
replaced, pinned, warmed and removed meanwhile. Greedy answers are compared with those of `generate`. Every few seconds
memory of the process, tensors, pages, references and threads are noted; at the end all of them must be back.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import http.client
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

STEADY = ("rss", "tensors", "tensor_bytes", "pages_used", "loaded", "threads", "files")
LIMIT = 1.05  # of the last quarter to the second one; what is less than a mebibyte or a handful of things is noise
NOISE = {"rss": 8 << 20, "tensor_bytes": 1 << 20}
SUPPORT = bench.ROOT / "docs" / "support.json"
ACTIONS = {"answer": 10, "stream": 3, "leave": 3, "nonsense": 2, "unknown": 1, "replace": 1, "fresh": 1, "pin": 1}
FREELY = (200, 404, 429)  # of adapters that come and go, and of a queue that is full


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--adapters", type=int, default=40, help="of different methods")


def plan(args: argparse.Namespace) -> list[Job]:
    minutes, adapters = (0.4, 12) if args.quick else (args.minutes, args.adapters)
    return [Job("soak", "adapterlab", 0, {"minutes": minutes, "clients": args.clients, "adapters": adapters})]


def work(job: dict[str, Any]) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        wanted, model = _saved(Path(folder), job["adapters"])
        with _server(Path(folder), model) as (service, port):
            soak = Soak(port, wanted, Path(folder))
            timeline = soak.run(service, job["minutes"] * 60, job["clients"])
            engine = service.engine
        worker = engine._worker
        left = {"held": worker.pages.held, "paid": worker.pages.paid, "on_model": len(_carried(engine.model))}
    return {"timeline": timeline, "done": dict(soak.done), "faults": soak.faults[:20], "left": left}


def _carried(model: Any) -> list[str]:
    from adapterlab import host

    found = host(model)
    return list(found.methods) if found else []


def _saved(root: Path, count: int) -> tuple[dict[str | None, list[str]], Any]:
    """Adapters of as many methods, and the texts of the tokens that each says by itself."""
    from adapterlab import registry
    from adapterlab.testing import Case
    from adapterlab.testing.serving import saved

    rows = json.loads(SUPPORT.read_text(encoding="utf-8"))["methods"]
    served = [id for id in registry.ids() if rows[id]["features"]["served"]["status"] == "passed"]
    chosen = random.Random(bench.SEED).sample(served, min(count, len(served)))
    wanted: dict[str | None, list[str]] = {}
    for id in chosen:
        for name, said in saved(Case(registry.method(id)), root, id).items():
            wanted[name] = [f"t{token}" for token in said.ids]
    return wanted, Case(registry.method(chosen[0])).model()


@contextlib.contextmanager
def _server(root: Path, model: Any) -> Iterator[tuple[Any, int]]:
    """A server of the adapters in a folder, in threads of this process."""
    import uvicorn

    from adapterlab.serve import Engine, EngineSettings
    from adapterlab.serve.http.app import build
    from adapterlab.serve.http.grammar import Grammars
    from adapterlab.serve.http.server import listener
    from adapterlab.serve.http.service import Service
    from adapterlab.serve.http.shelf import Shelf

    tokenizer = _tokenizer(model.config.vocab_size)
    settings = EngineSettings(
        page_tokens=4, max_running=8, step_tokens=48, max_waiting=64, max_adapters=6, memory_gb=0.0008, patience=0.2
    )
    service = Service(
        lambda: Engine(model, tokenizer, settings), tokenizer, base="base", shelf=Shelf(root), window=64,
        grammars=Grammars(tokenizer, len(tokenizer), [2]),
    )  # fmt: skip
    service.register_found()
    listening = listener("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build(service), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield service, listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def _tokenizer(size: int) -> Any:
    """Words t0, t1, ... for the tokens of the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t2", unk_token="t3")


class Soak:
    """Clients and what came of them.

    Attributes:
        done: how often each thing was done.
        faults: what should not have happened.
    """

    def __init__(self, port: int, wanted: dict[str | None, list[str]], root: Path):
        self.port, self.wanted, self.root = port, wanted, root
        self.names = [name for name in wanted if name is not None]
        self.done: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._numbers = itertools.count()

    def run(self, service: Any, seconds: float, clients: int) -> list[dict[str, float]]:
        """Put the load on the server; return what was there over time."""
        begun, engine = time.monotonic(), service.engine
        over = threading.Event()
        threads = [threading.Thread(target=self._client, args=(i, over)) for i in range(clients)]
        for thread in threads:
            thread.start()
        timeline = []
        while (now := time.monotonic() - begun) < seconds and len(self.faults) < 20:
            timeline.append({"at": now, **_noted(service), "requests": sum(self.done.values())})
            time.sleep(max(0.5, seconds / 200))
        over.set()
        for thread in threads:
            thread.join()
        self._expect(service.engine is engine, "the engine failed and was started again")
        return timeline

    def _client(self, seed: int, over: threading.Event) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            action = draw.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            try:
                getattr(self, f"_{action}")(draw)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.faults.append(f"{action}: {type(error).__name__}: {error}")
            self.done[action] += 1

    def _answer(self, draw: random.Random) -> None:
        """A greedy answer, which must be the known one."""
        name = draw.choice([None, *self.names])
        status, found = self._send("POST", "/v1/completions", _asking(name))
        if status == 429:
            return
        tokens = found["choices"][0]["logprobs"]["tokens"] if status == 200 else found
        self._expect(tokens == self.wanted[name], f"{name}: {status}: {tokens} and not {self.wanted[name]}")

    def _stream(self, draw: random.Random) -> None:
        """A sampled answer in pieces, of several choices."""
        body = {**_asking(draw.choice(self.names)), "stream": True, "n": draw.randint(1, 3), "temperature": 1.0}
        status, found = self._send("POST", "/v1/completions", body, plain=True)
        self._expect(status == 429 or (status == 200 and "[DONE]" in found), f"stream: {status}: {found[-200:]}")

    def _leave(self, draw: random.Random) -> None:
        """A stream that is left in the middle, or before it begins."""
        body = {**_asking(draw.choice(self.names)), "stream": True, "n": 4, "max_tokens": 40}
        connection = self._connected("POST", "/v1/completions", body)
        if draw.random() < 0.7:
            connection.getresponse().read(draw.randrange(1, 400))
        connection.close()

    def _nonsense(self, draw: random.Random) -> None:
        """Something that no server should understand."""
        key = draw.choice(("prompt", "n", "stop", "model", "x"))
        texts = () if key in ("prompt", "stop") else ("\0",)  # as text to go on with, or to end at, it is understood
        body = {**_asking("base"), key: draw.choice(({}, -1, [[]], *texts))}
        status, found = self._send("POST", draw.choice(("/v1/completions", "/generate", "/v1/adapters")), body)
        self._expect(400 <= status < 500, f"nonsense: {status}: {found}")

    def _unknown(self, draw: random.Random) -> None:
        status, found = self._send("POST", "/v1/completions", _asking("nowhere"))
        self._expect(status == 404, f"unknown: {status}: {found}")

    def _replace(self, draw: random.Random) -> None:
        """Another version of an adapter, with the same values: what runs keeps the one before."""
        name = draw.choice(self.names)
        status, found = self._send("PUT", f"/v1/adapters/{name}", {"path": name, "warm": draw.random() < 0.5})
        self._expect(status in FREELY, f"replace: {status}: {found}")

    def _fresh(self, draw: random.Random) -> None:
        """An adapter under a name that was never there, asked for, and removed while others ask for it."""
        path = draw.choice(self.names)
        name = f"new/{next(self._numbers)}"
        said = [self._send("PUT", f"/v1/adapters/{name}", {"path": path})]
        status, found = self._send("POST", "/v1/completions", _asking(name))
        if status == 200:
            tokens = found["choices"][0]["logprobs"]["tokens"]
            self._expect(tokens == self.wanted[path], f"{name} of {path}: {tokens} and not {self.wanted[path]}")
        with contextlib.closing(self._connected("POST", "/v1/completions", _asking(name))):
            said.append(self._send("DELETE", f"/v1/adapters/{name}", None))
        self._expect(all(status in FREELY for status, _ in [*said, (status, found)]), f"fresh: {said} {found}")

    def _pin(self, draw: random.Random) -> None:
        """An adapter that stays for a moment."""
        name = draw.choice(self.names)
        for pinned in (True, False):
            status, found = self._send("PUT", f"/v1/adapters/{name}", {"pinned": pinned})
            self._expect(status in FREELY, f"pin: {status}: {found}")

    def _expect(self, fine: bool, what: str) -> None:
        if not fine:
            self.faults.append(what[:300])

    def _connected(self, method: str, path: str, body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def _send(self, method: str, path: str, body: Any, *, plain: bool = False) -> tuple[int, Any]:
        with contextlib.closing(self._connected(method, path, body)) as connection:
            response = connection.getresponse()
            text = response.read().decode()
        return response.status, text if plain else json.loads(text)


def _asking(name: str | None) -> dict[str, Any]:
    from adapterlab.testing.serving import PROMPT

    return {"model": name or "base", "prompt": list(PROMPT), "max_tokens": 6, "temperature": 0, "ignore_eos": True,
            "logprobs": 0}  # fmt: skip


def _noted(service: Any) -> dict[str, float]:
    """What the process and the engine hold now."""
    import psutil
    import torch

    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    found, process = service.engine.statistics(), psutil.Process()
    return {
        "rss": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds(),
        "tensors": len(tensors), "tensor_bytes": sum(one.untyped_storage().nbytes() for one in tensors),
        "pages_used": found.pages_used, "pages_cached": found.pages_cached, "running": found.running,
        "waiting": found.waiting, "loaded": found.adapters_loaded, "registered": found.adapters_registered,
        "loads": found.loads, "unloads": found.unloads, "preempted": found.preempted, "tokens": found.tokens_out,
    }  # fmt: skip


def growth(timeline: list[dict[str, float]], what: str) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = max(1, len(timeline) // 4)
    parts = timeline[quarter : 2 * quarter], timeline[-quarter:]
    return tuple(statistics.median(one[what] for one in part) for part in parts)  # type: ignore[return-value]


def check(done: list[tuple[Job, Figures]]) -> None:
    for _, figures in done:
        if figures["faults"]:
            raise SystemExit("The server went wrong:\n  " + "\n  ".join(figures["faults"]))
        if any(figures["left"].values()):
            raise SystemExit(f"Something is left at the end: {figures['left']}.")
        for what in STEADY:
            before, after = growth(figures["timeline"], what)
            if after > LIMIT * before + NOISE.get(what, 10):
                raise SystemExit(f"{what} grows: {before:,.0f} in the second quarter, {after:,.0f} in the last.")


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    ((job, figures),) = done
    timeline, last = figures["timeline"], figures["timeline"][-1]
    summary = {
        "minutes": job.settings["minutes"], "requests": sum(figures["done"].values()), "done": figures["done"],
        **{key: last[key] for key in ("tokens", "loads", "unloads", "preempted")},
        "growth": {what: growth(timeline, what) for what in STEADY},
    }  # fmt: skip
    picture(timeline, file.with_suffix(".png"))
    rows = [[what, *(_shown(what, value) for value in summary["growth"][what])] for what in STEADY]
    counts = ", ".join(f"{count:,} x {action}" for action, count in sorted(figures["done"].items()))
    table = bench.markdown(["median", "second quarter", "last quarter"], rows)
    rest = f"{summary['loads']:,} adapters loaded, {summary['unloads']:,} made room, {summary['preempted']:,} answers"
    return summary, f"{counts}; {summary['tokens']:,} tokens; {rest} gave way.\n\n{table}"


def _shown(what: str, value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if what in ("rss", "tensor_bytes") else f"{value:,.0f}"


def picture(timeline: list[dict[str, float]], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is missing (pip install matplotlib).")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 5), sharex=True)
    minutes = [one["at"] / 60 for one in timeline]
    drawn = (("rss",), ("tensor_bytes",), ("pages_used", "pages_cached"), ("loaded", "running", "waiting"))
    for panel, names in zip(panels.flat, drawn, strict=True):
        for name in names:
            scale = 2**20 if name in ("rss", "tensor_bytes") else 1
            panel.plot(minutes, [one[name] / scale for one in timeline], lw=1, label=name.replace("_", " "))
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    for panel in panels[1]:
        panel.set_xlabel("minutes")
    for panel in panels[0]:
        panel.set_ylabel("MiB")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, check=check, peers=False)
