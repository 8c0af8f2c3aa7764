import csv
import dataclasses
import html
import io
import itertools
import random
import re
import statistics

import pytest
from fabricate import fabricate

from adapterlab.compare.report import amounts, charts, peft, table
from adapterlab.compare.report.join import alike, join
from adapterlab.compare.report.origins import came_about
from adapterlab.compare.report.page import page
from adapterlab.compare.report.svg import NARROW, WIDE, Axis, Plot
from adapterlab.compare.report.write import write
from adapterlab.compare.results import UNTRAINED, Recommendation
from adapterlab.compare.summary import summarise

MADE = fabricate()


def rows_by_label(comparison=MADE):
    return {row.label: row for row in table.build([comparison])}


def test_cells_are_means_over_finished_seeds():
    row = rows_by_label()["dora"]
    runs = [run for run in MADE.runs if run.label == "dora"]
    assert len(runs) == 2
    assert row.cells["peak_memory_bytes"].value == statistics.fmean(run.memory.peak for run in runs)
    assert row.cells["score_final"].value == statistics.fmean(run.final.score for run in runs)
    assert row.cells["step_seconds"].value == pytest.approx(0.93)


def test_times_are_those_of_runs_that_were_by_themselves():
    first = next(run for run in MADE.runs if run.label == "dora")
    # What shares a process lasts as long as all of them do.
    shared = {"together": 12, "train_seconds": None, "wall_seconds": 12 * first.wall_seconds}
    runs = [run.model_copy(update=shared if run.label == "dora" and run.seed else {}) for run in MADE.runs]
    row = rows_by_label(MADE.model_copy(update={"runs": runs}))["dora"]
    assert row.cells["wall_seconds"].value == first.wall_seconds
    assert row.cells["train_seconds"].value == first.train_seconds


def test_a_failed_seed_is_left_out_of_the_means_and_named():
    runs = [
        run.model_copy(update={"status": "failed", "reason": "TrainingError: loss is nan"})
        if (run.label, run.seed) == ("ia3", 1)
        else run
        for run in MADE.runs
    ]
    row = rows_by_label(MADE.model_copy(update={"runs": runs}))["ia3"]
    assert row.remark == "1 of 2 seeds failed: TrainingError: loss is nan"
    assert row.cells["score_best"].value == next(r.best.score for r in runs if (r.label, r.seed) == ("ia3", 0))


def test_rows_stand_by_rank_and_failed_methods_last():
    ranks = [row.rank for row in table.build([MADE])]
    assert ranks[-1] is None
    assert ranks[:-1] == sorted(ranks[:-1])


@pytest.mark.parametrize(("judge", "key"), [("score", "score_best"), ("loss", "loss_best_nats")])
def test_what_ranks_stands_in_the_table_with_the_interval_of_the_ranking(judge, key):
    made = fabricate()
    facts = {key: getattr(made, key) for key in ("name", "started", "updated", "finished", "config")}
    made = summarise(made.runs, judge=judge, level=made.level, **facts)
    assert table.JUDGED[judge] == key
    for row in table.build([made]):
        if row.rank is not None:
            assert row.cells[key].value == pytest.approx(row.standing.value, rel=1e-12)
            assert row.cells[key].interval == row.standing.interval
    untrained = rows_by_label(made)[UNTRAINED]
    assert untrained.cells["best_validation_loss_nats"].value is None
    assert untrained.cells["loss_best_nats"].value == made.runs[0].best.loss


def test_intervals_of_final_scores_hold_the_mean_and_narrow_with_rows():
    wide, narrow = (rows_by_label(fabricate(rows=n))["ia3"].cells["score_final"] for n in (30, 300))
    for cell in (wide, narrow):
        low, high = cell.interval
        assert low < cell.value < high
    assert narrow.interval[1] - narrow.interval[0] < wide.interval[1] - wide.interval[0]


def test_csv_holds_every_figure_in_full_precision():
    lines = list(csv.DictReader(io.StringIO(table.comma_separated(table.build([MADE])))))
    assert [line["method"] for line in lines] == [row.label for row in table.build([MADE])]
    line = next(line for line in lines if line["method"] == "lora r=16")
    runs = [run for run in MADE.runs if run.label == "lora r=16"]
    assert float(line["loss_best_nats"]) == statistics.fmean(run.best.loss for run in runs)
    assert float(line["best_validation_loss_nats"]) == statistics.fmean(run.best_loss for run in runs)
    assert float(line["training_flops"]) == runs[0].flops
    assert float(line["score_best_low"]) < float(line["score_best"]) < float(line["score_best_high"])
    assert {line["lr"] for line in lines if line["method"] == "ia3"} == {"0.01"}


def named(label):
    """The comparison with the label of one method replaced, and the text in every remark and the advice."""
    spoilt = {"label": label, "status": "failed", "reason": label}
    runs = [run.model_copy(update=spoilt) if run.label == "ia3" else run for run in MADE.runs]
    return MADE.model_copy(update={"runs": runs, "recommendation": Recommendation(text=label), "standings": []})


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", " =1", "\t=1", "<script>alert(1)</script>", "a\x1b[31m|b"]
)
def test_no_text_of_a_comparison_acts_in_the_tables(tmp_path, monkeypatch, text):
    monkeypatch.setattr("adapterlab.compare.report.picture.can_draw", lambda: False)
    write([named(text)], tmp_path)
    written = (tmp_path / "table.md").read_text()
    assert not re.search(r"(?<!\\)<|\x1b", written)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in written.split("\n\n")[0].splitlines()}) == 1
    cells = [cell for line in csv.reader(io.StringIO((tmp_path / "table.csv").read_text())) for cell in line]
    assert any(text.replace("\x1b", "\\u001b") in cell for cell in cells)
    assert not [cell for cell in cells if "\x1b" in cell or (cell.strip()[:1] in tuple("=+-@") and not number(cell))]


def number(cell):
    try:
        return isinstance(float(cell), float)
    except ValueError:
        return False


def test_numbers_below_zero_stay_numbers():
    assert [table._inert(value) for value in (-0.5, "-0.5", "+2", None, "-x")] == [-0.5, "-0.5", "+2", None, "'-x"]


def test_the_classic_markdown_table_is_complete():
    first = table.markdown(table.build([MADE])).split("\n\n")[0].splitlines()
    header, lines = first[0], first[2:]
    for title in ("peak memory", "mean memory", "best step", "validation loss", "train loss", "training time",
                  "loss, best", "score, best", "score, final", "method"):  # fmt: skip
        assert f" {title} " in header
    assert len({line.count(" | ") for line in first}) == 1
    for line in lines:
        trained = not any(f" {label} " in line for label in (UNTRAINED, "lora r=512"))
        assert trained == all(cell.strip() != amounts.MISSING for cell in line.split("|")[1:-1])


def without_costs(comparison, **changes):
    """The comparison as it is with `evaluation.costs: false` and answers that nobody scored."""
    bare = {"memory": None, "inference": None, "step_flops": None, "flops": None}
    unscored = {"score": None, "interval": None, "right": []}
    runs = []
    for run in comparison.runs:
        exams = {
            key: exam and exam.model_copy(update=unscored) for key, exam in (("best", run.best), ("final", run.final))
        }
        seconds = 0.0 if run.is_untrained else None  # as the untrained model's run is written down
        runs.append(run.model_copy(update={**bare, **exams, "train_seconds": seconds}))
    config = {**comparison.config, "evaluation": {"costs": False}}
    return comparison.model_copy(update={"runs": runs, "judge": "loss", "config": config, **changes})


def test_columns_that_nothing_trained_has_are_left_out_and_named_with_the_reason():
    bare = without_costs(MADE)
    text = table.markdown(table.build([bare]))
    header = text.splitlines()[0]
    for title in ("peak memory", "mean memory", "training time", "score, best", "score, final"):
        assert title not in header
    assert " best step | validation loss | train loss | loss, best |" in header
    line = (
        "Not in the table: “score, best” and “score, final” (answers were not scored); “peak memory”, “mean memory” "
        "and “training time” (costs were not measured: evaluation.costs is false)."
    )
    assert text.splitlines()[-1] == line
    assert line in page([bare])
    assert "training time</button>" not in page([bare])
    asked = without_costs(MADE, config={})
    assert table.left_out(table.build([asked])).endswith("and “training time” (no finished run has any).")
    assert "Not in the table" not in table.markdown(table.build([MADE])) + page([MADE])


def test_before_anything_is_trained_the_table_has_the_figures_of_the_untrained_model():
    begun = MADE.model_copy(update={"runs": MADE.runs[:1], "standings": MADE.standings[-2:-1]})
    assert "peak memory" in table.markdown(table.build([begun])).splitlines()[0]


def test_how_many_runs_shared_a_base_is_said_with_the_reasons_of_those_that_did_not(tmp_path, monkeypatch):
    monkeypatch.setattr("adapterlab.compare.report.picture.can_draw", lambda: False)
    why = "The process that trained 2 runs together failed. Log: <together>/log.txt."
    notes = {
        ("lora r=8", 1): {"together": 5}, ("lora r=16", 1): {"together": 5, "alone": "it draws random numbers"},
        ("dora", 0): {"alone": why}, ("dora", 1): {"alone": why}, ("ia3", 1): {"together": 5},
    }  # fmt: skip
    runs = [run.model_copy(update=notes.get((run.label, run.seed), {})) for run in MADE.runs]
    first, second = MADE.searches[0].rounds
    shared = [trial.model_copy(update={"together": 4}) for trial in first]
    searches = [MADE.searches[0].model_copy(update={"rounds": [shared, second]}), *MADE.searches[1:]]
    made = MADE.model_copy(update={"runs": runs, "searches": searches})
    assert came_about([made]) == [
        "Finished runs that shared a base with others in one process: 3 of 12; alone: 9. Reasons for being alone: The "
        "process that trained 2 runs together failed. Log: <together>/log.txt (2). Reasons for passes of their own on "
        "a shared base: it draws random numbers (1). Trials of learning rates that shared one: 4 of 36."
    ]
    write([made], tmp_path)
    assert table.plain(came_about([made])[0]) in (tmp_path / "table.md").read_text()
    assert html.escape(came_about([made])[0]) in (tmp_path / "report.html").read_text()
    other = fabricate("other").model_copy(update={"searches": []})
    assert [line.split(": ")[0] for line in came_about([made, other])] == ["made-up", "other"]
    assert came_about([other]) == ["Finished runs that shared a base with others in one process: 0 of 12; alone: 12."]
    assert came_about([other.model_copy(update={"runs": other.runs[:1]})]) == []


def test_markdown_cells_cannot_break_the_table():
    runs = [run.model_copy(update={"label": "a|b <i> *x*"}) if run.label == "dora" else run for run in MADE.runs]
    standings = [s.model_copy(update={"label": "a|b <i> *x*"}) if s.label == "dora" else s for s in MADE.standings]
    text = table.markdown(table.build([MADE.model_copy(update={"runs": runs, "standings": standings})]))
    assert r"a\|b \<i> \*x\*" in text


def test_folders_on_the_same_rows_are_ranked_together():
    first, second = fabricate("first", failed=False), fabricate("second", failed=False)  # the same draws
    rows = {row.name: row for row in table.build([first, second])}
    for label in first.labels:
        assert rows[f"first: {label}"].rank == rows[f"second: {label}"].rank
        assert f"second: {label}" in rows[f"first: {label}"].standing.tied
    assert rows["first: prefix_tuning"].rank > rows["second: dora"].rank
    assert len({row.css for row in rows.values() if row.series is not None}) == 2 * (len(first.labels) - 1)


def test_folders_on_other_rows_or_another_judge_are_not_ranked_together():
    first = fabricate("first")
    other, judge = fabricate("second", fingerprint="0" * 64), fabricate("third", judge="loss")
    assert [[c.name for c in group] for group in alike([first, other, judge])] == [["first"], ["second"], ["third"]]
    for row in table.build([first, other]):
        assert row.standing is None or row.standing.label == row.label
        assert row.comparison is join([row.comparison])


def test_peft_records_have_what_its_tools_read():
    records = peft.records([MADE])
    assert len(records) == len(MADE.runs)
    for record, run in zip(records, MADE.runs, strict=True):
        assert set(record) == {"run_info", "train_info", "meta_info"}
        info, trained, meta = record["run_info"], record["train_info"], record["meta_info"]
        assert info["experiment_name"] == f"{run.method}/{run.key}--seed{run.seed}"
        assert info["train_config"]["model_id"] == "smollm2-135m"
        assert trained["status"] == {"finished": "success", "failed": "failed"}[run.status]
        assert meta["package_info"]["torch-version"] == "2.13.0"
        assert {"transformers-version", "datasets-version", "bitsandbytes-version"} <= set(meta["package_info"])
        assert {"created_at", "total_time", "peft_branch", "peft_config", "error_msg"} <= set(info)
        if run.status == "finished" and not run.is_untrained:
            last = trained["metrics"][-1]
            assert last["test accuracy"] == run.final.score
            assert last["train loss"] == run.train_loss
            assert last["train total tokens"] == run.tokens
            assert info["peft_config"]["peft_type"] == run.method.upper()
            for key in ("accelerator_memory_reserved_avg", "accelerator_memory_max", "file_size",
                        "accelerator_memory_reserved_99th"):  # fmt: skip
                assert isinstance(trained[key], int)
            assert trained["accelerator_memory_max"] == run.memory.peak


def test_full_tuning_has_no_peft_configuration():
    run = MADE.runs[1].model_copy(update={"trainable": 100, "total": 100})
    assert peft.records([MADE.model_copy(update={"runs": [run]})])[0]["run_info"]["peft_config"] is None


@pytest.mark.parametrize("higher", [True, False])
def test_the_pareto_front_against_brute_force(higher):
    draw = random.Random(3)
    points = [(draw.randint(0, 20), draw.randint(0, 20)) for _ in range(60)]

    def beats(p, q):
        better = p[1] >= q[1] if higher else p[1] <= q[1]
        return p != q and p[0] <= q[0] and better

    expected = sorted({q for q in points if not any(beats(p, q) for p in points)})
    assert charts.pareto(points, higher) == expected


def test_a_difference_can_be_read_from_both_sides():
    a, b = MADE.differences[0].a, MADE.differences[0].b
    pairs = {(d.a, d.b): d for d in MADE.differences}
    there, back = charts.between(pairs, a, b), charts.between(pairs, b, a)
    assert (back.value, back.interval) == (-there.value, (-there.interval[1], -there.interval[0]))
    assert (back.a, back.b) == (b, a)
    assert charts.between(pairs, a, "nobody") is None


def test_curves_are_means_by_step_and_smoothing_keeps_a_constant():
    assert charts.across([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0), (2, 4.0)]
    flat = MADE.runs[1].model_copy(update={"train_curve": [(step, 1.5) for step in range(1, 2001)]})
    comparison = MADE.model_copy(update={"runs": [flat]})
    (curve,) = charts.curves_of(table.build([comparison])[0], "training")
    assert {round(value, 9) for _, value in curve} == {1.5}
    assert curve[0][0] == 1
    assert curve[-1][0] == 2000
    assert len(curve) <= 300


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.28e9, 1.7e9), (-0.31, 0.12), (3.001, 3.002), (0, 7)])
def test_ticks_are_round_evenly_spaced_and_inside(low, high):
    ticks = Axis("", low, high).ticks()
    assert 3 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_a_logarithmic_axis():
    axis = Axis.over([1e-4, 1e-2], "", log=True)
    assert axis.ticks() == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert axis.at(1e-3) == pytest.approx(0.5)
    assert not axis.holds(0.0)
    assert Axis.over([], "").ticks()  # an axis without values can still be drawn


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (amounts.size, 0, "0 B"), (amounts.size, 1490 << 20, "1,490 MiB"), (amounts.size, 24 << 30, "24.0 GiB"),
        (amounts.time, 0.0123, "12.3 ms"), (amounts.time, 59.94, "59.9 s"), (amounts.time, 185, "3 min 05 s"),
        (amounts.time, 7800, "2 h 10 min"), (amounts.share, 0.000343, "0.034 %"), (amounts.share, 0.0, "0 %"),
        (amounts.share, 0.034, "3.4 %"), (amounts.share, 1.0, "100 %"), (amounts.rate, 0.001, "1e-3"),
        (amounts.rate, 0.00025, "2.5e-4"), (amounts.rate, 0, "0"), (amounts.short, 2.6e13, "26.0 T"),
        (amounts.points, -0.045, "-4.5"), (amounts.percent, 0.655, "65.5 %"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(form, value, text):
    assert form(value) == text


def boxes(plot):
    """Left, top, right and bottom of what stands in a drawing: labels and marks apart."""
    labels, marks = [], []
    for node in plot.root.iter():
        if node.tag == "text" and "label" in node.get("class"):
            x, y, width = float(node.get("x")), float(node.get("y")), 7.0 * len(node.text)
            left = x - width if " end" in node.get("class") else x - width / 2 if "middle" in node.get("class") else x
            labels.append((left, y - 10, left + width, y + 2))
        elif node.tag == "circle":
            x, y, r = (float(node.get(key)) for key in ("cx", "cy", "r"))
            marks.append((x - r, y - r, x + r, y + r))
    return labels, marks


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_names_cover_neither_marks_nor_each_other_on_a_phone():
    points = {name: (i % 3 + 0.02 * i, 0.5 + 0.02 * (i % 4)) for i, name in enumerate(
        ["lora r=8", "lora r=16", "dora", "ia3", "adapter", "lora_plus", "bitfit", "rslora", "prefix"])}  # fmt: skip
    plot = Plot("", Axis.over([x for x, _ in points.values()], ""), Axis("", 0.3, 0.8), size=NARROW)
    for point in points.values():
        plot.dot(point, "dot")
    for name, point in points.items():
        plot.label(point, name, "series")
    labels, marks = boxes(plot)
    assert len(labels) == len(marks) == 9
    assert not any(overlap(a, b) for a in labels for b in marks)
    assert not any(overlap(a, b) for a, b in itertools.combinations(labels, 2))
    assert all(left >= 0 and right <= NARROW[0] for left, _, right, _ in labels)


def test_names_at_the_ends_of_lines_are_apart_and_inside():
    for values in ([0.0, 0.001, 0.002, 0.003], [1.0, 0.999, 0.998, 0.5], [0.1, 0.5, 0.9]):
        plot = Plot("", Axis("", 0, 10), Axis("", 0, 1), aside=6)
        plot.ends([((10, value), f"m{i}", "series") for i, value in enumerate(values)])
        labels, _ = boxes(plot)
        assert not any(overlap(a, b) for a, b in itertools.combinations(labels, 2))
        assert all(top >= 0 and bottom <= WIDE[1] - 40 and right <= WIDE[0] for _, top, right, bottom in labels)
        names = [node for node in plot.root.iter("text") if "label" in node.get("class")]
        names.sort(key=lambda node: float(node.get("y")))
        assert [values[int(node.text[1:])] for node in names] == sorted(values, reverse=True)


def test_a_name_without_room_is_cut_off_and_says_so():
    plot = Plot("", Axis("", 0, 1), Axis("", 0, 1), aside=8)
    plot.ends([((1, 0.5), "a very long name", "series"), ((1, 0.2), "short", "series")])
    assert [node.text for node in plot.root.iter("text") if "label" in node.get("class")] == ["a very …", "short"]


def test_a_chart_of_very_many_methods_names_the_first_ones():
    rows = table.build([fabricate(failed=False)])
    many = [
        dataclasses.replace(row, name=f"{row.name} {i}") for i in range(40) for row in rows if row.series is not None
    ]
    figure = charts.tradeoff(many, "peak_memory_bytes")
    assert figure.svg.count('class="label ') == 24
    assert "24 of 240 are named" in figure.note
    _, each = charts.losses(many)
    assert len(each) == 24
