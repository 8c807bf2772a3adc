// Filters and sorts. The state is in the address, as in report.html#status=left&reason=graph-output&q=layer3&sort=name,
// so that a view can be kept and sent.
"use strict";

const KEYS = ["q", "status", "kind", "reason"];
const form = document.querySelector(".filter");
const table = document.querySelector(".rows");

function cellValue(row, column) {
  const cell = row.cells[column];
  return cell.dataset.sort ?? cell.textContent.trim();
}

// Empty cells come last in either direction.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return sign * (Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference);
}

function sort(target, column, descending) {
  const body = target.tBodies[0];
  const rows = Array.from(body.rows, (row) => [cellValue(row, column), row]);
  rows.sort((a, b) => compare(a[0], b[0], descending ? -1 : 1));
  body.append(...rows.map((pair) => pair[1]));
  Array.from(target.tHead.rows[0].cells).forEach((head, index) => {
    if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function sorted(target) {
  const head = target.tHead.querySelector("[aria-sort]");
  return head && { head, descending: head.getAttribute("aria-sort") === "descending" };
}

function makeSortable(target) {
  Array.from(target.tHead.rows[0].cells).forEach((head, column) => {
    if ("fixed" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = sorted(target);
      sort(target, column, now?.head === head && !now.descending);
      if (target === table) remember();
    });
  });
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = (row.text ??= row.textContent.toLowerCase());
    row.hidden =
      KEYS.slice(1).some((key) => wanted[key] && row.dataset[key] !== wanted[key]) ||
      !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
}

function remember() {
  const state = new URLSearchParams();
  for (const key of KEYS) if (form.elements[key]?.value) state.set(key, form.elements[key].value);
  const now = sorted(table);
  if (now) state.set("sort", (now.descending ? "-" : "") + now.head.dataset.key);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return; // the address of a row or a section
  const state = new URLSearchParams(hash);
  for (const key of KEYS) if (form.elements[key]) form.elements[key].value = state.get(key) ?? "";
  const key = (state.get("sort") ?? "n").replace(/^-/, "");
  const column = Array.from(table.tHead.rows[0].cells).findIndex((head) => head.dataset.key === key);
  if (column >= 0) sort(table, column, state.get("sort")?.startsWith("-") ?? false);
  filter();
}

document.querySelectorAll(".sortable").forEach(makeSortable);
// Where a sketch does not fit, what it is about is in sight.
for (const scroll of document.querySelectorAll(".scroll")) {
  const [box, self] = [scroll, scroll.querySelector(".self")].map((element) => element.getBoundingClientRect());
  scroll.scrollLeft = self.left - box.left - (box.width - self.width) / 2;
}
if (table) {
  form.hidden = false;
  form.addEventListener("input", () => (filter(), remember()));
  form.addEventListener("reset", () => setTimeout(() => (filter(), remember())));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", recall);
  filter();
  recall();
}
