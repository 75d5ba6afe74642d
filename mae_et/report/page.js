"use strict";
// A click on a heading sorts: numbers by value, text alphabetically, empty cells last.
function sortTable(table, index, direction) {
  const body = table.tBodies[0];
  const key = (row) => row.cells[index].dataset.sort ?? row.cells[index].textContent.trim();
  const rows = [...body.rows];
  const isNumber = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return direction * (isNumber ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
  });
  body.append(...rows);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      sortTable(table, index, direction);
    });
  });
}
// A click on a legend entry hides its lines and points.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(shown));
    for (const part of document.getElementById(button.dataset.figure).querySelectorAll("svg g[id]")) {
      if (part.id.endsWith(`-${button.dataset.series}`)) part.classList.toggle("off", !shown);
    }
  });
}
// Light or dark: the system's setting until the button is used.
const theme = document.getElementById("theme");
const isDark = () =>
  (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "light" : "dark"; };
theme.hidden = false;
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
nameTheme();
// Printing opens everything.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
