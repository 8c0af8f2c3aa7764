import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricate import fabricate, many

from adapterlab.cli import main
from adapterlab.compare.recommending import recommend
from adapterlab.compare.report import page, picture, rebuild, table, write
from adapterlab.compare.results import Comparison, Exam, Sample
from adapterlab.compare.summary import summarise
from adapterlab.errors import ConfigError, FormatError, OutputError

VOID = {"meta", "link", "wbr", "br", "hr", "img", "input"}
NASTY = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\""
SOURCES = Path(page.__file__).parent


class Tree(HTMLParser):
    """Checks the nesting and collects what matters."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("src", "href", "action", "data") if key in given]
        assert not any(key.startswith("on") for key in given), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


def made(**changes) -> Comparison:
    return fabricate().model_copy(update=changes)


def test_the_page_is_well_formed_and_needs_no_network():
    text = page.page([fabricate(running=True)])
    tree = Tree(text)
    assert len(set(tree.ids)) == len(tree.ids)
    assert all(link.startswith(("#", "data:,")) for link in tree.links)
    assert {link[1:] for link in tree.links if link.startswith("#")} <= set(tree.ids)
    assert "://" not in text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert tree.tags.count("script") == 1


def test_every_part_is_there():
    text = page.page([fabricate()])
    for section in ("advice", "table", "charts", "differences", "rates", "answers", "configuration"):
        assert f'<section id="{section}"' in text
    for title in ("Score against peak memory", "Score against training time"):
        assert f"<h4>{title}</h4>" in text
    assert "<h3>Loss of each method</h3>" in text
    assert 'class="front"' in text
    assert "cannot be told apart" in text
    assert "failed: NotTrainingError: 120 of 120" in text
    assert "model: smollm2-135m\n" in text


def test_text_from_data_stays_text():
    base = fabricate()
    sample = Sample(row=0, prompt=NASTY, reference=NASTY, answer=NASTY, right=False)
    exam = Exam(**{**dict(base.runs[0].best), "samples": [sample]})
    names = {"label": NASTY, "key": "x"}
    runs = [run.model_copy(update={**names, "best": exam}) if run.label == "dora" else run for run in base.runs]
    runs = [run.model_copy(update={"reason": NASTY}) if run.status == "failed" else run for run in runs]
    rename = {"dora": NASTY}
    standings = [s.model_copy(update={"label": rename.get(s.label, s.label), "tied": [NASTY]}) for s in base.standings]
    differences = [
        d.model_copy(update={"a": rename.get(d.a, d.a), "b": rename.get(d.b, d.b)}) for d in base.differences
    ]
    searches = [s.model_copy(update={"label": rename.get(s.label, s.label)}) for s in base.searches]
    advice = base.recommendation.model_copy(update={"text": NASTY, "best": NASTY, "undecided": [NASTY]})
    comparison = base.model_copy(
        update={"name": NASTY, "runs": runs, "standings": standings, "differences": differences, "git": NASTY,
                "searches": searches, "recommendation": advice, "config": {NASTY: [NASTY]}, "platform": NASTY,
                "data": {"source": NASTY}, "model": {"name": NASTY}, "conditions": {NASTY: NASTY}}
    )  # fmt: skip
    tree = Tree(page.page([comparison, fabricate("other")]))
    assert tree.tags.count("script") == 1
    assert "img" not in tree.tags
    assert "".join(tree.words).count(NASTY) > 10


def test_a_comparison_without_anything_finished_can_be_shown():
    run = fabricate(running=True).runs[-1]
    bare = Comparison(name="new", started="2026-01-02T03:04:05", updated="", finished=False, config={}, judge="score",
                      runs=[run])  # fmt: skip
    text = page.page([bare])
    Tree(text)
    assert "new is not finished: 1 of 1 runs are still to be done." in text
    assert '<section id="charts"' not in text


def test_where_answers_are_not_scored_loss_is_what_is_drawn():
    def unscored(exam):
        samples = [s.model_copy(update={"right": None}) for s in exam.samples]
        return exam.model_copy(update={"score": None, "interval": None, "right": [], "samples": samples})

    base = fabricate(judge="loss", failed=False)
    runs = [r.model_copy(update={"best": unscored(r.best), "final": unscored(r.final)}) for r in base.runs]
    text = page.page([base.model_copy(update={"runs": runs})])
    Tree(text)
    assert "<h4>Evaluation loss against peak memory</h4>" in text
    assert "score, best</button>" not in text
    assert '<section id="answers"' in text
    assert "✓ right" not in text
    assert "✗ wrong" not in text


def test_with_one_seed_sets_of_weights_are_compared():
    for judge in ("score", "loss"):
        assert not any("one seed" in notice for notice in page.notices([fabricate(judge=judge)]))
        one = fabricate(judge=judge, seeds=1)
        assert any("one seed" in notice and "not the methods" in notice for notice in page.notices([one]))
        assert "another seed may order them otherwise" in recommend(one).text
        assert "beyond doubt" not in recommend(one).text


def test_several_folders_stand_side_by_side():
    same = page.page([fabricate("first"), fabricate("second")])
    assert "ranked together" in same
    assert same.count("<h4>Score against peak memory</h4>") == 1
    other = page.page([fabricate("first"), fabricate("second", fingerprint="0" * 64)])
    assert "cannot be ranked together" in other
    assert other.count("<h4>Score against peak memory</h4>") == 2
    for text in (same, other):
        Tree(text)
        assert '<td data-v="second">second</td>' in text


def test_few_curves_share_a_chart_and_many_have_one_each():
    few = page.page([fabricate(methods=("dora", "ia3", "bitfit"))])
    assert few.count("<h4>Validation loss</h4>") == few.count("<h4>Training loss</h4>") == 1
    assert "Loss of each method" not in few
    for name in ("dora", "ia3", "bitfit"):  # named at the end of its line, on the desk and on the phone, in two charts
        assert len(re.findall(rf'<text class="label series [^>]*>{name}</text>', few)) >= 4
    many = page.page([fabricate()])
    assert "<h4>Validation loss</h4>" not in many
    many = many[many.index("Loss of each method") : many.index('<section id="differences"')]
    for row in table.build([fabricate(failed=False)]):
        own = row.series is not None
        assert len(re.findall(rf'<polyline class="line series {row.css}"', many)) == own
        assert len(re.findall(rf'<polyline class="context {row.css}"', many)) == 5 * own  # behind each of the others


def test_the_untrained_model_is_named_and_does_not_squeeze_the_others():
    base = fabricate(failed=False, methods=("lora r=16", "dora"))
    text = page.page([base])
    shown = base.runs[0].best.score
    assert f">▼ untrained {100 * shown:.1f} %</text>" in text
    assert not re.search(r'<text class="tick end"[^>]*>0 %</text>', text)
    forest = text[text.index("Difference to dora") :]
    assert re.search(r'<text class="label base"[^>]*>◀ -\d', forest)
    near = base.model_copy(
        update={"runs": [base.runs[0].model_copy(update={"best": base.runs[1].best}), *base.runs[1:]]}
    )
    assert 'class="base dashed"' in page.page([near])


def test_conditions_that_differ_are_pointed_out():
    for change in ({"device": "mps"}, {"threads of each run": 8}):
        other = fabricate("other")
        other = other.model_copy(update={"conditions": {**other.conditions, **change}})
        assert any("different conditions" in notice for notice in page.notices([fabricate("fast"), other]))
    assert not any("different conditions" in notice for notice in page.notices([fabricate("a"), fabricate("b")]))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_valid():
    subprocess.run(["node", "--check", str(SOURCES / "page.js")], check=True)


def test_a_report_comes_from_the_records_alone(tmp_path):
    comparison = fabricate()
    comparison.save(tmp_path)
    written = {file.name for file in rebuild([tmp_path])}
    assert {"report.html", "results.json", "table.md", "table.csv"} <= written
    assert ("loss_curves.png" in written) == picture.can_draw()
    first = (tmp_path / "report.html").read_bytes()
    assert len(first) < 400_000
    rebuild([tmp_path])
    assert (tmp_path / "report.html").read_bytes() == first
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(comparison.runs)
    assert comparison.recommendation.text in (tmp_path / "table.md").read_text()
    assert len(list(csv.reader((tmp_path / "table.csv").open()))) == 1 + len(comparison.labels)
    if picture.can_draw():
        assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("name", ["report.html", "table.csv"])
def test_files_of_others_are_left_alone(name, tmp_path):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(OutputError, match="not from adapterlab"):
        write(fabricate(), tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["theirs"]


def test_without_matplotlib_all_but_the_picture_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "can_draw", lambda: False)
    names = {file.name for file in write(fabricate(), tmp_path)}
    assert names == {"report.html", "results.json", "table.md", "table.csv"} == {f.name for f in tmp_path.iterdir()}


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    write([fabricate("run"), fabricate("run", fingerprint="0" * 64)], tmp_path)
    names = {line[0] for line in csv.reader((tmp_path / "table.csv").open())}
    assert names == {"comparison", "run (1)", "run (2)"}


def test_bad_input(tmp_path):
    for name in ("a", "b"):
        fabricate(name).save(tmp_path / name)
    with pytest.raises(ConfigError, match="--output FOLDER"):
        rebuild([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="received twice"):
        rebuild([tmp_path / "a", tmp_path / "b" / ".." / "a"], tmp_path / "out")
    with pytest.raises(FormatError, match=r"holds no comparison.*adapterlab compare"):
        rebuild([tmp_path])
    with pytest.raises(ConfigError, match="adapterlab compare"):
        write([], tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    fabricate("a").save(tmp_path / "a")
    with pytest.raises(SystemExit) as leaving:
        main(["report", str(tmp_path / "a"), "--output", str(tmp_path / "out"), "--json"])
    assert leaving.value.code == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert tmp_path / "out" / "report.html" in files
    assert all(file.is_file() for file in files)
    with pytest.raises(SystemExit) as leaving:
        main(["report", str(tmp_path / "nothing")])
    assert leaving.value.code == 2
    assert "holds no comparison" in capsys.readouterr().err


def test_a_page_of_very_many_methods_can_be_loaded():
    facts, runs = many(130, seeds=1, steps=6, rows=10)
    whole = summarise(runs, **facts | {"finished": False})
    assert {d.a for d in whole.differences} == {whole.standings[0].label, "untrained"}
    rows = page.table.build([whole])
    text = page.page([whole], rows)
    assert "each is compared with" in text
    assert text.count("<tr") < 130 + 101 + 2 * 101 + 10, "the table has all, the rest is of the best"
    assert len(text) < 4e6
    assert len(page.table.foremost(rows)) == 101


def test_writing_a_report_again_needs_no_torch():
    code = "import sys, adapterlab.cli.report, adapterlab.compare.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
