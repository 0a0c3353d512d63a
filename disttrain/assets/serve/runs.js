// The list of runs: reads it again and again, and keeps sort, filter and ticks, also in the address.
const [filter, table, count, compare, clear] =
  ["filter", "runs", "count", "compare", "clear"].map((id) => document.getElementById(id));
const most = Number(table.dataset.most);
const rows = new Map(); // path -> { run, row, box }
const given = new URLSearchParams(location.hash.slice(1));
const ticked = new Set(given.getAll("run"));
let columns = [];
let sort = { by: given.get("by") ?? "started, UTC", up: given.has("up") };
filter.value = given.get("filter") ?? "";

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const left = (title) => (["run", "state"].includes(title) ? "name" : "");
const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function heads(titles) {
  if (columns.length) return;
  columns = titles;
  for (const title of ["run", ...titles]) {
    const button = make("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      sort = { by: title, up: sort.by === title ? !sort.up : left(title) !== "" };
      show();
    });
    table.tHead.rows[0].append(make("th", { scope: "col", className: left(title) }, button));
  }
}

function add(run) {
  const box = make("input", { type: "checkbox", name: "run", value: run.path, checked: ticked.has(run.path) });
  box.setAttribute("form", "tools");
  box.ariaLabel = `Compare ${run.path || run.name}`;
  box.addEventListener("change", () => {
    if (box.checked) ticked.add(run.path);
    else ticked.delete(run.path);
    show();
  });
  const link = make("a", { href: run.link, textContent: run.path || run.name });
  link.addEventListener("click", () => say(count, "drawing the page …"));
  const head = make("th", { scope: "row" }, box, link, make("small"), make("small"));
  const row = make("tr", {}, head, ...columns.map((title) => make("td", { className: left(title) })));
  row.cells[1].append(make("span"));
  rows.set(run.path, { row, box });
}

function fill({ run, row }) {
  const [about, note] = row.querySelectorAll("small");
  say(about, [run.path.includes(run.name) ? "" : run.name, run.about].filter(Boolean).join(" · "));
  say(note, run.note);
  const state = row.cells[1].firstChild;
  run.cells.forEach(([, text], place) => say(place ? row.cells[1 + place] : state, text));
  state.className = `state ${run.state}`;
}

function show() {
  const place = columns.indexOf(sort.by);
  const key = ({ run }) => (place < 0 ? run.path : run.cells[place][0]);
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const sign = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return (sort.up ? sign : -sign) || a.run.path.localeCompare(b.run.path, undefined, { numeric: true });
  };
  const sorted = [...rows.values()].sort(order).map(({ row }) => row);
  const body = table.tBodies[0];
  if (sorted.some((row, at) => body.rows[at] !== row)) {
    const focused = document.activeElement;
    body.append(...sorted);
    focused?.focus({ preventScroll: true });
  }
  const words = filter.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const { run, row } of rows.values()) {
    const text = [run.path, run.name, run.about, run.state, run.note].join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  for (const head of table.tHead.querySelectorAll("th")) {
    head.ariaSort = head.textContent === sort.by ? (sort.up ? "ascending" : "descending") : null;
  }
  say(count, !rows.size ? "no runs yet" : shown < rows.size ? `${shown} of ${rows.size} runs` : `${rows.size} runs`);
  say(compare, ticked.size ? `Compare ${ticked.size}` : "Compare");
  compare.disabled = ticked.size < 2 || ticked.size > most;
  compare.title = ticked.size > most ? `at most ${most}` : "tick two runs or more";
  clear.hidden = !ticked.size;
  const kept = new URLSearchParams([["by", sort.by], ...(sort.up ? [["up", ""]] : [])]);
  if (filter.value) kept.set("filter", filter.value);
  for (const path of ticked) kept.append("run", path);
  history.replaceState(null, "", `#${kept}`);
}

function take(list) {
  heads(list.columns);
  const paths = new Set(list.rows.map((run) => run.path));
  for (const [path, { row }] of rows) {
    if (paths.has(path)) continue;
    row.remove();
    rows.delete(path);
  }
  for (const path of ticked) if (!paths.has(path)) ticked.delete(path);
  for (const run of list.rows) {
    if (!rows.has(run.path)) add(run);
    const known = rows.get(run.path);
    known.run = run;
    fill(known);
  }
  show();
}

async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/runs.json");
      if (!answer.ok) throw new Error(answer.statusText);
      take(await answer.json());
    } catch {
      say(count, "the server does not answer; the list is old");
    }
  }
  const live = [...rows.values()].some(({ run }) => run.state === "running");
  timer = setTimeout(refresh, live ? 3000 : 10000);
}

let timer = 0;
filter.addEventListener("input", show);
compare.addEventListener("click", () => say(count, "drawing the page …"));
clear.addEventListener("click", () => {
  ticked.clear();
  for (const { box } of rows.values()) box.checked = false;
  show();
});
addEventListener("pageshow", ({ persisted }) => { if (persisted) show(); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  clearTimeout(timer);
  refresh();
});
refresh();
