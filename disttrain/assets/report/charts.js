// Draws the charts of a page as SVG. The charts of a group share their x axis, its zoom and the smoothing.
(() => {
  const { figures, groups, rulers } = JSON.parse(document.getElementById("chart-data").textContent);
  const top = 8, right = 12, most = 8; // most: curves that the legend and the tooltip name
  const numbers = (text) => (text ? text.split(",").map(Number) : []);
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const below = (list, value) => { // number of values of an increasing list below this one
    let [low, high] = [0, list.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const nearest = (list, value) => {
    const n = below(list, value);
    return n === list.length || (n > 0 && value - list[n - 1] < list[n] - value) ? n - 1 : n;
  };

  // From the x of the curves of a ruler (steps, or seconds) to an x axis: through the points of a table.
  const convert = (ruler, axis, values) => {
    const table = rulers[ruler]?.[axis];
    if (!table) return values;
    const [from, to] = (table.read ??= table.map(numbers));
    return values.map((value) => {
      const n = Math.min(Math.max(1, below(from, value)), from.length - 1);
      return to[n] + ((value - from[n]) * (to[n] - to[n - 1])) / (from[n] - from[n - 1]);
    });
  };

  const say = (value) => {
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size === 0 || size >= 0.001
      ? value.toLocaleString("en", { maximumSignificantDigits: 4 }) : value.toExponential(2).replace(/\.?0+e/, "e");
  };
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const duration = (value, whole) => {
    if (whole < 180) return `${say(value)} s`;
    const seconds = Math.round(Math.abs(value));
    return `${value < 0 ? "-" : ""}${Math.floor(seconds / 3600)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}`;
  };
  const utc = (value) => new Date(1000 * value).toISOString();
  const told = { // the text of a value of an x axis in the tooltip
    number: say,
    log: say,
    duration: (value) => duration(value, value),
    utc: (value) => `${utc(value).slice(0, 19).replace("T", " ")} UTC`,
  };

  const ladder = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
  const nice = (least) => {
    const power = 10 ** Math.floor(Math.log10(least));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= 0.9999 * least);
  };
  const multiples = (low, high, step) => {
    const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
    return Array.from({ length: Math.max(0, count) }, (_, n) => (first + n) * step);
  };

  // The places and texts of about so many ticks of an axis.
  function ticks(kind, low, high, count) {
    if (kind === "log") {
      const decades = multiples(Math.floor(Math.log10(low)), Math.log10(high), 1).map((power) => 10 ** power);
      const fine = decades.flatMap((decade) => [decade, 2 * decade, 5 * decade]);
      const found = [decades, fine].map((each) => each.filter((value) => value >= low && value <= high));
      const chosen = found[0].length >= 3 || found[1].length > count ? found[0] : found[1];
      if (chosen.length > 1) return chosen.filter((_, n) => n % Math.ceil(chosen.length / count) === 0).map((value) => [value, say(value)]);
    }
    const least = (high - low) / count;
    if (kind === "duration" || kind === "utc") {
      const step = least <= 1 ? nice(least) : ladder.find((each) => each >= least) ?? 86400 * nice(least / 86400);
      let day = "";
      return multiples(low, high, step).map((value) => {
        if (kind === "duration") return [value, duration(value, high)];
        const [date, time] = utc(value).split("T"), text = time.slice(0, step < 60 ? 8 : 5);
        if (date === day) return [value, text];
        day = date;
        return [value, text, date];
      });
    }
    const step = nice(least), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const text = (value) => digits > 4 && value ? value.toExponential(1) : value.toLocaleString("en", { maximumFractionDigits: digits });
    return multiples(low, high, step).map((value) => [value, text(value)]);
  }

  function extent(group) {
    const key = group.axis.key;
    return (group.extents[key] ??= (() => {
      const ends = group.charts.flatMap(({ series }) => series.flatMap((each) => {
        const x = placed(each, group, each.x);
        return x.length ? [x[0], x.at(-1)] : [];
      })).filter(Number.isFinite);
      const low = Math.min(...ends), high = Math.max(...ends);
      const pad = high > low ? 0 : group.axis.kind === "log" ? high / 2 : group.axis.kind === "utc" ? 30 : Math.abs(high) || 1;
      return ends.length ? [low - pad, high + pad] : [0, 1];
    })());
  }

  const placed = (series, group, x) => { // x on the axis of the group, computed once
    const known = (series.known ??= new Map());
    const key = `${group.axis.key} ${x === series.x}`;
    if (!known.has(key)) known.set(key, convert(series.ruler, group.axis.key, x));
    return known.get(key);
  };

  // The lines of a curve: as recorded, and its mean over a window if it is smoothed.
  function lines(series, { group, figure }) {
    const raw = { x: placed(series, group, series.x), y: series.y, series };
    const base = series.mean ?? series;
    const half = Math.floor((base.x.length * (group.smooth / 10) ** 2) / 8);
    if (!figure.smooth || series.dots || half < 1) return [raw];
    const sums = [0], counts = [0];
    base.y.forEach((value, n) => {
      const known = Number.isFinite(value);
      sums.push(sums[n] + (known ? value : 0));
      counts.push(counts[n] + known);
    });
    const y = base.y.map((_, n) => {
      const reach = Math.min(half, n, base.y.length - 1 - n); // as many before as after
      const count = counts[n + reach + 1] - counts[n - reach];
      return Number.isFinite(base.y[n]) ? (sums[n + reach + 1] - sums[n - reach]) / count : NaN;
    });
    return [{ ...raw, faint: true, hidden: series.many }, { x: placed(series, group, base.x), y, series, mean: true }];
  }

  // The y range that is drawn: without clipping everything, otherwise without the rare values far outside.
  function range({ figure, clip, log }, drawn, low, high) {
    const inside = ({ x, y }) => y.filter((value, n) => Number.isFinite(value) && x[n] >= low && x[n] <= high && (!log || value > 0));
    const values = Float64Array.from(drawn.flatMap(inside)).sort();
    if (!values.length) return [log ? 0.1 : 0, 1];
    let [least, top] = [values[0], values.at(-1)];
    const at = (share) => values[Math.floor(share * (values.length - 1))];
    if (clip && values.length > 20 && !log) {
      const reach = 0.5 * (at(0.95) - at(0.05)) || top - least;
      const kept = drawn.filter(({ series }) => series.dots).flatMap(inside);
      least = Math.min(Math.max(least, at(0.05) - reach), ...kept);
      top = Math.max(Math.min(top, at(0.95) + reach), ...kept);
    }
    if (log) return top > least ? [least / 1.1, top * 1.1] : [least / 2, top * 2];
    const pad = 0.05 * (top - least) || Math.abs(top) / 10 || 1;
    return figure.zero ? [Math.min(0, least), top + pad] : [least - pad, top + pad];
  }

  function draw(chart) {
    const { figure, group, svg } = chart, width = Math.round(svg.clientWidth), height = svg.clientHeight;
    if (width < 120) return;
    const [low, high] = group.zoom ?? extent(group), { kind, label } = group.axis;
    const drawn = chart.series.filter((each) => !chart.hidden.has(each.label)).flatMap((each) => lines(each, chart));
    const [least, greatest] = range(chart, drawn, low, high), marks = group.marks;
    const unit = figure.unit ? ` ${figure.unit}` : "";
    const ys = ticks(chart.log ? "log" : "number", least, greatest, 5).map(([value, text]) => [value, text + unit]);
    const left = 12 + 6.6 * Math.max(...ys.map(([, text]) => text.length));
    const bottom = height - (kind === "utc" ? 48 : 36) - 7 * marks.length;
    const flat = (value) => value, scale = { x: kind === "log" ? Math.log10 : flat, y: chart.log ? Math.log10 : flat };
    const share = (f, value, from, to) => (f(value) - f(from)) / (f(to) - f(from));
    const X = (value) => left + (width - left - right) * share(scale.x, value, low, high);
    const Y = (value) => bottom - (bottom - top) * share(scale.y, value, least, greatest);
    let taken = 0; // to the right end of the last text that has room
    const xs = (group.axis.ticks?.map((value) => [value, say(value)]) ?? ticks(kind, low, high, Math.max(2, (width - left - right) / 84)))
      .filter(([value, text]) => {
        const half = 3.3 * text.length, middle = Math.min(X(value), width - half), free = middle - half > taken;
        if (free) taken = middle + half + 6;
        return free;
      });
    const dot = (x, y, color, size) => `<circle cx="${X(x).toFixed(1)}" cy="${Y(y).toFixed(1)}" r="${size}" fill="${color}"/>`;
    const curve = ({ x, y, series, faint, mean, hidden }) => {
      if (hidden) return "";
      let text = "", pen = "M", dots = "", count = 0;
      const end = Math.min(x.length, below(x, high) + 1);
      for (let n = Math.max(0, below(x, low) - 1); n < end; n += 1) {
        if (!Number.isFinite(y[n]) || (chart.log && y[n] <= 0)) {
          pen = "M";
          continue;
        }
        text += `${pen}${X(x[n]).toFixed(1)} ${Math.max(-999, Math.min(999, Y(y[n]))).toFixed(1)}`;
        if (series.dots || x.length === 1) dots += dot(x[n], y[n], series.color, 3);
        [pen, count] = ["L", count + 1];
      }
      const weight = series.many ? 'stroke-width="1" opacity=".6"' : `stroke-width="${faint ? 1 : mean || series.dots ? 2 : 1.4}" opacity="${faint || series.faint ? 0.35 : 1}"`;
      return `<path d="${text}" stroke="${series.color}" ${weight} stroke-dasharray="${series.dash ?? ""}"/>${count <= 60 ? dots : ""}`;
    };
    // All values of the smoothed curves of many devices, from the lowest to the highest of each pixel.
    const spread = () => {
      const columns = new Map();
      drawn.filter(({ hidden }) => hidden).forEach(({ x, y }) => x.forEach((value, n) => {
        if (value < low || value > high || !Number.isFinite(y[n])) return;
        const at = Math.round(X(value)), [least, most] = columns.get(at) ?? [Infinity, -Infinity];
        columns.set(at, [Math.min(least, y[n]), Math.max(most, y[n])]);
      }));
      const text = [...columns].map(([at, [least, most]]) => `M${at + 0.5} ${(Y(least) + 0.5).toFixed(1)}V${(Y(most) - 0.5).toFixed(1)}`);
      return text.length ? `<path d="${text.join("")}" stroke="var(--soft)" stroke-width="3" opacity=".3" shape-rendering="crispEdges"/>` : "";
    };
    const rug = marks.map(({ x0, x, color, tall, ruler }, row) => {
      const y = tall ? top : bottom + 3 + 7 * row, tip = tall ? bottom : y + 5;
      const to = convert(ruler, group.axis.key, x), from = x0 && convert(ruler, group.axis.key, x0);
      const text = to.map((value, n) => {
        const end = X(value), begin = from ? Math.min(X(from[n]), end - 2) : end;
        return end < left || begin > width - right ? "" : from
          ? `M${begin.toFixed(1)} ${(y + tip) / 2}H${end.toFixed(1)}` : `M${end.toFixed(1)} ${y}V${tip}`;
      });
      return `<path d="${text.join("")}" stroke="${color}" stroke-width="${from ? 5 : 1.5}" ${tall ? 'stroke-dasharray="5 4"' : ""}/>`;
    });
    const base = bottom + 7 * marks.length;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = `<clipPath id="clip-${chart.name}"><rect x="${left - 4}" y="${top - 4}" width="${width - left - right + 8}" height="${bottom - top + 5}"/></clipPath>
      <g class="grid">${ys.map(([value]) => `<path d="M${left} ${Y(value).toFixed(1)}H${width - right}"/>`).join("")}</g>
      <path class="axis" d="M${left} ${bottom}H${width - right}"/>
      ${ys.map(([value, text]) => `<text class="y" x="${left - 6}" y="${(Y(value) + 4).toFixed(1)}">${text}</text>`).join("")}
      ${xs.map(([value, text, second]) => `<text class="x${X(value) > width - 30 ? " last" : ""}" x="${Math.min(X(value), width).toFixed(1)}" y="${base + 15}">${text}${second ? `<tspan x="${X(value).toFixed(1)}" dy="13">${second}</tspan>` : ""}</text>`).join("")}
      <text class="name" x="${width - right}" y="${height - 3}">${label}</text>
      <g clip-path="url(#clip-${chart.name})">${spread()}${drawn.map(curve).join("")}</g>${rug.join("")}<g class="cursor"></g>`;
    Object.assign(chart, { X, Y, drawn, left, bottom, width, dot });
    chart.value = (pixel) => { // of the x axis at a place on the screen
      const at = Math.min(1, Math.max(0, (pixel - left) / (width - left - right)));
      const value = scale.x(low) + at * (scale.x(high) - scale.x(low));
      return kind === "log" ? 10 ** value : value;
    };
  }

  // Names the values at a place. Of many curves, it names that nearest to the pointer.
  function point(chart, pixel, y) {
    const { group, figure, X, Y, drawn, tip } = chart, value = chart.value(pixel);
    let found = drawn.filter(({ mean }) => !mean).map((line) => ({ ...line, n: nearest(line.x, value) }))
      .filter(({ x, y, n }) => n >= 0 && Number.isFinite(y[n]) && Math.abs(X(x[n]) - X(value)) < 40);
    const smoothed = (series) => drawn.find((line) => line.mean && line.series === series);
    const far = (each) => {
      const line = (each.hidden && smoothed(each.series)) || each, n = nearest(line.x, value);
      return Math.abs(X(line.x[n]) - pixel) + Math.abs(Y(line.y[n]) - y);
    };
    found.sort((a, b) => Math.abs(a.x[a.n] - value) - Math.abs(b.x[b.n] - value));
    if (chart.series.length > most) found = found.sort((a, b) => far(a) - far(b)).slice(0, 1);
    const first = found[0];
    if (!first) return hide(chart);
    chart.at = X(first.x[first.n]);
    const heads = group.axes.map(({ key, label, kind }) => {
      const [at] = convert(first.series.ruler, key, [first.series.x[first.n]]);
      return element("div", {}, kind === "utc" ? told.utc(at) : `${label} ${told[kind](at)}`);
    });
    const unit = figure.unit ? ` ${figure.unit}` : "";
    const rows = found.sort((a, b) => drawn.indexOf(a) - drawn.indexOf(b)).map((each) => {
      const smooth = smoothed(each.series);
      const mean = smooth ? ` (mean ${say(smooth.y[nearest(smooth.x, value)])})` : "";
      const row = element("div", {}, element("b", { textContent: each.series.label }), ` ${say(each.y[each.n])}${unit}${mean}`);
      row.style.setProperty("--color", each.series.color);
      row.className = "row";
      return row;
    });
    const near = group.marks.flatMap(({ x, x0, texts, ruler }) => {
      const ends = convert(ruler, group.axis.key, x), begins = x0 ? convert(ruler, group.axis.key, x0) : ends;
      return texts.filter((_, n) => pixel > X(begins[n]) - 4 && pixel < X(ends[n]) + 4);
    });
    tip.replaceChildren(...heads, ...rows, ...near.slice(0, 4).map((text) => element("div", { textContent: text })));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(chart.at + 14, chart.width - tip.offsetWidth))}px`;
    if (chart.at + 14 + tip.offsetWidth > chart.width) tip.style.left = `${Math.max(0, chart.at - 14 - tip.offsetWidth)}px`;
    chart.svg.lastChild.innerHTML = `<path d="M${chart.at.toFixed(1)} ${top}V${chart.bottom}"/>` +
      found.filter((each) => Y(each.y[each.n]) >= top - 4 && Y(each.y[each.n]) <= chart.bottom + 1)
        .map((each) => chart.dot(each.x[each.n], each.y[each.n], each.series.color, 4)).join("");
  }

  function hide(chart) {
    chart.tip.hidden = true;
    if (chart.svg.lastChild) chart.svg.lastChild.innerHTML = "";
  }

  function change(group, changes) {
    Object.assign(group, changes);
    for (const chart of group.charts) {
      for (const tool of chart.tools) tool();
      hide(chart);
      draw(chart);
    }
  }

  function listen(chart) {
    const { svg, group } = chart;
    const at = (event) => {
      const frame = svg.getBoundingClientRect();
      return [event.clientX - frame.left, event.clientY - frame.top];
    };
    let held = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") return point(chart, ...at(event));
      [held] = at(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (held === null) return point(chart, x, y);
      const [from, to] = [Math.min(x, held), Math.max(x, held)];
      svg.lastChild.innerHTML = `<rect x="${from}" y="${top}" width="${to - from}" height="${chart.bottom - top}"/>`;
    });
    svg.addEventListener("pointerup", (event) => {
      const ends = [held, at(event)[0]].sort((a, b) => a - b);
      if (held !== null && ends[1] - ends[0] > 6) change(group, { zoom: ends.map(chart.value) });
      held = null;
    });
    svg.addEventListener("pointerleave", () => held === null && hide(chart));
    svg.addEventListener("blur", () => hide(chart));
    svg.addEventListener("dblclick", () => change(group, { zoom: null }));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !chart.X) return;
      event.preventDefault();
      const line = chart.drawn.find(({ x }) => x.length), now = chart.at ?? chart.left;
      const n = nearest(line.x, chart.value(now)) + step * Math.max(1, Math.round(line.x.length / 100));
      point(chart, chart.X(line.x[Math.max(0, Math.min(line.x.length - 1, n))]), 0);
    });
  }

  // The controls above a chart. Each entry of chart.tools brings one up to date.
  function controls(chart) {
    const { figure, group } = chart, row = chart.place.querySelector(".tools");
    const add = (label, input, event, act, update) => {
      input.addEventListener(event, act);
      chart.tools.push(() => update(input));
      row.append(element("label", {}, label, input));
    };
    const box = (label, name) => add(label, element("input", { type: "checkbox", checked: chart[name] }), "change", () => {
      chart[name] = !chart[name];
      draw(chart);
    }, () => {});
    if (group.axes.length > 1) {
      const options = group.axes.map(({ key, label }) => element("option", { value: key, textContent: label }));
      add("x ", element("select", {}, ...options), "change", (event) => {
        change(group, { zoom: null, axis: group.axes.find(({ key }) => key === event.target.value) });
      }, (select) => { select.value = group.axis.key; });
    }
    if (figure.smooth && chart.series[0].x.length > 20) {
      const slider = element("input", { type: "range", min: 0, max: 10, value: group.smooth });
      add("smoothing ", slider, "input", () => change(group, { smooth: Number(slider.value) }), () => { slider.value = group.smooth; });
    }
    if (figure.log) box("log ", "log");
    if (figure.clip) box("clip outliers ", "clip");
    const whole = element("button", { type: "button", textContent: "undo zoom" });
    whole.addEventListener("click", () => change(group, { zoom: null }));
    chart.tools.push(() => { whole.hidden = !group.zoom; });
    row.append(whole);
    chart.tools.forEach((tool) => tool());
  }

  function legend(chart) {
    const row = chart.place.querySelector(".legend");
    const swatch = (color, className, text) => {
      const made = element(className ? "span" : "button", { className, textContent: text });
      made.style.setProperty("--color", color);
      row.append(made);
      return made;
    };
    const labels = new Map(chart.series.map(({ label, color }) => [label, color]));
    if (labels.size > most) row.append(`${labels.size} curves; the pointer names the nearest${chart.figure.smooth ? "; gray: the range of all" : ""}`);
    else if (labels.size > 1) {
      for (const [label, color] of labels) {
        const button = swatch(color, "", label);
        button.type = "button";
        button.ariaPressed = "true";
        button.addEventListener("click", () => {
          if (!chart.hidden.delete(label)) chart.hidden.add(label);
          button.ariaPressed = String(!chart.hidden.has(label));
          draw(chart);
        });
      }
    }
    if (chart !== chart.group.charts[0]) return;
    for (const { label, color } of chart.group.marks) swatch(color, "mark", label);
  }

  for (const group of Object.values(groups)) {
    Object.assign(group, { axis: group.axes[0], zoom: null, smooth: 3, charts: [], extents: {} });
    for (const mark of group.marks) [mark.x, mark.x0] = [numbers(mark.x), mark.x0 && numbers(mark.x0)];
  }
  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => draw(charts.get(target))));
  const charts = new Map([...document.querySelectorAll("[data-chart]")].map((place) => {
    const name = place.dataset.chart, figure = figures[name], group = groups[figure.group];
    const svg = place.querySelector("svg"), tip = place.querySelector(".tip");
    const series = figure.series.map(({ x, y, mean, ...rest }) => (
      { ...rest, x: numbers(x), y: numbers(y), mean: mean && { x: numbers(mean[0]), y: numbers(mean[1]) } }));
    const chart = { name, figure, group, place, svg, tip, series, hidden: new Set(), tools: [], clip: Boolean(figure.clip), log: false };
    group.charts.push(chart);
    controls(chart);
    legend(chart);
    listen(chart);
    return [place, chart];
  }));
  for (const place of charts.keys()) resized.observe(place);
})();
