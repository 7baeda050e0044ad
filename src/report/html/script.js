"use strict";

// Tables: a click or Enter on a heading sorts by it, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent : Number(value);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => sign * compare(key(a, column), key(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}

// Charts: the values at the step under the pointer, or that the arrow keys have come to.
for (const svg of document.querySelectorAll(".chart svg")) {
  const { left, right, end } = Object.fromEntries(Object.entries(svg.dataset).map(([name, value]) => [name, Number(value)]));
  const lines = [...svg.querySelectorAll("path[data-points]")].map((path) => ({
    name: path.dataset.name,
    points: path.dataset.points.split(" ").filter(Boolean).map((point) => point.split(":")).map(([step, value]) => [Number(step), value]),
  }));
  const steps = [...new Set(lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector(".readout");
  const nearest = (sorted, step) => sorted.reduce((best, at) => (Math.abs(at - step) < Math.abs(best - step) ? at : best));
  let here = null;
  const show = (step) => {
    here = step;
    cursor.style.visibility = step === null ? "hidden" : "visible";
    if (step === null) { readout.textContent = ""; return; }
    const x = left + (step / end) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const said = lines.filter((line) => line.points.length).map((line) => {
      const at = nearest(line.points.map(([step]) => step), step);
      const value = line.points.find(([step]) => step === at)[1];
      return `${line.name} ${value}` + (at === step ? "" : ` (step ${at})`);
    });
    readout.textContent = `step ${step}: ${said.join(" · ")}`;
  };
  if (!steps.length) continue;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(steps, ((x - left) / (right - left)) * end));
  });
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const at = here === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(here);
    show(steps[Math.min(steps.length - 1, Math.max(0, at + move))]);
  });
}
