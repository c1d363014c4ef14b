// The table of encoders: a box that filters by name, and heads that sort. Without scripts the whole table stands.
const table = document.querySelector("table.encoders");
const box = document.getElementById("encoder-filter");
const shown = document.getElementById("encoder-count");
const body = table.tBodies[0];
const rows = [...body.rows];

function filter() {
  const words = box.value.toLowerCase().split(/\s+/);
  for (const row of rows) row.hidden = !words.every((word) => row.cells[0].textContent.toLowerCase().includes(word));
  shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} encoders`;
}

[...table.tHead.rows[0].cells].forEach((head, column) => {
  const button = document.createElement("button");
  button.textContent = head.textContent;
  button.onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const value = (row) => row.cells[column].textContent;
    const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    rows.sort((a, b) => sign * order(value(a), value(b)));
    body.append(...rows);
  };
  head.replaceChildren(button);
});

box.oninput = filter;
box.parentElement.hidden = false;
filter();
