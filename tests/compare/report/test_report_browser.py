"""The page in headless Chromium. Anything that writes to the console counts as an error."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest
from fabricate import fabricate

from adapterlab.compare.report.page import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs Chromium: none of {', '.join(NAMES)} is installed")

FRAME = """<!DOCTYPE html><title>frame</title><body style="margin:0">
<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="outcome"></pre><script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const outcome = {{}};
  {script}
  document.getElementById("outcome").textContent = JSON.stringify(outcome);
}});
</script>"""


def visit(folder, text, script, width=1200):
    """Open a page, run a script on it, and return what the script found and what the console said."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width, script=script), encoding="utf-8")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=4000", "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found[1]) or "null"), console


def test_it_renders_sorts_and_keeps_the_console_clean(tmp_path):
    script = """
      const column = (i) => [...all("#table tbody")[0].rows].map((tr) => tr.cells[i].dataset.v);
      const header = (i) => all("#table thead")[0].rows[0].cells[i];
      const press = (i) => { header(i).querySelector("button").click(); return column(i); };
      const shown = (node) => view.getComputedStyle(node).display !== "none";
      outcome.before = column(1);
      outcome.memory = press(7);
      outcome.direction = header(7).getAttribute("aria-sort");
      outcome.memoryAgain = press(7);
      outcome.score = press(2);
      outcome.sorted = all("#table thead")[0].querySelectorAll("[aria-sort]").length;
      outcome.names = press(0);
      const extra = all("#table th.extra")[0];
      outcome.extraBefore = shown(extra);
      all("[data-columns=all]")[0].click();
      outcome.extraAfter = shown(extra);
      outcome.drawings = all(".chart svg").filter((svg) => svg.getBoundingClientRect().height > 50).length;
      const key = all(".key")[0], mark = all(`.charts .${key.dataset.series}`)[0];
      outcome.markBefore = shown(mark);
      key.click();
      outcome.markAfter = shown(mark);
      outcome.pressed = key.getAttribute("aria-pressed");
      const select = all(".forest select")[0];
      select.selectedIndex = 2;
      select.dispatchEvent(new view.Event("change"));
      outcome.forest = all(".forest .chart").filter(shown).map((figure) => figure.dataset.key);
      outcome.chosen = select.value;
      const ground = () => view.getComputedStyle(page.body).backgroundColor;
      const before = ground();
      all("#theme")[0].click();
      outcome.themed = before !== ground();
      const dot = all(".charts circle.dot")[0], box = dot.getBoundingClientRect();
      dot.dispatchEvent(new view.PointerEvent("pointermove", { bubbles: true, clientX: box.x, clientY: box.y }));
      outcome.tip = all("#tip.shown").map((node) => node.textContent).join();
    """
    found, console = visit(tmp_path, page([fabricate()]), script)
    assert console == []
    assert found["before"][-1] == ""
    assert found["before"][:-1] == sorted(found["before"][:-1], key=int)
    memory = [float(value) for value in found["memory"] if value]
    assert memory == sorted(memory)
    assert found["direction"] == "ascending"
    assert [float(v) for v in found["memoryAgain"] if v] == sorted(memory, reverse=True)
    # What is missing stays at the end whichever way the table is sorted.
    assert found["memory"][-1] == found["memoryAgain"][-1] == found["score"][-1] == ""
    scores = [float(value) for value in found["score"] if value]
    assert scores == sorted(scores, reverse=True)
    assert found["sorted"] == 1
    assert found["names"] == [
        "bitfit",
        "dora",
        "ia3",
        "lora r=8",
        "lora r=16",
        "lora r=512",
        "prefix_tuning",
        "untrained",
    ]
    assert (found["extraBefore"], found["extraAfter"]) == (False, True)
    assert found["drawings"] == 2 + 6 + 1 + 6  # charts, losses, the differences shown, a learning-rate search each
    assert (found["markBefore"], found["markAfter"], found["pressed"]) == (True, False, "false")
    assert found["forest"] == [found["chosen"]]
    assert found["themed"]
    assert ":" in found["tip"]


@pytest.mark.parametrize("width", [360, 390])
def test_it_fits_a_phone(tmp_path, width):
    script = """
      outcome.width = page.documentElement.scrollWidth;
      const pane = all("#table .scroll")[0], cell = all("#table tbody th")[0];
      const before = cell.getBoundingClientRect().x;
      pane.scrollLeft = 150;
      outcome.scrolled = pane.scrollLeft;
      outcome.stays = Math.abs(cell.getBoundingClientRect().x - before) < 1;
      outcome.hint = view.getComputedStyle(all("#table .more")[0]).visibility;
      const seen = (node) => node.getBoundingClientRect().height > 50;
      outcome.drawings = [all(".on-wide svg").filter(seen).length, all(".on-narrow svg").filter(seen).length];
      outcome.letters = all(".charts .on-narrow svg")
        .map((svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width);
      outcome.share = cell.getBoundingClientRect().width / view.innerWidth;
      outcome.wide = all("main *").filter((node) => !node.closest(".scroll, pre, svg, .legend, .unseen")
        && node.getBoundingClientRect().right > view.innerWidth + 1).map((node) => node.outerHTML.slice(0, 80));
    """
    found, console = visit(tmp_path, page([fabricate(), fabricate("second", fingerprint="0" * 64)]), script, width)
    assert console == []
    assert found["wide"] == []
    assert found["width"] <= width
    assert found["scrolled"] == 150
    assert found["stays"]
    assert found["share"] < 0.5
    assert found["hint"] == "visible"
    assert found["drawings"] == [0, 4 + 2]  # two charts and the differences shown, for each of two sets of rows
    assert min(found["letters"]) > 0.85  # of their own size: legible


def test_contrast_of_text_in_both_themes(tmp_path):
    script = """
      const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      const light = (colour) => parts(colour).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const ground = (node) => {
        const colour = view.getComputedStyle(node).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" && node.parentElement ? ground(node.parentElement) : colour;
      };
      const ratio = (node) => {
        const style = view.getComputedStyle(node), fill = node.closest("svg") ? style.fill : style.color;
        const [a, b] = [light(fill), light(ground(node.closest("svg") ?? node))].sort((p, q) => q - p);
        return (a + 0.05) / (b + 0.05);
      };
      for (const theme of ["light", "dark"]) {
        page.documentElement.dataset.theme = theme;
        outcome[theme] = all("dt, dd, td, td small, th button, .remark, .verdict, figcaption, a, .label, .tick, .note")
          .map((node) => [ratio(node), node.outerHTML.slice(0, 90)]).sort((p, q) => p[0] - q[0]).slice(0, 3);
      }
    """
    found, console = visit(tmp_path, page([fabricate()]), script)
    assert console == []
    for theme in ("light", "dark"):
        assert found[theme][0][0] >= 4.5, found[theme]


def test_an_error_in_a_script_would_be_seen(tmp_path):
    text = page([fabricate()]).replace("</body>", "<script>missing.call()</script></body>")
    _, console = visit(tmp_path, text, "")
    assert any("missing is not defined" in line for line in console)
