"""`adapterlab learn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._conversion import (
    Output,
    Overwrite,
    adapter_place,
    check_adapter_output,
    check_same_base,
    open_together,
)
from adapterlab.cli._shared import AsJson, BaseModel, Checkpoint, Device, Precision, Trust, print_json, say, settings

if TYPE_CHECKING:
    from adapterlab.evaluate.opening import Place


def learn(
    adapters: Annotated[
        list[str], typer.Argument(help="Run folders of the tasks, or adapter folders.", show_default=False)
    ],
    output: Output,
    method: Annotated[str, typer.Option(help="Method of two phases that learns from them.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="Steps to make, each on a batch of one task.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, such as length=20.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's own for this phase.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Use the training rows of the runs, or the adapters alone.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the start values.")] = 0,
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    precision: Precision = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Learn what adapters of several tasks share: the first phase of methods that have two.

    The second is a training run that starts from the written folder, with the setting source=FOLDER of the method.
    """
    from adapterlab.registry import method as by_id

    made = by_id(method)(**settings(set_ or [], "--set"))
    places = [adapter_place(target, model, checkpoint, trust_remote_code) for target in adapters]
    check_adapter_output(output, overwrite, [folder for place in places for folder in place.folders])
    check_same_base(places)
    tokenizer, host, names = open_together(places, device, precision)

    from accelerate.utils import set_seed

    set_seed(seed)
    name = "learned" if "learned" not in names else "learned_all"
    host.attach(made, name)
    each = zip(names, places, strict=True)
    tasks = {one: _batches(place, host.model, tokenizer, batch_size) if data else [] for one, place in each}
    losses = host.learn_from(tasks, name, steps=steps, lr=lr)
    last = sum(losses[-10:]) / len(losses[-10:])
    host.save(output, name, overwrite=overwrite, notes={"Learned from": ", ".join(names), "Last loss": f"{last:.4g}"})
    if as_json:
        print_json({"folder": str(output), "learned_from": names, "losses": losses})
    else:
        say(f"Loss: {losses[0]:.4g} in the first step, {last:.4g} at the end.")
        say(f"Written: {output}")


def _batches(place: Place, model: Any, tokenizer: Any, size: int) -> list[dict[str, Any]]:
    """The training rows of a run as batches on the model's device; none for an adapter that no run is known of."""
    from adapterlab.data import DataConfig, load_data
    from adapterlab.data.batching import placed
    from adapterlab.evaluate.rows import collator_for, rows_for
    from adapterlab.foreign.model import input_device

    if place.data is None:
        return []
    cfg = DataConfig(**place.data)
    rows, collate = rows_for(model, tokenizer, load_data(cfg).train, cfg).rows, collator_for(model, tokenizer)
    return [placed(collate(rows[i : i + size]), input_device(model)) for i in range(0, len(rows), size)]
