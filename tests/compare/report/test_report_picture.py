"""The picture, panel by panel."""

import pytest
from fabricate import CLASSIC, METHODS, fabricate, many

from adapterlab.compare.report import picture, table
from adapterlab.compare.report.table import foremost
from adapterlab.compare.summary import summarise

pytestmark = pytest.mark.skipif(not picture.can_draw(), reason="needs matplotlib")


def drawn(comparison):
    return picture.figure([foremost(table.build([comparison]))])


def without_memory(comparison):
    return comparison.model_copy(update={"runs": [run.model_copy(update={"memory": None}) for run in comparison.runs]})


def titles(figure):
    return [panel.get_title() for panel in figure.axes if panel.get_visible()]


def widths(figure):
    """Of the panels, as shares of the picture."""
    figure.draw_without_rendering()
    return [panel.get_window_extent().width / figure.bbox.width for panel in figure.axes]


def test_a_panel_with_nothing_to_show_is_not_there_and_the_others_take_its_room():
    few = fabricate(methods=("dora", "ia3"), failed=False)
    assert titles(drawn(few)) == ["Training loss", "Validation loss", "Score against memory"]
    bare = drawn(without_memory(few))
    assert titles(bare) == ["Training loss", "Validation loss"]
    assert min(widths(bare)) > 0.4
    unseen = [run.model_copy(update={"eval_curve": []}) for run in few.runs]
    assert titles(drawn(few.model_copy(update={"runs": unseen}))) == ["Training loss", "Score against memory"]
    assert len(titles(drawn(without_memory(fabricate(failed=False))))) == len(METHODS)
    nothing = drawn(few.model_copy(update={"runs": few.runs[:1]}))
    assert nothing.axes == []
    assert [text.get_text() for text in nothing.subfigs[0].texts] == ["No run has anything to show yet."]


def test_ticks_are_round_on_a_logarithmic_scale():
    made = fabricate(methods=("dora", "ia3"), failed=False)
    curve = [(step, 4.2 if step == 1 else 0.8) for step in range(1, 61)]
    runs = [run.model_copy(update={"train_curve": curve}) for run in made.runs]
    panel = drawn(made.model_copy(update={"runs": runs})).axes[0]
    assert panel.get_yscale() == "log"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "2", "3", "4"]
    assert panel.get_yticklabels(minor=True) == []


def test_more_methods_than_can_be_shown_are_counted_with_the_rule_that_chose():
    twelve = drawn(fabricate(methods=tuple(CLASSIC), failed=True))
    assert len(titles(twelve)) == 12 + 1
    assert [part.get_suptitle() for part in twelve.subfigs] == [""]
    facts, runs = many(13, seeds=1, steps=10, rows=10)
    made = summarise(runs, **facts)
    figure = drawn(made)
    assert len(titles(figure)) == 12 + 1
    best = [s.label for s in made.standings if s.rank is not None and s.label != "untrained"]
    assert {title.split(",")[0] for title in titles(figure)[:-1]} == set(best[:12])
    note = "12 of 13 methods are shown, the first ones by rank. Not shown: 1"
    assert figure.subfigs[0].get_suptitle() == f"{note} (grey in the last panel)."
    assert drawn(without_memory(made)).subfigs[0].get_suptitle() == f"{note}."


def test_each_of_many_methods_has_its_training_curve():
    figure = drawn(fabricate(failed=False))
    for panel in figure.axes[: len(METHODS)]:
        lines = [line for line in panel.get_lines() if line.get_color() != "0.82"]
        assert sorted(line.get_linestyle() for line in lines) == ["-", "--"]


def test_what_lies_far_outside_is_an_arrow_at_the_edge_and_stays_in_the_legend():
    figure = drawn(fabricate(methods=tuple(CLASSIC), failed=False))
    panel = figure.axes[-1]
    written = [text.get_text() for text in panel.texts]
    assert [text for text in written if text.startswith("full 4,2")]
    assert [text for text in written if text.startswith("untrained ")]
    assert "full" in {text.get_text() for text in panel.get_legend().get_texts()}
    assert panel.get_xlim()[1] < 2500
    assert [line.get_marker() for line in panel.get_lines() if not line.get_clip_on()] == ["v", ">"]
