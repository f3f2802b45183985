// A click on a heading of a table sorts its rows, or its groups of rows by the first row that has numbers.
for (const table of document.querySelectorAll("table.sortable")) {
  const bodies = [...table.tBodies];
  const items = bodies.length > 1 ? bodies : [...bodies[0].rows];
  const lead = item => item.querySelector?.("tr.lead") ?? (item.rows ? item.rows[item.rows.length - 1] : item);
  for (const [column, heading] of [...table.tHead.rows[0].cells].entries()) {
    const key = item => lead(item).cells[column]?.dataset.sort ?? lead(item).cells[column]?.textContent.trim() ?? "";
    const sort = () => {
      const up = heading.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      heading.ariaSort = up ? "ascending" : "descending";
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (up ? 1 : -1) * (x - y || x.localeCompare(y));
      };
      items.sort(order).forEach(item => item.parentNode.append(item));
    };
    heading.tabIndex = 0;
    heading.classList.add("sorts");
    heading.onclick = sort;
    heading.onkeydown = event => event.key === "Enter" && sort();
  }
}
