// Sorts and searches tables.
(() => {
  const number = (text) => (/^[\d.,]+( %)?$/.test(text) ? Number(text.replace(/[, %]/g, "")) : null);

  function order(table, column, sign) {
    const cell = (row) => row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].map((row) => [cell(row), number(cell(row)), row]);
    const numeric = rows.some(([, value]) => value !== null);
    const unknown = ([text, value]) => (numeric ? value === null : text === "");
    rows.sort((a, b) => unknown(a) - unknown(b) ||
      sign * (numeric ? a[1] - b[1] : a[0].localeCompare(b[0], undefined, { numeric: true })));
    table.tBodies[0].append(...rows.map(([, , row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.querySelectorAll("th")];
    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.ariaSort !== "ascending";
        for (const other of heads) other.ariaSort = null;
        head.ariaSort = up ? "ascending" : "descending";
        order(table, head.cellIndex, up ? 1 : -1);
      });
    }
    const rows = [...table.tBodies[0].rows];
    if (rows.length <= 30) continue;
    const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "find a class" });
    search.ariaLabel = search.placeholder;
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    });
    table.parentElement.before(search);
  }
})();

// Gives the charts the colours of the page, also when it turns dark or is printed, and leaves dragging to
// scrolling where there is no mouse.
(() => {
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const [text, soft, line] = ["--text", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    for (const model of Bokeh.documents.flatMap((page) => [...page.all_models])) {
      if (model.type.endsWith("Axis")) {
        model.setv({
          axis_label_text_color: soft, major_label_text_color: text, axis_line_color: soft,
          major_tick_line_color: soft, minor_tick_line_color: null,
        });
      } else if (model.type === "Grid") {
        model.setv({ grid_line_color: line, grid_line_alpha: 0.7 });
      } else if (model.type === "Legend") {
        model.setv({ label_text_color: text, inactive_fill_alpha: 0.6, inactive_fill_color: line });
      } else if (model.type === "BoxZoomTool" && touch.matches) {
        model.active = false;
      }
    }
  }

  function unfold(open) {
    for (const part of document.querySelectorAll("details.print")) part.open = open;
  }

  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));
  if (!window.Bokeh) return;
  dark.addEventListener("change", paint);
  const drawn = setInterval(() => {
    if (Bokeh.documents.length === 0) return;
    clearInterval(drawn);
    paint();
  }, 10);
})();
