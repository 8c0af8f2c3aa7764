"""Serving 10^4 adapters over 8 replicas on paper: who should answer, what is found loaded, where the time goes.

    python benchmarks/serving_simulator.py [--requests N] [--seed N]

Nothing is computed by a model here. Requests come at random times (Poisson) for adapters that are asked for as Zipf
has it; each replica works as the engine does: steps of one token for each answer and a piece of a prompt, adapters
loaded between steps (which all wait for), the one used longest ago unloaded. Three ways of choosing a replica are
compared:

- random;
- least loaded: the one with fewest requests;
- hashed: the one that a consistent hash of the adapter's name says, or the next on the ring that has room, where none
  may have more than 1.25 times the mean number of requests (Consistent Hashing with Bounded Loads, arXiv:1608.01350).

Bytes come from `adapterlab plan --serve`, speeds from datasheets: NVIDIA H100 SXM5 (989.4 TFLOP/s dense bf16, 3.35 TB/s
memory, PCIe 5.0 x16 with 63 GB/s a direction), Samsung PM9A3 (NVMe, 6.8 GB/s). What is reached of them is stated below.
The same seed gives the same figures; all takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _bench as bench
import numpy as np

RESULTS = bench.RESULTS / "serving_simulator.json"
REPLICAS, ADAPTERS = 8, 10_000
MODEL, METHOD = "llama3.1-8b", {"name": "lora", "r": 16}
POLICIES = ("random", "least loaded", "hashed")
BOUND, POINTS = 1.25, 100  # most requests of a replica against the mean; places of each replica on the ring
WARM = 1 / 3  # of the requests, which do not count: caches begin empty
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A replica.

    Attributes:
        adapter: bytes of an adapter; base: of the weights; per_token: operations of a token of a prompt.
        room: bytes of the device for loaded adapters; host: bytes of the machine's memory for files that were read.
        memory, link, disk: bytes a second that are reached; peak: operations a second that are reached.
        attach: seconds that taking an adapter over takes beside moving its bytes: into the table of products, as
            measured on a CPU for as many modules.
        running: answers at a time; step_tokens: tokens of a step.
    """

    adapter: int
    base: int
    per_token: float
    room: float = 24 * GB
    host: float = 64 * GB
    memory: float = 0.6 * 3350 * GB
    link: float = 0.8 * 63 * GB
    disk: float = 0.8 * 6.8 * GB
    peak: float = 0.4 * 989.4e12
    attach: float = 0.01
    running: int = 64
    step_tokens: int = 1024

    def step(self, prompt: int, adapters: int) -> float:
        """Seconds of a step: weights are read once, each adapter's once, and the tokens of prompts are computed."""
        read = (self.base + adapters * self.adapter) / self.memory
        return max(read, prompt * self.per_token / self.peak + read / 4)


@dataclass(frozen=True)
class Load:
    """What is asked for: requests a second over all replicas, and the skew of Zipf's law."""

    rate: float = 100.0
    skew: float = 1.0


@dataclass
class Request:
    """A request, and what became of it; times in seconds."""

    at: float
    adapter: int
    prompt: int
    answer: int
    begun: float = 0.0
    loading: float = 0.0
    first: float = 0.0
    found: str = "device"
    left: int = 0  # tokens of the prompt that are still to be computed


@dataclass
class Replica:
    """One machine, simulated step by step."""

    machine: Machine
    clock: float = 0.0
    steps: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    reading: deque[Request] = field(default_factory=deque)  # whose prompts are computed
    ends: list[tuple[int, int]] = field(default_factory=list)  # answers by the step after which they end
    using: Counter[int] = field(default_factory=Counter)
    loaded: OrderedDict[int, None] = field(default_factory=OrderedDict)
    read: OrderedDict[int, None] = field(default_factory=OrderedDict)
    spent: Counter[str] = field(default_factory=Counter)

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.waiting) + len(self.reading) + len(self.ends)

    def advance(self, until: float) -> None:
        """Work until a time, or until nothing is left."""
        while self.clock < until:
            if not self.load:
                self.clock = until
                return
            self._admit()
            self._step()

    def _admit(self) -> None:
        """Let what waits begin, with its adapter; loading stops everything else."""
        while self.waiting and len(self.reading) + len(self.ends) < self.machine.running:
            request = self.waiting.popleft()
            request.begun = self.clock
            request.loading = self._load(request)
            self.clock += request.loading
            self.spent["loading"] += request.loading
            request.left = request.prompt
            self.using[request.adapter] += 1
            self.reading.append(request)

    def _load(self, request: Request) -> float:
        """Seconds until the adapter of a request is on the device."""
        adapter, machine = request.adapter, self.machine
        if adapter in self.loaded:
            self.loaded.move_to_end(adapter)
            return 0.0
        request.found = "host" if adapter in self.read else "disk"
        self.read[adapter] = None
        self.read.move_to_end(adapter)
        if len(self.read) > machine.host // machine.adapter:
            self.read.popitem(last=False)
        if len(self.loaded) >= machine.room // machine.adapter:
            idle = next((one for one in self.loaded if not self.using[one]), None)
            if idle is not None:
                del self.loaded[idle]
        self.loaded[adapter] = None
        moved = machine.adapter / machine.link
        return machine.attach + moved + (machine.adapter / machine.disk if request.found == "disk" else 0.0)

    def _step(self) -> None:
        room, done = self.machine.step_tokens - len(self.ends), []
        prompt = 0
        while self.reading and prompt < room:
            request = self.reading[0]
            piece = min(room - prompt, request.left)
            prompt, request.left = prompt + piece, request.left - piece
            if request.left:
                break
            done.append(self.reading.popleft())
        seconds = self.machine.step(prompt, len(self.using))
        self.clock, self.steps = self.clock + seconds, self.steps + 1
        self.spent["steps"] += seconds
        for request in done:
            request.first = self.clock
            heapq.heappush(self.ends, (self.steps + request.answer - 1, request.adapter))
        while self.ends and self.ends[0][0] <= self.steps:
            _, adapter = heapq.heappop(self.ends)
            self.using[adapter] -= 1
            if not self.using[adapter]:
                del self.using[adapter]


# ---------------------------------------------------------------------- who answers


class Ring:
    """Places of the replicas on a circle of hashes."""

    def __init__(self) -> None:
        self.places = sorted((_hash(f"replica {i}, {j}"), i) for i in range(REPLICAS) for j in range(POINTS))
        self.hashes = [place for place, _ in self.places]

    def choose(self, adapter: int, loads: Sequence[int]) -> int:
        """The first replica from the adapter's place on that is not too full."""
        most = BOUND * (sum(loads) + 1) / REPLICAS
        start = bisect.bisect(self.hashes, _hash(f"adapter {adapter}"))
        order = (self.places[(start + i) % len(self.places)][1] for i in range(len(self.places)))
        return next(i for i in order if loads[i] < most)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _chooser(policy: str, draw: np.random.Generator) -> Callable[[int, Sequence[int]], int]:
    if policy == "random":
        return lambda adapter, loads: int(draw.integers(REPLICAS))
    if policy == "least loaded":
        return lambda adapter, loads: min(range(REPLICAS), key=lambda i: (loads[i], draw.random()))
    return Ring().choose


# ---------------------------------------------------------------------- one run


def requests(load: Load, count: int, seed: int) -> list[Request]:
    """Draw requests: times, adapters, and tokens of prompts (median 512) and answers (mean 128)."""
    draw = np.random.default_rng([seed, round(1000 * load.skew)])
    shares = 1 / np.arange(1, ADAPTERS + 1) ** load.skew
    times = np.cumsum(draw.exponential(1, count)) / load.rate
    which = draw.choice(ADAPTERS, count, p=shares / shares.sum())
    prompts = np.clip(draw.lognormal(np.log(512), 0.6, count), 16, 4096).astype(int)
    answers = 1 + draw.geometric(1 / 127, count)
    columns = (column.tolist() for column in (times, which, prompts, answers))
    return [Request(*one) for one in zip(*columns, strict=True)]


def simulate(machine: Machine, load: Load, policy: str, count: int, seed: int) -> dict[str, Any]:
    """Serve some requests."""
    asked = requests(load, count, seed)
    replicas = [Replica(machine) for _ in range(REPLICAS)]
    choose = _chooser(policy, np.random.default_rng([seed, 1]))
    for request in asked:
        for replica in replicas:
            replica.advance(request.at)
        chosen = choose(request.adapter, [replica.load for replica in replicas])
        replicas[chosen].waiting.append(request)
    for replica in replicas:
        replica.advance(float("inf"))
    return _summary(asked[round(WARM * count) :], replicas)


def _summary(asked: Sequence[Request], replicas: Sequence[Replica]) -> dict[str, Any]:
    first = np.array([r.first - r.at for r in asked])
    waited, loading = (np.array(v) for v in ([r.begun - r.at for r in asked], [r.loading for r in asked]))
    found = Counter(r.found for r in asked)
    spent = sum((replica.spent for replica in replicas), Counter())
    half = len(asked) // 2
    return {
        "p50": float(np.quantile(first, 0.5)), "p95": float(np.quantile(first, 0.95)), "mean": float(first.mean()),
        "waiting": float(waited.mean()), "loading": float(loading.mean()),
        "reading": float((first - waited - loading).mean()),
        "found": {where: found[where] / len(asked) for where in ("device", "host", "disk")},
        "loading_share": spent["loading"] / sum(spent.values()),
        "falls_behind": bool(waited[half:].mean() > 1.3 * waited[:half].mean() + 0.5),
    }  # fmt: skip


# ---------------------------------------------------------------------- all runs


def scenarios(machine: Machine) -> dict[str, tuple[Machine, Load]]:
    """What is varied around the middle one."""
    middle = Load()
    found = {f"{rate:g} a second": (machine, Load(rate=rate)) for rate in (25, 50, 75, 100)}
    found |= {f"skew {skew:g}": (machine, replace(middle, rate=50, skew=skew)) for skew in (0.8, 1.2)}
    found["put on the model in 0.1 s"] = (replace(machine, attach=0.1), Load(rate=50))
    found["half the bytes (bf16)"] = (replace(machine, adapter=machine.adapter // 2), Load(rate=50))
    return found


def planned() -> dict[str, float]:
    """Bytes of an adapter and of the base, from the planner, and operations of a token."""
    from adapterlab.plan import plan_serving

    found = plan_serving(MODEL, METHOD, length=1024, device="h100")
    return {"adapter": found.adapter, "base": found.base, "per_token": 2 * found.base / 2}


def _table(found: dict[str, dict[str, Any]]) -> str:
    header = (
        "traffic", "choice", "loaded already", "in host memory", "from disk", "first token p50, s", "p95, s",
        "waiting, s", "loading, s", "reading the prompt, s", "replicas' time spent loading",
    )  # fmt: skip
    rows = []
    for name, by_policy in found.items():
        for policy, one in by_policy.items():
            shares = [f"{100 * one['found'][where]:.0f} %" for where in ("device", "host", "disk")]
            times = [f"{one[key]:.2f}" for key in ("p50", "p95", "waiting", "loading", "reading")]
            if one["falls_behind"]:
                times = ["falls behind", *["–"] * 4]
            rows.append([name, policy, *shares, *times, f"{100 * one['loading_share']:.0f} %"])
    return bench.markdown(header, rows)


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw the first token's 95 % quantile and what was loaded already, by rate."""
    from matplotlib.figure import Figure

    rates = [name for name in found if name.endswith("a second")]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy, mark in zip(POLICIES, ("o", "s", "^"), strict=True):
        x = [float(name.split()[0]) for name in rates]
        left.plot(x, [1000 * found[name][policy]["p95"] for name in rates], f"-{mark}", label=policy)
        right.plot(x, [100 * found[name][policy]["found"]["device"] for name in rates], f"-{mark}", label=policy)
    left.set(xlabel="requests a second", ylabel="first token, p95 (ms)")
    left.set_ylim(bottom=0)
    right.set(xlabel="requests a second", ylabel="adapter loaded already (%)", ylim=(0, 100))
    left.legend()
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": "adapterlab"})


def main() -> None:
    """Simulate all scenarios and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="of each run; the first third does not count")
    parser.add_argument("--seed", type=int, default=bench.SEED)
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    facts = kept.get("planned") or planned()
    machine = Machine(adapter=int(facts["adapter"]), base=int(facts["base"]), per_token=facts["per_token"])
    found: dict[str, dict[str, Any]] = {}
    for name, (one, load) in scenarios(machine).items():
        found[name] = {policy: simulate(one, load, policy, given.requests, given.seed) for policy in POLICIES}
        print(name, {policy: round(found[name][policy]["p95"], 2) for policy in POLICIES}, flush=True)
    done = {
        "conditions": bench.circumstances(), "planned": facts, "machine": machine.__dict__,
        "settings": {"replicas": REPLICAS, "adapters": ADAPTERS, "requests": given.requests, "seed": given.seed},
        "found": found,
    }  # fmt: skip
    bench.write(RESULTS, json.dumps(done, indent=1) + "\n")
    bench.write(RESULTS.with_suffix(".md"), _table(found) + "\n")
    draw(found, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
