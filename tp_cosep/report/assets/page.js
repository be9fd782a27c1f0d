"use strict";

const names = JSON.parse(document.getElementById("class-names").textContent);

function make(tag, text, properties = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  return Object.assign(made, properties);
}

/* Sorting: a heading sorts by its column, and the other way round when it is used again. */

function valueOf(row, column) {
  const text = row.cells[column].dataset.v;
  if (text === undefined) return null;
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, column) {
  const headings = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
  const known = rows.filter(([value]) => value !== null);
  const isNumeric = known.every(([value]) => typeof value === "number");
  const before = headings[column].getAttribute("aria-sort");
  const isRising = before ? before === "descending" : !isNumeric;
  known.sort(([a], [b]) => (isRising ? compare(a, b) : compare(b, a)));
  const unknown = rows.filter(([value]) => value === null);
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
  headings.forEach((heading) => heading.removeAttribute("aria-sort"));
  headings[column].setAttribute("aria-sort", isRising ? "ascending" : "descending");
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("table.sorts thead button");
  if (button) sort(button.closest("table"), button.closest("th").cellIndex);
});

/* Clusters: a table is made when its layer is opened for the first time. */

function pairsOf(flat) {
  const pairs = [];
  for (let i = 0; i < flat.length; i += 3) {
    const [a, b] = [flat[i], flat[i + 1]].map((label) => names[label] ?? String(label));
    pairs.push(`${a}\u00a0| ${b}\u00a0(${flat[i + 2].toFixed(2)})`);
  }
  return pairs;
}

function headingOf(text) {
  const heading = make("th", "", { scope: "col" });
  heading.append(make("button", text, { type: "button" }));
  return heading;
}

function cell(text, value) {
  const made = make("td", text || "–");
  if (value !== undefined) made.dataset.v = value;
  return made;
}

function clusterTable(data, unit) {
  const isKept = new Set(data.kept);
  const members = data.medoids.map(() => [[], []]);
  data.labels.forEach((label, i) => members[label][isKept.has(i) ? 0 : 1].push(i));
  const order = members.map((_, j) => j);
  order.sort((a, b) => members[b].flat().length - members[a].flat().length || a - b);
  const body = order.map((j) => {
    const [kept, pruned] = members[j];
    const row = document.createElement("tr");
    const name = make("th", "", { scope: "row" });
    name.dataset.v = data.medoids[j];
    name.append(
      make("i", "", { className: `key dot ${data.colours[j] < 0 ? "alone" : "c" + data.colours[j]}` }),
      `${data.medoids[j]}`,
    );
    const pairs = data.pairs.length ? pairsOf(data.pairs[j]) : [];
    row.append(name);
    if (data.pairs.length) row.append(cell(pairs.join(", "), pairs.join(", ")));
    row.append(cell(kept.join(", "), kept.length), cell(pruned.join(", "), pruned.length));
    return row;
  });
  const table = make("table", "", { className: "sorts" });
  const heading = document.createElement("tr");
  const titles = ["medoid", ...(data.pairs.length ? ["separates best"] : []), `kept ${unit}s`, `pruned ${unit}s`];
  heading.append(...titles.map((title) => headingOf(title)));
  table.append(document.createElement("thead"), document.createElement("tbody"));
  table.tHead.append(heading);
  table.tBodies[0].append(...body);
  return table;
}

const dataOf = new WeakMap();

function fill(layer) {
  for (const box of layer.querySelectorAll(".clusters")) {
    const source = box.querySelector("script");
    if (dataOf.has(box) || !source) continue;
    const data = JSON.parse(source.textContent);
    dataOf.set(box, data);
    box.append(clusterTable(data, box.dataset.unit));
    box.classList.add("scroll");
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Clusters");
    watch(box.parentElement.querySelector(".plane"), data, box.dataset.unit);
  }
}

document.addEventListener("toggle", (event) => event.target.open && fill(event.target), true);

function openTarget() {
  const layer = document.getElementById(location.hash.slice(1));
  if (!(layer instanceof HTMLDetailsElement)) return;
  layer.open = true;
  layer.scrollIntoView();
  layer.querySelector("summary").focus({ preventScroll: true });
}

document.addEventListener("click", (event) => {
  // The hash does not change when the same link is used again.
  if (event.target.closest("table.sorts a")) setTimeout(openTarget);
});
addEventListener("hashchange", openTarget);
openTarget();

/* Tips: what is under the pointer in a plane. */

const tip = document.getElementById("tip");

function watch(plane, data, unit) {
  const kept = new Set(data.kept);
  const hide = () => (tip.hidden = true);
  const show = (event) => {
    const box = plane.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * 720, ((event.clientY - box.top) / box.height) * 720];
    let [nearest, distance] = [-1, 40 ** 2];
    data.labels.forEach((_, i) => {
      const d = (data.xy[2 * i] - x) ** 2 + (data.xy[2 * i + 1] - y) ** 2;
      if (d < distance) [nearest, distance] = [i, d];
    });
    if (nearest < 0) return hide();
    const cluster = data.labels[nearest];
    const medoid = data.medoids[cluster];
    const lines = [`${unit} ${nearest}, ${kept.has(nearest) ? "kept" : "pruned"}`];
    if (medoid !== nearest) lines.push(`in the cluster of ${medoid}`);
    if (data.pairs.length) lines.push(...pairsOf(data.pairs[cluster]));
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 8);
    const top = event.clientY + 14 + height > innerHeight ? event.clientY - height - 14 : event.clientY + 14;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${top}px`;
  };
  plane.addEventListener("pointermove", show);
  plane.addEventListener("pointerdown", show);
  plane.addEventListener("pointerleave", hide);
}
