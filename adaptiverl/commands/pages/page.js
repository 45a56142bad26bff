"use strict";
// Tables that are sorted and searched, and the values under the pointer. Reads JSON in this page.
const read = id => JSON.parse(document.getElementById(id).textContent);
const short = value => typeof value !== "number" ? value
  : Number.isInteger(value) ? String(value)
  : (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? value.toExponential(2) : String(Number(value.toPrecision(4)))).replace("-", "−");

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function marked(cell, text, words) {
  // The text with what is searched for marked; never as HTML.
  const low = text.toLowerCase();
  let at = 0, found;
  while (words && (found = low.indexOf(words, at)) >= 0) {
    cell.append(text.slice(at, found), make("mark", text.slice(found, found + words.length)));
    at = found + words.length;
  }
  cell.append(text.slice(at));
}

function table(root) {
  const data = read(root.dataset.rows), size = 12;
  const body = root.querySelector("tbody"), heads = [...root.querySelectorAll("th")];
  const search = root.querySelector("input"), count = root.querySelector(".count");
  const filters = [...root.querySelectorAll("select")];
  const [back, on] = root.querySelectorAll(".pages button");
  const texts = data.rows.map(row => row.map(value => value === null ? "" : String(value)).join("\n").toLowerCase());
  let column = Number(root.dataset.sort), falling = root.dataset.falling === "true", page = 0;
  function compare(a, b) {
    const x = data.rows[a][column], y = data.rows[b][column];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;  // missing: last
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return (falling ? -order : order) || a - b;
  }
  function draw() {
    const words = search.value.trim().toLowerCase();
    let shown = data.rows.map((_, i) => i).filter(i => texts[i].includes(words));
    for (const filter of filters) {
      if (filter.value === "") continue;
      const at = Number(filter.dataset.column);
      shown = shown.filter(i => String(data.rows[i][at]).split(", ").includes(filter.value));
    }
    shown.sort(compare);
    const pages = Math.max(1, Math.ceil(shown.length / size));
    page = Math.min(page, pages - 1);
    body.replaceChildren(...shown.slice(page * size, (page + 1) * size).map(i => {
      const line = make("tr");
      line.setAttribute("role", "row");
      data.rows[i].forEach((value, at) => {
        const cell = make("td", undefined, data.kinds[at]);
        cell.setAttribute("role", "cell");
        cell.dataset.name = data.columns[at];
        marked(cell, value === null ? "missing" : short(value), words);
        line.append(cell);
      });
      return line;
    }));
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== column ? "none" : falling ? "descending" : "ascending"));
    count.textContent = `${shown.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rows, page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    on.disabled = page === pages - 1;
  }
  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
    falling = column === at ? !falling : data.kinds[at] === "n";
    column = at; page = 0; draw();
  }));
  search.addEventListener("input", () => { page = 0; draw(); });
  filters.forEach(filter => filter.addEventListener("change", () => { page = 0; draw(); }));
  back.addEventListener("click", () => { page--; draw(); });
  on.addEventListener("click", () => { page++; draw(); });
  draw();
}

function pointer(plot, data) {
  const line = plot.querySelector(".cursor"), values = [...plot.parentElement.querySelectorAll(".legend output")];
  function show(event) {
    const box = plot.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = data.x[0] + share * (data.x[1] - data.x[0]);
    line.setAttribute("x1", 1000 * share); line.setAttribute("x2", 1000 * share);
    line.removeAttribute("visibility");
    data.curves.forEach((curve, k) => {
      let near = 0;
      curve.x.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(curve.x[near] - x)) near = i; });
      values[k].textContent = ` ${short(curve.y[near])} (${data.xName} ${short(Number(curve.x[near].toPrecision(3)))})`;
    });
  }
  function hide() {
    line.setAttribute("visibility", "hidden");
    values.forEach(value => { value.textContent = ""; });
  }
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}

document.querySelectorAll("[data-rows]").forEach(table);
const hovers = read("hovers");
document.querySelectorAll(".plot").forEach((plot, k) => pointer(plot, hovers[k]));
