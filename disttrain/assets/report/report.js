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

// Says where a table goes on beyond its frame, and lets the keyboard scroll it.
(() => {
  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    const more = target.scrollWidth > target.clientWidth;
    target.classList.toggle("more", more);
    for (const [name, value] of [["tabindex", 0], ["role", "group"], ["aria-label", "Table that scrolls sideways"]]) {
      if (more) target.setAttribute(name, value);
      else target.removeAttribute(name);
    }
  }));
  for (const frame of document.querySelectorAll(".wide")) resized.observe(frame);
})();

// Shows an image large, as large as the window allows.
(() => {
  const dialog = document.createElement("dialog"), close = document.createElement("button");
  dialog.ariaLabel = "Enlarged image";
  Object.assign(close, { type: "button", textContent: "close" });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const image = button.firstElementChild.cloneNode(), text = document.createElement("p");
      text.textContent = image.alt;
      const scale = Math.min((0.85 * innerWidth) / image.width, (0.7 * innerHeight) / image.height);
      image.style.width = `${image.width * (scale > 1 ? Math.floor(scale) : scale)}px`;
      dialog.replaceChildren(image, text, close);
      dialog.showModal();
    });
  }
})();

// A printed page has all details.
(() => {
  function unfold(open) {
    for (const part of document.querySelectorAll("details.print")) part.open = open;
  }

  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));
})();
