"""Steps that several devices share: what each holds and sends, what is refused, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from test_planning import SMALL, config

from adapterlab.cli import main
from adapterlab.errors import ConfigError
from adapterlab.plan import Device, Plan, plan
from adapterlab.plan.advice import _more_devices, _sorted
from adapterlab.plan.dividing import BUCKETS, FIRST, GATHERED, LAST, SUMMED, divided
from adapterlab.plan.parallel import KINDS, PLACED, Link, Parallel
from adapterlab.plan.planning import described, make_method, setup_of, trace_of
from adapterlab.plan.simulate import (
    ACTIVATIONS,
    ADAPTER,
    BASE,
    CHECKS,
    GRADIENTS,
    LOSS,
    STATE,
    UPDATE,
    Piece,
    Trace,
)  # fmt: skip
from adapterlab.plan.tracker import Moment
from adapterlab.train.parallel.flat import BUCKET

FROZEN = Piece(10, 1_000_000, 4_000_000, "float32", BASE, False)
FACTOR = Piece(3, 300, 1_200, "float32", ADAPTER, True, added=True, moments=2_400)
HEAD = Piece(5, 500_000, 2_000_000, "float32", BASE, False)
HELD = {BASE: 10_000_000, ADAPTER: 2_400, STATE: 4_800}


def trace() -> Trace:
    """A step of two layers with a factor in each, and a head."""
    windows: dict[str, dict[str, int]] = {
        "forward, layer 0": {f"{ACTIVATIONS}, layer 0": 100},
        "forward, layer 1": {f"{ACTIVATIONS}, layer 0": 60, f"{ACTIVATIONS}, layer 1": 100},
        LOSS: {f"{ACTIVATIONS}, layer 0": 60, f"{ACTIVATIONS}, layer 1": 60, LOSS: 500},
        "backward, layer 1": {f"{ACTIVATIONS}, layer 0": 60, GRADIENTS: 1_200},
        "backward, layer 0": {GRADIENTS: 2_400},
        CHECKS: {GRADIENTS: 2_400},
        UPDATE: {GRADIENTS: 2_400, UPDATE: 2_400},
    }
    moments = {key: Moment(sum({**HELD, **own}.values()), {**HELD, **own}) for key, own in windows.items()}
    return Trace(moments, dict(HELD), 1e9, 2, 600, 10_000_000, groups=((FROZEN, FACTOR), (FROZEN, FACTOR), (HEAD,)))


def parts(kind: str, window: str, count: int = 2, accumulation: int = 1) -> dict[str, int]:
    made, _ = divided(trace(), Parallel(kind, count), accumulation)
    found = made.moments[window]
    assert found.total == sum(found.parts.values())
    return found.parts


def test_copies_hold_all_and_for_a_moment_a_piece_of_what_is_summed() -> None:
    made, traffic = divided(trace(), Parallel("ddp", 4))
    assert {window: made.moments[window].parts for window in trace().moments} == {
        window: moment.parts for window, moment in trace().moments.items()
    }
    assert made.moments[SUMMED].parts == {**HELD, GRADIENTS: 2_400, BUCKETS: 2_400}
    assert (traffic.gathered, traffic.reduced) == (0, round(2 * 3 / 4 * 2_400))
    assert traffic.waited == traffic.reduced, "nothing is computed meanwhile"
    assert made.base == 10_000_000


def test_pieces_are_those_of_training() -> None:
    large = FACTOR._replace(numel=BUCKET // 8, size=BUCKET // 2 // 4 * 4)
    many = replace(trace(), groups=((large,) * 5, (large._replace(numel=BUCKET, size=4 * BUCKET),)))
    made, _ = divided(many, Parallel("ddp", 2))
    assert made.moments[SUMMED].parts[BUCKETS] == 2 * large.size, "two fit, and one that is larger is summed as it is"


def test_a_split_base_is_whole_one_layer_at_a_time_and_what_is_added_always() -> None:
    layer, root = 4_000_000, 2 * 3 * 400_000  # of the head's five rows each of two devices holds three at most
    forward = parts("fsdp", "forward, layer 1")
    assert forward[BASE] == 2 * 2_000_000 + 3 * 400_000
    assert (forward[ADAPTER], forward[STATE]) == (2_400, 4_800)
    assert forward[GATHERED] == root + 2 * layer
    assert forward[f"{ACTIVATIONS}, layer 1"] == 100, "rows are its own"
    backward = parts("fsdp", "backward, layer 0")
    assert (backward[GRADIENTS], BUCKETS in backward) == (2_400, False)
    assert parts("fsdp", SUMMED)[BUCKETS] == 2_400
    assert GATHERED not in parts("fsdp", UPDATE)
    assert parts("fsdp", UPDATE)[GRADIENTS] == 2_400
    assert parts("fsdp", FIRST)[GATHERED] == 2 * root + layer
    assert GATHERED not in parts("fsdp", LAST)
    _, traffic = divided(trace(), Parallel("fsdp", 2), accumulation=3)
    assert traffic.gathered == 3 * (4 * layer + root) // 2
    assert traffic.reduced == traffic.waited == 2_400


def _trains(kind: str, window: str, accumulation: int = 1) -> dict[str, int]:
    """Parts where the base trains, with its originals beside it."""
    made, _ = divided(_of_base(), Parallel(kind, 2), accumulation)
    return made.moments[window].parts


def _of_base(dtype: str = "float32") -> Trace:
    """The same step of parameters of the base; of three rows the first of two devices has two."""
    weight = Piece(3, 300, 1_200, dtype, BASE, True, moments=2_400, original=1_200)
    return replace(trace(), groups=((FROZEN, weight), (FROZEN, weight), (HEAD,)))


def test_a_base_that_trains_is_split_with_gradients_moments_and_originals() -> None:
    forward = _trains("fsdp", "forward, layer 1")
    assert (forward[ADAPTER], forward[STATE]) == (2 * 800, 2 * 1_600)
    assert forward[GATHERED] == 2 * 3 * 400_000 + 2 * (4_000_000 + 2 * 800)
    backward = _trains("fsdp", "backward, layer 0")
    assert backward[GRADIENTS] == 1_200 + 800, "the layer at work has whole ones, the other its part"
    assert backward[BUCKETS] == 1_200
    assert _trains("fsdp", "backward, layer 0", 2)[GRADIENTS] == 1_200 + 2 * 800, "sums are in parts"
    assert _trains("fsdp", UPDATE)[GRADIENTS] == 1_600
    assert BUCKETS not in _trains("fsdp", SUMMED)
    _, traffic = divided(_of_base(), Parallel("fsdp", 2), accumulation=3)
    assert (traffic.reduced, traffic.waited) == (3 * 1_200, 0), "dealt out in every backward pass"
    assert divided(_of_base("bfloat16"), Parallel("fsdp", 2))[1].reduced == 300 * 4, "and in float32"


def test_devices_without_rows_do_not_help_the_first() -> None:
    assert parts("fsdp", "forward, layer 1", 64)[BASE] == 3 * 400_000, "one row is the least"


def test_zero2_keeps_what_it_gathered_until_the_backward_pass() -> None:
    layer, root = 4_000_000, 2 * 3 * 400_000
    assert parts("zero2", "forward, layer 0")[GATHERED] == root + 2 * layer
    assert parts("zero2", "forward, layer 1")[GATHERED] == root + 3 * layer
    assert parts("zero2", "backward, layer 1")[GATHERED] == root + 2 * layer
    assert parts("zero2", "backward, layer 0")[GATHERED] == root + layer
    assert parts("zero2", UPDATE)[BASE] == parts("fsdp", UPDATE)[BASE]
    assert divided(trace(), Parallel("zero2", 2), 3)[1].gathered == 3 * (2 * layer + root) // 2
    assert divided(trace(), Parallel("zero3", 2), 3) == divided(trace(), Parallel("fsdp", 2), 3)


def test_what_fully_shard_refuses_of_the_base_is_refused() -> None:
    scalar = Piece(0, 1, 4, "float32", BASE, False)
    with pytest.raises(ConfigError, match="a single number"):
        divided(replace(trace(), groups=((scalar, FACTOR), (HEAD,))), Parallel("fsdp", 2))
    trained = HEAD._replace(trained=True)
    with pytest.raises(ConfigError, match="bfloat16 and float32"):
        divided(replace(trace(), groups=((trained, trained._replace(dtype="bfloat16")), (HEAD,))), Parallel("fsdp", 2))
    assert divided(replace(trace(), groups=((scalar, FACTOR), (HEAD,))), Parallel("ddp", 2))
    number = scalar._replace(part=ADAPTER, trained=True, added=True)
    mixed = (FROZEN, number, FACTOR, FACTOR._replace(dtype="bfloat16"))
    made, _ = divided(replace(trace(), groups=(mixed, (FROZEN,), (HEAD,))), Parallel("fsdp", 2))
    assert made.resting[ADAPTER] == HELD[ADAPTER], "what is added is whole, whatever it is"


def test_what_training_refuses_of_a_split_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="parallel=fsdp cannot train full: its anchor reads all weights"):
        plan(config(), {"name": "full", "anchor": 0.1}, **SMALL, devices=2, parallel="fsdp")


@pytest.mark.parametrize(
    ("devices", "kind", "link", "message"),
    [
        (1, "fsdp", None, "parallel='fsdp' needs several devices, and devices=1"),
        (None, None, "pcie4", "link='pcie4' needs several devices"),
        (4, None, None, "devices=4 says not how: add parallel, one of ddp, fsdp"),
        (4, "fdsp", None, "parallel='fdsp' is unknown.*fsdp"),
        (0, "ddp", None, "devices=0 is no number of devices"),
        (2, "ddp", "pci4", "link='pci4' is unknown.*pcie4"),
        (2, "ddp", "0", "link='0' is unknown"),
        (2, "device_map", "pcie4", "link='pcie4' is for devices that send gradients or weights"),
    ],
)
def test_nonsense_is_refused(devices: Any, kind: Any, link: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Parallel.parse(devices, kind, link)


def test_links() -> None:
    assert Link.parse("NVLink").rate == 450e9
    assert Link.parse("12.5 GB/s") == Link.parse("12.5") == Link("12.5 GB/s", 12.5e9)
    _, traffic = divided(trace(), Parallel("ddp", 2, Link.parse("100gbe")))
    assert traffic.seconds == pytest.approx(2_400 / 12.5e9)


def test_plans_of_one_device_of_many() -> None:
    given: Any = {"batch": 1, "length": 32, "precision": "fp32"}
    setup = setup_of(config(), "lora", **given, kind="cuda")
    place, trace = Device.parse("cuda:24GB"), trace_of(setup)
    alone, found = described("m", setup, trace, place), {}
    for kind in KINDS:
        division = Parallel.parse(2, kind, None if kind == PLACED else "pcie5")
        found[kind] = one = described("m", replace(setup, parallel=division), trace, place)
        assert sum(one.parts.values()) == one.peak
        assert (one.devices, one.parallel, one.flops) == (2, kind, alone.flops)
        assert Plan.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert found["ddp"].traffic is not None
    assert found["ddp"].traffic.sent == 4 * alone.trainable
    assert found["ddp"].base == alone.base
    assert found["fsdp"].base == found["zero2"].base == found["zero3"].base
    assert found["fsdp"].base == pytest.approx(alone.base / 2, rel=0.01)
    assert (found["fsdp"].state, found["fsdp"].adapter) == (alone.state, alone.adapter), "what is added is whole"
    assert found["fsdp"].traffic is not None
    assert found["fsdp"].traffic.waited == 4 * alone.trainable
    with pytest.raises(ConfigError, match=r"packs them in blocks.*ddp, device_map"):
        plan(config(), "lora", **SMALL, quantize="nf4", devices=2, parallel="fsdp")


def test_more_devices_are_a_remedy_where_one_is_too_small() -> None:
    wide = config(hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    given: Any = {"batch": 1, "length": 16, "precision": "fp32"}
    setup, place = setup_of(wide, "full", **given, kind="cuda"), Device.parse("cuda:8GB")
    trace = trace_of(setup)
    start = described("m", setup, trace, place)
    two = described("m", replace(setup, parallel=Parallel("fsdp", 2)), trace, place)
    assert two.process < 0.9 * start.process
    small = _on(start, round(1.065 * two.process))
    ((what, (search, args, options)),) = _more_devices(small, wide, make_method("full"), given).items()
    found = search(*args, **options)
    assert (found.devices, found.process, found.verdict) == (2, two.process, "fits")
    (change,) = _sorted(small, {what: found}, {})
    assert change.what == "devices: 2, parallel: fsdp"
    assert _more_devices(start, wide, make_method("full"), given) == {}, "it fits already"
    with pytest.raises(ConfigError, match=r"does not fit with fsdp over 64 devices either.*activations"):
        search(_on(start, 1000), *args[1:], **options)


def _on(found: Plan, memory: int) -> Plan:
    """A plan on a device with another memory."""
    return replace(found, device=replace(found.device, memory=memory), limit=memory)


def test_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config().save_pretrained(tmp_path / "model")
    common = ["plan", "--model", str(tmp_path / "model"), "--length", "32", "--device", "cuda:24GB", "--no-limits"]
    with pytest.raises(SystemExit):
        main([*common, "--devices", "4", "--parallel", "ddp", "--batch", "3", "--link", "pcie4"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "3 rows of its own: 12 a batch" in shown
    assert "the best rate of pcie4" in shown
    with pytest.raises(SystemExit):
        main([*common, "--devices", "4"])
    assert "says not how" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*common, "--serve", "--devices", "4", "--parallel", "fsdp"])
    assert "--devices, --parallel divide a training step" in " ".join(capsys.readouterr().err.split())


def test_a_file_is_planned_as_it_says(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config().save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))

    def planned(parallel: str, *options: str) -> tuple[dict[str, Any], str]:
        file.write_text(
            f"model: {tmp_path / 'model'}\nparallel: {parallel}\ndata: {{path: rows.jsonl, max_length: 32}}\n"
        )
        with pytest.raises(SystemExit):
            main(["plan", str(file), "--device", "cuda:24GB", "--no-limits", "--json", *options])
        shown = capsys.readouterr()
        return json.loads(shown.out), " ".join(shown.err.split())

    found, told = planned("fsdp")
    assert (found["devices"], found["parallel"]) == (1, None)
    assert "says parallel: fsdp, and this is the plan of one process" in told
    found, told = planned("fsdp", "--devices", "2")
    assert (found["devices"], found["parallel"]) == (2, "fsdp")
    assert "one process" not in told
    found, _ = planned("fsdp", "--devices", "2", "--parallel", "ddp")
    assert found["parallel"] == "ddp", "the command line goes first"
    found, _ = planned("auto", "--devices", "2")
    assert found["parallel"] == "ddp"
    found, _ = planned("device_map", "--devices", "3")
    assert (found["devices"], found["parallel"], found["limit"]) == (3, "device_map", 3 * 24 * 2**30)
