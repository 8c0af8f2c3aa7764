"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // Theme: the system's, until the reader chooses. Storage may be closed to local files.
  const remembered = (value) => {
    try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; }
  };
  const saved = remembered();
  if (saved) root.dataset.theme = saved;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remembered(root.dataset.theme);
  });

  // Sorting: by data-v where a cell has it. What is missing stays at the end, equal rows keep their order.
  const valueOf = (row, index) => {
    const cell = row.cells[index];
    return cell.dataset.v ?? cell.textContent.trim();
  };
  const compare = (a, b, numeric) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const sort = (table, header) => {
    const index = header.cellIndex;
    const first = header.dataset.first ?? "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = header.getAttribute("aria-sort") === first ? other : first;
    all("th[aria-sort]", table.tHead).forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const numeric = header.classList.contains("num");
    const rows = [...table.tBodies[0].rows].sort((p, q) => {
      const [a, b] = [valueOf(p, index), valueOf(q, index)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * compare(a, b, numeric);
    });
    table.tBodies[0].append(...rows);
  };
  for (const table of all("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      header.querySelector("button").addEventListener("click", () => sort(table, header));
    }
  }

  // Tables wider than the screen say so, until their last column is seen.
  const panes = all(".pane");
  const measure = (pane) => {
    const scroll = pane.querySelector(".scroll");
    pane.classList.toggle("wider", scroll.clientWidth < scroll.scrollWidth - 2);
    pane.classList.toggle("cut", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 2);
  };
  const watched = new ResizeObserver((seen) => seen.forEach((one) => measure(one.target.closest(".pane"))));
  for (const pane of panes) {
    pane.querySelector(".scroll").addEventListener("scroll", () => measure(pane), { passive: true });
    watched.observe(pane.querySelector(".scroll"));
    watched.observe(pane.querySelector("table"));
  }

  // Columns of the main table.
  const main = document.querySelector("#table table");
  main.classList.add("few");
  const buttons = all("[data-columns]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      main.classList.toggle("few", button.dataset.columns === "few");
      buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    });
  }
  panes.forEach(measure); // observers report late where the machine is busy

  // Legend: press to hide a method in its group's charts, point at it to see it alone.
  for (const group of all(".group")) {
    for (const key of all(".key", group)) {
      const drawn = () => all(`.chart .${key.dataset.series}`, group);
      key.addEventListener("click", () => {
        const shown = key.getAttribute("aria-pressed") !== "true";
        key.setAttribute("aria-pressed", String(shown));
        drawn().forEach((node) => node.classList.toggle("off", !shown));
      });
      const focus = (on) => () => {
        group.classList.toggle("focus", on);
        drawn().forEach((node) => node.classList.toggle("on", on));
      };
      key.addEventListener("pointerenter", focus(true));
      key.addEventListener("pointerleave", focus(false));
      key.addEventListener("focus", focus(true));
      key.addEventListener("blur", focus(false));
    }
  }

  // Differences: which method the others are compared with.
  for (const forest of all(".forest")) {
    const select = forest.querySelector("select");
    select.addEventListener("change", () => {
      for (const figure of all(".chart", forest)) figure.classList.toggle("off", figure.dataset.key !== select.value);
    });
  }

  // Tips: the titles inside drawings, shown at once and on touch as well.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const show = (event) => {
    const node = event.target instanceof Element ? event.target.closest(".chart svg *") : null;
    const title = node?.querySelector(":scope > title");
    if (title) node.dataset.tip = title.textContent;
    if (title) title.remove();
    const text = node?.dataset.tip ?? "";
    tip.classList.toggle("shown", text !== "");
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 12)}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => tip.classList.remove("shown"), { passive: true });

  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.closest(".configuration").querySelector("pre").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(button.closest(".configuration").querySelector("pre"));
        button.textContent = "Selected: press Ctrl C";
      }
    });
  }
})();
