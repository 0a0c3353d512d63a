// Draws the confusion matrix of many classes on a canvas: a square part of it, which can be zoomed and moved.
(() => {
  const figure = document.getElementById("matrix");
  const canvas = figure.querySelector("canvas"), pen = canvas.getContext("2d");
  const says = figure.querySelector("output"), wanted = figure.querySelector("input");
  const { names, rows } = JSON.parse(document.getElementById("matrix-data").textContent);
  const most = names.length, least = 8; // classes along a side of the shown part
  const tones = 12; // of the shares of a row
  const groups = [], found = new Map(), totals = []; // groups: cells of one colour, the strongest last
  rows.forEach((row, label) => {
    totals[label] = row.reduce((sum, value, place) => sum + (place % 2 ? value : 0), 0);
    for (let place = 0; place < row.length; place += 2) {
      const [guess, count] = [row[place], row[place + 1]];
      const tone = Math.ceil(tones * Math.sqrt(count / totals[label])), kind = 2 * tone + (label === guess);
      (groups[kind] ??= { tone: tone / tones, right: label === guess, cells: [] }).cells.push({ label, guess, count });
      found.set(label * most + guess, count);
    }
  });

  const whole = { left: 0, top: 0, size: most };
  const base = document.createElement("canvas"); // the cells, which stay as they are while a pointer moves
  let part = whole, chosen = null, box = null, area;

  const cut = (text, room) => {
    if (pen.measureText(text).width <= room) return text;
    let end = Math.min(text.length, Math.ceil(room / 3));
    while (end > 1 && pen.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
    return `${text.slice(0, end).trimEnd()}…`;
  };

  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();

  function draw() {
    const width = canvas.clientWidth;
    if (width < 150) return; // no room, as in a hidden frame
    const margin = Math.min(168, Math.max(96, 0.22 * width)), side = width - margin - 8;
    const height = margin + side + 8, zoom = devicePixelRatio || 1;
    area = { width, height, margin, side, zoom, scale: side / part.size };
    canvas.style.height = `${height}px`;
    for (const each of [canvas, base]) [each.width, each.height] = [Math.round(width * zoom), Math.round(height * zoom)];
    canvas.classList.toggle("zoomed", part.size < most);
    drawCells(base.getContext("2d"));
    drawRest();
  }

  function drawCells(pen) {
    const { width, height, margin, side, zoom, scale } = area;
    pen.scale(zoom, zoom);
    pen.beginPath();
    pen.rect(margin, margin, side, side);
    pen.clip();
    pen.fillStyle = color("--panel");
    pen.fillRect(margin, margin, side, side);
    pen.strokeStyle = color("--line");
    for (let n = 0; scale >= 9 && n <= Math.ceil(part.size); n += 1) {
      const x = margin + (Math.floor(part.left) + n - part.left) * scale;
      const y = margin + (Math.floor(part.top) + n - part.top) * scale;
      pen.strokeRect(x, margin, 0, side);
      pen.strokeRect(margin, y, side, 0);
    }
    const dot = Math.max(scale, 1.5); // a cell must be seen
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const { tone, right, cells } of groups.filter(Boolean)) {
      const shown = cells
        .map(({ label, guess, count }) => [margin + (guess - part.left) * scale, margin + (label - part.top) * scale, count])
        .filter(([x, y]) => x > margin - dot && y > margin - dot && x < width && y < height);
      pen.beginPath();
      for (const [x, y] of shown) pen.rect(x, y, dot, dot);
      pen.fillStyle = `rgba(${right ? "31, 146, 84" : color("--heat")}, ${0.25 + 0.75 * tone})`;
      pen.fill();
      if (scale < 17) continue;
      pen.fillStyle = color("--text");
      for (const [x, y, count] of shown) pen.fillText(count.toLocaleString("en"), x + scale / 2, y + scale / 2);
    }
  }

  function drawRest() { // what depends on the pointer
    if (!area) return;
    const { width, height, margin, side, zoom, scale } = area;
    pen.setTransform(zoom, 0, 0, zoom, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.drawImage(base, 0, 0, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(margin, margin, side, side);
    pen.clip();
    pen.lineWidth = 1.5;
    if (chosen) {
      const room = Math.max(scale, 7), off = (room - scale) / 2;
      const x = margin + (chosen.guess - part.left) * scale, y = margin + (chosen.label - part.top) * scale;
      pen.strokeStyle = color("--text");
      pen.strokeRect(x - off, y - off, room, room);
    }
    if (box) {
      pen.strokeStyle = color("--link");
      pen.strokeRect(box.x, box.y, box.side, box.side);
    }
    pen.restore();

    pen.strokeStyle = color("--soft");
    pen.lineWidth = 1;
    pen.strokeRect(margin + 0.5, margin + 0.5, side, side);
    pen.textBaseline = "middle";
    const step = Math.ceil(15 / scale);
    for (let n = 0; n <= Math.ceil(part.size); n += 1) {
      axisName(Math.floor(part.top) + n, part.top, step, chosen?.label, (name, at) => {
        pen.textAlign = "right";
        pen.fillText(name, margin - 5, at);
      });
      axisName(Math.floor(part.left) + n, part.left, step, chosen?.guess, (name, at) => {
        pen.save();
        pen.translate(at, margin - 5);
        pen.rotate(-Math.PI / 2);
        pen.textAlign = "left";
        pen.fillText(name, 0, 0);
        pen.restore();
      });
    }
    pen.fillStyle = color("--soft");
    pen.font = "bold 13px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.fillText("predicted", margin + side / 2, 8);
    pen.translate(8, margin + side / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("true", 0, 0);
  }

  // The name of a class beside an axis, where there is room: that of a chosen class, or every step-th one.
  function axisName(label, begin, step, mine, write) {
    const at = area.margin + (label + 0.5 - begin) * area.scale;
    if (label >= most || at < area.margin || at > area.margin + area.side) return;
    const near = mine !== undefined && Math.abs(label - mine) * area.scale < 13;
    if (label !== mine && (label % step || near)) return;
    pen.font = `${label === mine ? "bold " : ""}12px system-ui, sans-serif`;
    pen.fillStyle = color(label === mine ? "--text" : "--soft");
    write(cut(names[label], area.margin - 26), at);
  }

  function look(size, x, y) { // at a part with this side around a place, both in classes
    const side = Math.min(most, Math.max(Math.min(least, most), size));
    const inside = (begin) => Math.min(most - side, Math.max(0, begin));
    part = { left: inside(x - side / 2), top: inside(y - side / 2), size: side };
    draw();
  }

  const middle = () => [part.left + part.size / 2, part.top + part.size / 2];
  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function choose(label, guess) {
    chosen = { label, guess };
    const images = found.get(label * most + guess) ?? 0;
    const of = totals[label] ? ` (${percent(images / totals[label])} of the ${totals[label].toLocaleString("en")} of this class)` : "";
    says.textContent = label === guess
      ? `true and predicted: ${names[label]}: ${images.toLocaleString("en")} images${of}`
      : `true: ${names[label]}, predicted: ${names[guess]}: ${images.toLocaleString("en")} images${of}`;
    drawRest();
  }

  const place = (event) => { // of a pointer, in pixels of the canvas and in classes
    const frame = canvas.getBoundingClientRect();
    const x = event.clientX - frame.left, y = event.clientY - frame.top;
    return { x, y, guess: part.left + (x - area.margin) / area.scale, label: part.top + (y - area.margin) / area.scale };
  };

  function pick(at) { // the cell at a place, or the nearest with images within a few pixels
    const label = Math.floor(at.label), guess = Math.floor(at.guess);
    if (label < 0 || guess < 0 || label >= most || guess >= most) return;
    let best = { label, guess }, reach = found.has(label * most + guess) ? 0 : 5 / area.scale;
    for (let y = Math.floor(label - reach); reach > 1 && y <= label + reach; y += 1) {
      for (let x = Math.floor(guess - reach); x <= guess + reach; x += 1) {
        const far = Math.hypot(x - guess, y - label);
        if (x >= 0 && x < most && found.has(y * most + x) && far < reach) [best, reach] = [{ label: y, guess: x }, far];
      }
    }
    if (chosen?.label !== best.label || chosen.guess !== best.guess) choose(best.label, best.guess);
  }

  let held = null; // where a pointer went down
  canvas.addEventListener("pointerdown", (event) => {
    held = place(event);
    if (event.pointerType === "mouse" || part.size < most) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = place(event);
    if (!held) return event.pointerType === "mouse" ? pick(now) : undefined;
    if (event.pointerType === "mouse") {
      const side = Math.max(Math.abs(now.x - held.x), Math.abs(now.y - held.y));
      box = { x: now.x < held.x ? held.x - side : held.x, y: now.y < held.y ? held.y - side : held.y, side };
      drawRest();
    } else if (part.size < most) {
      const [x, y] = middle();
      look(part.size, x + held.guess - now.guess, y + held.label - now.label);
      held.moved = true;
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const drawn = box, tapped = held && !held.moved;
    [held, box] = [null, null];
    if (drawn && drawn.side > 6) {
      const half = drawn.side / 2 / area.scale;
      const left = part.left + (drawn.x - area.margin) / area.scale, top = part.top + (drawn.y - area.margin) / area.scale;
      look(2 * half, left + half, top + half);
    } else if (tapped) {
      pick(place(event));
    }
  });
  canvas.addEventListener("pointercancel", () => { [held, box] = [null, null]; });
  canvas.addEventListener("dblclick", (event) => {
    const at = place(event);
    look(part.size / 2, at.guess, at.label);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const factor = { "+": 0.5, "-": 2, 0: Infinity }[event.key];
    if (!step && !factor) return;
    event.preventDefault();
    const [x, y] = middle(), [right, down] = step ?? [0, 0];
    look(part.size * (factor ?? 1), x + (right * part.size) / 8, y + (down * part.size) / 8);
  });
  for (const button of figure.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => {
      const factor = Number(button.dataset.zoom) || Infinity;
      const [x, y] = factor < 1 && chosen ? [chosen.guess + 0.5, chosen.label + 0.5] : middle();
      look(part.size * factor, x, y);
    });
  }

  function show(label, guess) {
    chosen = { label, guess };
    look(Math.min(most, 25), guess + 0.5, label + 0.5);
    choose(label, guess);
  }
  for (const button of document.querySelectorAll("button.cell")) {
    button.addEventListener("click", () => {
      show(Number(button.dataset.true), Number(button.dataset.predicted));
      figure.scrollIntoView({ block: "nearest" });
    });
  }
  figure.querySelector("datalist").append(...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  wanted.addEventListener("change", () => {
    const text = wanted.value.trim().toLowerCase();
    const exact = names.findIndex((name) => name.toLowerCase() === text);
    const label = exact >= 0 || !text ? exact : names.findIndex((name) => name.toLowerCase().includes(text));
    if (label >= 0) show(label, label);
  });

  new ResizeObserver(draw).observe(figure);
  matchMedia("screen and (prefers-color-scheme: dark)").addEventListener("change", draw);
})();
