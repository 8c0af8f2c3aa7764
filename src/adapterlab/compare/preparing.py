"""What happens before anything runs: every method is checked, the rows are read and set apart, the folder is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from adapterlab import yaml_text
from adapterlab.compare import slurm
from adapterlab.compare.config import DATA, HELD, TRAIN, CompareConfig, Contender
from adapterlab.compare.jobs import CONFIG
from adapterlab.compare.results import FILE, UNTRAINED
from adapterlab.compare.software import Software
from adapterlab.data import Example, fingerprint, load_data, scorer_for
from adapterlab.data.formats import Numbers
from adapterlab.data.views import Others, Picked
from adapterlab.errors import AttachError, ConfigError, DataError, FormatError, OutputError
from adapterlab.io import successor
from adapterlab.io.atomic import new_file, write_json, write_text
from adapterlab.io.disk import alone, content, explained, remove, tidy
from adapterlab.io.links import check_links
from adapterlab.json_text import digest, parsed
from adapterlab.train.config import TrainConfig

FACTS, OPENED = "facts.json", "opened.json"
_HELD_SHARE, _HELD_MOST = 10, 100
_OURS = (
    CONFIG,
    FILE,
    DATA,
    UNTRAINED,
    "probe",
    "lr",
    "together",
    "runs",
    OPENED,
    slurm.SCRIPT,
    slurm.LOGS,
)  # what the next comparison in the folder replaces


def check_attach(config: CompareConfig, contenders: Sequence[Contender]) -> None:
    """Try every method on the model without its weights, so that a target that is not there is known at once.

    Methods that compute something from the weights cannot be tried like this; they are met when they run.

    Raises:
        ModelError: the model is unknown.
        ConfigError: methods cannot work on this model; all of them are in the message.
    """
    if config.quantize is not None:
        return
    faults = []
    for contender in contenders:
        train = TrainConfig(**config.train_fields(contender, steps=1, seed=0, lr=0.0, output=Path("unused")))
        try:
            _attach_weightless(config, train)
        except (ConfigError, AttachError) as error:
            faults.append(f"{contender.label}: {error}")
    if faults:
        raise ConfigError("These methods do not fit the model; nothing was run:\n" + "\n".join(faults))


def _attach_weightless(config: CompareConfig, train: TrainConfig) -> None:
    import torch

    from adapterlab.foreign.pretrained import build, read_config
    from adapterlab.hosts import Host
    from adapterlab.models import resolve

    trusted = config.trust_remote_code
    shape = read_config(resolve(config.model), trust_remote_code=trusted)
    with torch.device("meta"):
        host = Host(build(shape, trust_remote_code=trusted))
        try:
            host.attach(train.make_method(), "trial")
        except (ConfigError, AttachError):
            raise
        except (RuntimeError, NotImplementedError, ValueError):  # it looked at values, and there are none here
            return


def _numbers(config: CompareConfig, contenders: Sequence[Contender]) -> Numbers:
    """The columns that some of the methods read beside the text."""
    found: dict[str, tuple[int, ...]] = {}
    for contender in contenders:
        with contextlib.suppress(ConfigError):  # told with all others, by `check_attach`
            train = TrainConfig(**config.train_fields(contender, steps=1, seed=0, lr=0.0, output=Path("unused")))
            found.update(train.make_method().columns)
    return found


def read_rows(
    config: CompareConfig, contenders: Sequence[Contender] = ()
) -> tuple[dict[str, Any], Literal["score", "loss"], Sequence[Example], Sequence[Example]]:
    """Read all rows and set some training rows apart.

    Returns:
        Facts on the data, the judge, the rows to train on, and those to choose checkpoints and rates by.

    Raises:
        DataError: rows are missing, there is nothing to evaluate on, or answers cannot be scored although they judge.
    """
    if config.data.streaming:
        raise ConfigError(
            "A comparison writes down the rows that all its runs train on, so none can be streamed. Set "
            "data.limit instead of data.streaming."
        )
    splits = load_data(config.data, _numbers(config, contenders))
    asked = splits.eval[: config.evaluation.limit]
    if len(asked) < 2:
        raise DataError(
            f"A comparison needs at least two evaluation rows, better a hundred; {splits.eval_source} has "
            f"{len(asked)}. Set data.eval_size, data.eval_path or data.eval_split."
        )
    scorer = scorer_for(config.data, dataclasses.replace(splits, eval=asked))
    if scorer is None and config.judge == "score":
        raise DataError(
            f"judge=score needs answers that can be checked, and those of {splits.eval_source} cannot: they are long "
            "free text, or data.scorer is none. Set judge=loss, or a data.scorer that fits (number, exact; verifier "
            "for generated tasks)."
        )
    judge: Literal["score", "loss"] = "score" if scorer is not None and config.judge != "loss" else "loss"
    count = config.validation or max(1, min(_HELD_MOST, len(splits.train) // _HELD_SHARE))
    if count >= len(splits.train):
        raise DataError(f"validation={count} leaves none of the {len(splits.train)} training rows. Lower it.")
    chosen = sorted(random.Random(config.data.seed).sample(range(len(splits.train)), count))
    train = Picked(splits.train, Others(len(splits.train), chosen))
    facts = {
        "source": splits.source,
        "eval_source": splits.eval_source,
        "fingerprint": fingerprint(asked),
        "train_fingerprint": fingerprint(splits.train),
        "train_rows": len(train),
        "validation_rows": count,
        "eval_rows": len(asked),
        "scorer": scorer.name if scorer else None,
        "overlap": splits.overlap,
        "columns": str(splits.columns),
    }
    return facts, judge, train, Picked(splits.train, chosen)


@contextlib.contextmanager
def claimed(config: CompareConfig, *, overwrite: bool) -> Iterator[None]:
    """Make the comparison's folder, or check that it holds the same comparison; keep others away from it meanwhile.

    Raises:
        OutputError: it holds something else, or another process works in it.
        ConfigError: it holds a comparison with another configuration.
        FormatError: a link in it leads out of it.
    """
    root, saved = config.output, config.output / CONFIG
    check_links(root)
    if root.is_file():
        raise OutputError(f"{root} is a file; a comparison needs a folder. Choose another output.")
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
    with alone(root):
        tidy(root)
        successor.recover(root, _OURS)
        if content(root) and not saved.is_file():
            raise OutputError(
                f"{root} is not empty and holds no {CONFIG}: it is not a comparison's folder, and its content is left "
                "alone. Choose another output."
            )
        if saved.is_file() and not overwrite:
            _check_same(config, saved)
        yield


def _check_same(config: CompareConfig, saved: Path) -> None:
    try:
        differing = config.differences(yaml_text.read(saved, "examples/compare_*.yaml"))
    except Exception as error:
        raise FormatError(f"{saved} cannot be read ({error}). Choose another output.") from None
    if differing:
        raise ConfigError(
            f"{config.output} holds a comparison with another configuration, and nothing is overwritten unless asked:\n"
            + "\n".join(differing)
            + "\nChoose another output, use its own settings, or pass --overwrite."
        )


def write_rows(
    config: CompareConfig,
    facts: Mapping[str, Any],
    train: Sequence[Example],
    held: Sequence[Example],
    *,
    overwrite: bool = False,
) -> None:
    """Write the configuration and the rows that every run trains on; on a second start, check that they are the same.

    With `overwrite` an earlier comparison goes once they are written, and not before.

    Raises:
        DataError: the rows are others than when the comparison began.
        OutputError: they cannot be written.
    """
    if not overwrite:
        _write_rows(config, config.output, facts, train, held)
        return
    work = successor.begin(config.output)
    try:
        _write_rows(config, work, facts, train, held)
    except BaseException:
        remove(work)
        raise
    successor.arrive(config.output, _OURS)


def _write_rows(
    config: CompareConfig, root: Path, facts: Mapping[str, Any], train: Sequence[Example], held: Sequence[Example]
) -> None:
    # The configuration comes first: it says that the folder is a comparison's.
    write_text(root / CONFIG, yaml_text.written(config.plain()))
    folder = root / DATA
    if not (folder / FACTS).is_file():
        for name, examples in {TRAIN: train, HELD: held}.items():
            with new_file(folder / name) as stream:
                stream.writelines(_line(example).encode() for example in examples)
        write_json(folder / FACTS, dict(facts))
        return
    check_rows(root, facts)


def check_rows(root: Path, facts: Mapping[str, Any]) -> None:
    """Check that rows are those that a comparison began with.

    Args:
        root: the comparison's folder.
        facts: on the rows that were read here.

    Raises:
        DataError: they are others.
    """
    before = parsed((root / DATA / FACTS).read_text(encoding="utf-8"))
    if any(before.get(key) != facts[key] for key in ("fingerprint", "train_fingerprint")):
        raise DataError(
            f"The rows of {facts['source']} are not those that the comparison in {root} began with, so its runs "
            "could not be compared. Restore them (relative paths count from the working directory), or choose another "
            "output."
        )


class Opened(BaseModel):
    """What those who help with a comparison must know beside its configuration.

    Attributes:
        engine: that it was opened with.
        places: jobs at a time, all machines together.
        software: that its jobs are done with.
        digest: of what its results depend on, so that the next comparison in the same folder is not taken for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    places: int
    software: Software
    digest: str


def open_for_others(config: CompareConfig, facts: Mapping[str, Any], engine: str, places: int) -> Opened:
    """Write down what others need to help.

    Raises:
        OutputError: it cannot be written.
    """
    found = Opened(engine=engine, places=places, software=Software.here(), digest=digest([config.decisive(), facts]))
    write_json(config.output / OPENED, found.model_dump(mode="json"))
    return found


def opened(root: Path) -> tuple[CompareConfig, Opened]:
    """Read what somebody else opened.

    Raises:
        OutputError: the folder holds no comparison, or nobody has opened it.
        FormatError: a file in it cannot be read, or a link leads out of it.
    """
    if not (root / CONFIG).is_file() or not (root / OPENED).is_file():
        raise OutputError(
            f"{root} holds no comparison that others could help with. Open it first: adapterlab compare CONFIG "
            f"--engine folder --output {root}. If it is open on another machine, check that this one sees the folder."
        )
    check_links(root)
    config = CompareConfig(**{**yaml_text.read(root / CONFIG, "examples/compare_*.yaml"), "output": root})
    return config, read_opened(root)


def read_opened(root: Path) -> Opened:
    """Read by what a comparison was opened.

    Raises:
        FormatError: the file is damaged or gone.
    """
    try:
        return Opened(**parsed((root / OPENED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{root / OPENED} cannot be read ({error}). Start the comparison's command again.") from None


def _line(example: Example) -> str:
    if example.messages is None:
        return json.dumps({"text": example.text, **example.numbers}, ensure_ascii=False) + "\n"
    learnt = example.trained or [True] * len(example.messages)
    messages = [
        {**m, "train": False} if m["role"] == "assistant" and not told else m
        for m, told in zip(example.messages, learnt, strict=True)
    ]
    beside = {name: example.context[name] for name in ("tools", "documents") if name in example.context}
    settings = {name: value for name, value in example.context.items() if name not in beside}
    row = {
        "messages": messages,
        **beside,
        **({"chat_template_kwargs": settings} if settings else {}),
        **example.numbers,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
