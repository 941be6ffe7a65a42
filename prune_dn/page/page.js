"use strict";
document.documentElement.classList.add("scripted");

const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
};

const value = (cell) => cell.dataset.v ?? cell.textContent.trim();
const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

document.getElementById("save-json").addEventListener("click", () =>
  save("report.json", "application/json", document.getElementById("data").textContent));

for (const button of document.querySelectorAll("[data-csv]")) {
  const table = button.closest(".tablebox").querySelector("table");
  button.setAttribute("aria-label", `Save the table ${table.dataset.title} as CSV`);
  button.addEventListener("click", () =>
    save(`${button.dataset.csv}.csv`, "text/csv",
      [...table.rows].map((row) => [...row.cells].map((c) => quoted(value(c))).join(",")).join("\n") + "\n"));
}

for (const table of document.querySelectorAll("table.data")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => value(row.cells[column]);
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
        return (up ? 1 : -1) * (numbers ? x - y : x.localeCompare(y));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

for (const group of document.querySelectorAll(".maps")) {
  const detail = group.querySelector(".detail");
  const tables = [...group.querySelectorAll("table")];
  const cellAt = (table, row, column) => table.tBodies[0].rows[row]?.cells[column];
  const at = (cell) => [cell.parentNode.sectionRowIndex, cell.cellIndex];
  const tell = (cell) => {
    const [row, column] = at(cell);
    for (const old of group.querySelectorAll(".on")) old.classList.remove("on");
    const told = tables.map((table) => {
      const here = cellAt(table, row, column);
      here.classList.add("on");
      return `${table.closest("figure").querySelector("figcaption").textContent}: ${here.textContent || "none"}`;
    });
    const table = cell.closest("table");
    const reader = table.tBodies[0].rows[row].cells[0].dataset.name;
    const source = table.tHead.rows[0].cells[column].dataset.name;
    detail.textContent = `${reader} \u2190 ${source}. ${told.join(". ")}.`;
  };
  for (const table of tables) {
    const first = table.querySelector(".c");
    if (first) first.tabIndex = 0;
    table.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !event.target.matches(".c")) return;
      event.preventDefault();
      let [row, column] = at(event.target);
      let next;
      do {
        row += step[0];
        column += step[1];
        next = cellAt(table, row, column);
      } while (next && !next.matches(".c") && !next.matches("th"));
      if (next?.matches(".c")) next.focus();
    });
    table.addEventListener("focusin", (event) => {
      if (!event.target.matches(".c")) return;
      for (const old of table.querySelectorAll(`.c[tabindex="0"]`)) old.tabIndex = -1;
      event.target.tabIndex = 0;
      tell(event.target);
    });
    for (const kind of ["mouseover", "click"]) {
      table.addEventListener(kind, (event) => event.target.matches?.(".c") && tell(event.target));
    }
  }
  for (const cell of group.querySelectorAll(".c:not([tabindex])")) cell.tabIndex = -1;
}
