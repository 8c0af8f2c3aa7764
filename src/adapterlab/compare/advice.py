"""Settings to start from before anything has run, each from a stated rule with its source.

Together those of the method and its rate are the recipe of LoRA Without Regret: they belong together, because its rate
holds for its scale.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from adapterlab.compare.results import FILE, UNTRAINED, Comparison, load
from adapterlab.data import DataConfig, Example, load_data
from adapterlab.data.turns import texts_in
from adapterlab.errors import AdapterlabError, ConfigError, DataError
from adapterlab.plan import Plan, plan

_SPEAKS = 4  # times as large as the model that something was measured on, from which it says nothing any more
_DEEP = 4  # folders below the given one in which comparisons are looked for
_LETTERS = 4.0  # characters of English a token stands for, where there is no tokenizer to ask
_LONGEST = 1 << 16  # tokens of the longest row that is planned for
_SAMPLE = 300  # rows whose length is looked at
_ENOUGH = 4  # rows at once below which a step wastes the device, so that saving memory otherwise comes first

LORA = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
PACKED = "QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314"
LESS = "LoRA Learns Less and Forgets Less, arXiv 2405.09673"
REGRET = "LoRA Without Regret, Thinking Machines Lab 2025, doi 10.64434/tml.20250929"
REPEATED = "Scaling Data-Constrained Language Models, arXiv 2305.16264"
RECOMPUTE = "Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174"
PLANNER = "the memory planner (adapterlab plan)"

# (below this many, value): the first line that fits is taken
_RANKS = ((1_000, 8), (10_000, 16), (50_000, 32), (200_000, 64), (float("inf"), 128))
_EPOCHS = ((2_000, 4), (20_000, 3), (100_000, 2), (float("inf"), 1))
_FULL_RATES = ((1e9, 5e-5), (20e9, 2e-5), (float("inf"), 1e-5))
_LONG_ANSWER = 200  # tokens of an answer from which a task counts as a harder one
_MOST_RANK = 256
_ALPHA = 32.0
_SHORT = 100  # steps below which a rate of fifteen times that of full tuning does better than ten times


@dataclass(frozen=True)
class Rule:
    """One setting.

    Attributes:
        key: dotted, as in a training configuration.
        value: advised.
        why: the rule with the figures that went into it.
        source: where the rule comes from.
        tested: the field's rules that bear on it, with what our own comparisons say of them.
    """

    key: str
    value: Any
    why: str
    source: str
    tested: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What rules look at.

    Attributes:
        rows: training rows.
        length: mean tokens of a row; longest: of the longest looked at; answer: mean of an answer.
        estimated: whether tokens were estimated from characters.
        parameters: of the model; each_rank: of a LoRA of rank 1 on all of its linear layers.
        memory: bytes that may be used, or None.
    """

    rows: int
    length: int
    longest: int
    answer: int
    estimated: bool
    parameters: int
    each_rank: int
    memory: int | None


@dataclass(frozen=True)
class Advice:
    """Settings with their reasons.

    Attributes:
        model: name.
        data: as a configuration has it.
        facts: that the rules looked at.
        rules: one for each setting.
        plan: what the planner says of them; None when it could not be asked.
        past: sentences on comparisons that were found.
        tested: the figures behind what our own comparisons say of the field's rules on these settings.
    """

    model: str
    data: dict[str, Any]
    facts: Facts
    rules: list[Rule]
    plan: Plan | None
    past: list[str]
    tested: list[str]

    def config(self) -> dict[str, Any]:
        """Return a training configuration with these settings."""
        tree: dict[str, Any] = {"model": self.model, "data": self.data}
        for rule in self.rules:
            group, _, key = rule.key.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[key] = rule.value
        return tree


def advise(
    model: str,
    data: DataConfig,
    *,
    memory: int | None = None,
    folder: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Advice:
    """Advise settings for a model and data.

    Args:
        model: a known shape, catalogue alias, local folder or hub id; its weights are not needed.
        data: the rows.
        memory: bytes that may be used; None for those of this machine's fastest device.
        folder: where comparisons of the past are looked for; None looks nowhere.
        trust_remote_code: run the code that the model's folder brings.

    Raises:
        ModelError: the model is unknown.
        DataError: there are no rows.
        ConfigError: nothing fits into the memory.
    """
    method = {"name": "lora", "r": 1, "alpha": _ALPHA}
    probe = plan(model, method, batch=1, length=64, device=_device(memory), trust_remote_code=trust_remote_code)
    facts = _facts(model, data, probe, trust_remote_code)
    rank, epochs = _rank(facts), _epochs(facts)
    rules = [
        Rule("method.name", "lora", "the method to beat: cheap, merged at no cost, known to reach full tuning", REGRET),
        rank,
        Rule(
            "method.alpha",
            _ALPHA,
            "the same for all ranks: with alpha / r the best rate hardly depends on them",
            REGRET,
        ),
        Rule("method.targets", "all-linear", "attention alone does worse, even with as many parameters", REGRET),
        _rate(facts, epochs.value),
        epochs,
    ]
    fitting, chosen = _fit(model, facts, rank.value, trust_remote_code)
    past, better = _past(model, data, Path(folder)) if folder is not None else ([], [])
    replaced = {rule.key for rule in better}
    if "method.name" in replaced:  # settings of another method mean nothing to this one
        rules = [rule for rule in rules if not rule.key.startswith("method.")]
    known = _evidence()
    rules = [_with_tests(rule, known) for rule in [*rules, *fitting] if rule.key not in replaced] + better
    given = data.model_dump(mode="json", exclude_defaults=True)
    return Advice(model, given, facts, rules, chosen, past, _figures(rules, known, facts))


def _device(memory: int | None) -> str | None:
    return None if memory is None else f"cuda:{memory / 2**30:.6g}GB"


def _facts(model: str, data: DataConfig, probe: Plan, trusted: bool) -> Facts:
    if data.streaming:
        raise ConfigError(
            "Advice depends on how many rows there are, and of a stream nobody knows. Set data.limit instead."
        )
    examples = load_data(data).train
    count = _counter(model, trusted)
    shown = examples[:: max(1, len(examples) // _SAMPLE)]
    texts = [(_text(e), "\n".join(texts_in(e.messages[-1])) if e.messages else "") for e in shown]
    if not texts:
        raise DataError("There are no rows to advise on. Check data.path and data.limit.")
    length = count or (lambda text: round(len(text) / _LETTERS) + 1)
    lengths, answers = [length(whole) for whole, _ in texts], [length(answer) for _, answer in texts]
    return Facts(
        rows=len(examples),
        length=round(statistics.fmean(lengths)),
        longest=max(lengths),
        answer=round(statistics.fmean(answers)),
        estimated=count is None,
        parameters=probe.base // 2,  # planned in bf16
        each_rank=probe.trainable,
        memory=probe.limit,
    )


def _text(example: Example) -> str:
    return example.text or "\n".join(texts_in(example.messages or ()))


def _counter(model: str, trusted: bool) -> Callable[[str], int] | None:
    """A function that counts tokens; None where the model's tokenizer is not on this machine."""
    from adapterlab.foreign.pretrained import read_config, read_tokenizer
    from adapterlab.models import resolve

    try:
        folder = resolve(model)
        config = read_config(folder, trust_remote_code=trusted)
        tokenizer = read_tokenizer(folder, config, trust_remote_code=trusted)
    except (AdapterlabError, OSError, ValueError):
        return None
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])


def _below(table: tuple[tuple[float, Any], ...], number: float) -> Any:
    return next(value for limit, value in table if number < limit)


def _rank(facts: Facts) -> Rule:
    rank = _below(_RANKS, facts.rows)
    why = f"{facts.rows:,} rows: few rows need a small rank, more rows a larger one"
    if facts.answer > _LONG_ANSWER:
        rank, why = 2 * rank, f"{why}; doubled, as answers of {facts.answer} tokens make a harder task"
    bits = facts.rows * facts.answer  # about one for each token that is trained
    if rank * facts.each_rank >= bits or rank >= _MOST_RANK:
        return Rule("method.r", rank, why, LORA if rank <= 16 else LESS)
    while rank * facts.each_rank < bits and rank < _MOST_RANK:
        rank *= 2
    why = f"the answers hold about {bits:.2g} bits, and a LoRA falls behind where it has fewer parameters than that"
    return Rule("method.r", rank, f"{why}; here {rank * facts.each_rank:.2g}", REGRET)


def _rate(facts: Facts, epochs: int) -> Rule:
    full, steps = _below(_FULL_RATES, facts.parameters), math.ceil(facts.rows * epochs / _rows_a_step(facts))
    times, word = (15, "fifteen") if steps < _SHORT else (10, "ten")
    why = f"about {word} times the rate of full tuning, {full:g} for {facts.parameters / 1e9:.2g}B parameters"
    return Rule("training.lr", float(f"{times * full:.3g}"), f"{why}, in a run of {steps:,} steps", REGRET)


def _rows_a_step(facts: Facts) -> int:
    return 16 if facts.rows >= 500 else 8


def _epochs(facts: Facts) -> Rule:
    epochs = _below(_EPOCHS, facts.rows)
    return Rule("training.epochs", epochs, "repeating rows up to four times is nearly as good as new ones", REPEATED)


def _fit(model: str, facts: Facts, rank: int, trusted: bool) -> tuple[list[Rule], Plan]:
    """Precision, recomputation and batch: the fastest combination that the planner lets through."""
    rows = _rows_a_step(facts)
    length = min(_LONGEST, max(16, facts.longest))
    method = {"name": "lora", "r": rank, "alpha": _ALPHA}
    for quantize in (None, "nf4"):
        found: list[Plan] = []
        for recompute in ("none", "cheap", "full"):
            options = {"length": length, "quantize": quantize, "recompute": recompute, "device": _device(facts.memory)}
            options["trust_remote_code"] = trusted
            most = _most(lambda batch, options=options: plan(model, method, batch=batch, **options), rows)  # type: ignore[misc]
            found.append(most)
            if _fits(most) and most.batch >= min(rows, _ENOUGH):
                return _fitting(most, rows), most
        fitting = [made for made in found if _fits(made)]
        if fitting:
            most = max(fitting, key=lambda made: made.batch)
            return _fitting(most, rows), most
    least = min(found, key=lambda made: made.process).process / 2**30
    raise ConfigError(
        f"{model} does not fit: with 4-bit weights, full recomputation and one row of {length} tokens at a time it "
        f"still needs {least:.1f} GB, and {(facts.memory or 0) / 2**30:.1f} GB may be used. Shorten the rows, choose a "
        "smaller model, or give more memory."
    )


def _most(ask: Callable[[int], Plan], rows: int) -> Plan:
    """The plan of the largest batch, a power of two, that fits; that of one row where none does.

    Memory is a straight line in the batch, so two plans tell which one to try.
    """
    whole = ask(rows)
    if _fits(whole):
        return whole
    one = ask(1)
    if not _fits(one) or one.limit is None:
        return one
    room = 1 + (one.limit - one.process) * (rows - 1) / max(1, whole.process - one.process)
    batch = 2 ** int(math.log2(max(1, room)))
    made = ask(batch) if batch > 1 else one
    return made if _fits(made) else one


def _fits(made: Plan) -> bool:
    return made.limit is None or made.fits(made.limit)


def _fitting(made: Plan, rows: int) -> list[Rule]:
    limit = f" of {made.limit / 2**30:.1f} GB" if made.limit else ""
    needs = f"{made.process / 2**30:.2f} GB{limit} for {made.batch} rows of {made.length} tokens"
    rules = [
        Rule("training.batch_size", made.batch, f"the most that fits, up to {rows}: {needs}", PLANNER),
        Rule("training.accumulation", rows // made.batch, f"{rows} rows a step: low-rank updates suffer from large "
             "batches more than full tuning does", REGRET),
    ]  # fmt: skip
    if made.recompute != "none":
        rules.append(Rule("training.recompute", made.recompute, "activations would not fit otherwise", RECOMPUTE))
    if made.quantize is not None:
        rules.append(Rule("quantize", made.quantize, "16-bit weights would not fit", PACKED))
    return rules


def _evidence() -> list[dict[str, Any]]:
    """What our own comparisons say of the field's rules."""
    text = resources.files("adapterlab.compare").joinpath("evidence.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def _with_tests(rule: Rule, known: Sequence[dict[str, Any]]) -> Rule:
    said = tuple(
        f"“{entry['rule']}” {entry['verdict']} ({entry['model']})" for entry in known if entry["key"] == rule.key
    )
    return replace(rule, tested=said)


def _figures(rules: Sequence[Rule], known: Sequence[dict[str, Any]], facts: Facts) -> list[str]:
    """The figures behind what is said of settings, and for which models they cannot speak."""
    keys = {rule.key for rule in rules if rule.tested}
    found = [entry for entry in known if entry["key"] in keys]
    said = []
    for entry in found:
        figures = "; ".join(f"{says}: {measured}" for says, measured in entry["figures"].items())
        said.append(f"{entry['key']}: “{entry['rule']}” {entry['verdict']}. {figures} ({entry['source']}).")
    largest = max((entry["parameters"] for entry in found), default=0)
    if said and facts.parameters > _SPEAKS * largest:
        said.append(
            f"These were measured on {largest / 1e6:,.0f}M parameters and cannot speak for "
            f"{facts.parameters / 1e9:.2g}B: put your model into examples/rules and look."
        )
    return said


def _past(model: str, data: DataConfig, folder: Path) -> tuple[list[str], list[Rule]]:
    """Sentences on earlier comparisons, and the settings of the best method where model and rows were the same."""
    said: list[str] = []
    rules: list[Rule] = []
    for file, comparison in _comparisons(folder):
        best = next((s for s in comparison.standings if s.rank == 1 and s.label != UNTRAINED and s.finished), None)
        if comparison.config.get("model") != model or best is None:
            continue
        tied = f", not told apart from {', '.join(best.tied)}" if best.tied else ""
        same = _same_rows(comparison, data)
        said.append(f"{file.parent}: {best.label} came first{tied}, on {'the same' if same else 'other'} rows.")
        if same and not rules:
            run = comparison.runs_of(best.label)[0]
            why = f"it came first in {file.parent}{tied}"
            given = {"name": run.method, **run.settings}
            rules = [Rule(f"method.{key}", value, why, str(file)) for key, value in given.items()]
            rules.append(Rule("training.lr", run.lr, "chosen there", str(file)))
    return said, rules


def _comparisons(folder: Path) -> Iterator[tuple[Path, Comparison]]:
    """Readable comparisons in a folder and a few levels below it, the newest first."""
    files = [f for depth in range(_DEEP + 1) for f in folder.glob("/".join(["*"] * depth + [FILE]))]
    for file in sorted(files, key=lambda f: -f.stat().st_mtime):
        try:
            yield file, load(file)
        except AdapterlabError:  # damaged or of another version: advice can do without it
            continue


def _same_rows(comparison: Comparison, data: DataConfig) -> bool:
    then, now = comparison.config.get("data", {}), data.model_dump(mode="json")
    return all(then.get(key) == now[key] for key in ("path", "task"))
