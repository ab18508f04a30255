"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const off = new Set();

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const ofRule = (rule) => document.querySelectorAll(`.chart .r${rule}`);

  for (const button of document.querySelectorAll(".legend button")) {
    const rule = Number(button.dataset.rule);
    button.addEventListener("click", () => {
      off.has(rule) ? off.delete(rule) : off.add(rule);
      button.setAttribute("aria-pressed", String(!off.has(rule)));
      for (const node of ofRule(rule)) node.classList.toggle("off", off.has(rule));
    });
    const dim = (on) => {
      for (const node of document.querySelectorAll(".chart .line, .chart .band, .chart .end"))
        node.classList.toggle("dim", on && !node.classList.contains(`r${rule}`));
    };
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && dim(true));
    button.addEventListener("pointerleave", () => dim(false));
  }

  // Shows `parts` beside (x, y), kept inside the window.
  const show = (parts, x, y) => {
    tip.replaceChildren(...parts);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    const top = y + 16 + box.height > innerHeight ? y - 16 - box.height : y + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };

  // Pointer and arrow keys both end in point(column, row).
  const watch = (area, columns, rows, at, draw) => {
    let column = columns - 1, row = 0;
    const clear = () => { tip.hidden = true; area.querySelectorAll(".cursor, .mark, .cell").forEach((node) => node.remove()); };
    const point = (x, y) => { clear(); draw(column, row, x, y); };
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      [column, row] = at((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      point(event.clientX, event.clientY);
    });
    area.addEventListener("pointerleave", clear);
    area.addEventListener("blur", clear);
    area.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") return clear();
      if (!by || (by[1] && rows < 2)) return;
      event.preventDefault();
      column = Math.min(Math.max(column + by[0], 0), columns - 1);
      row = Math.min(Math.max(row + by[1], 0), rows - 1);
      const box = area.getBoundingClientRect();
      point(box.left + box.width * (column + 0.5) / columns, box.top + box.height * (row + 0.5) / rows);
    });
  };
  const percent = (share) => `${100 * share}%`;

  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = data.charts[figure.dataset.chart], area = figure.querySelector(".area");
    const nearest = (share) => chart.at.reduce((best, at, i) => Math.abs(at - share) < Math.abs(chart.at[best] - share) ? i : best, 0);
    watch(area, chart.epochs.length, 1, (x) => [nearest(x), 0], (column, _, x, y) => {
      const cursor = area.appendChild(make("span", "cursor"));
      cursor.style.left = percent(chart.at[column]);
      const there = chart.lines.filter((line) => line.values[column] !== null && !off.has(line.rule));
      for (const line of there) {
        const mark = area.appendChild(make("span", `mark ${line.paint}`));
        mark.style.left = percent(chart.at[column]);
        mark.style.bottom = percent(line.up[column]);
      }
      there.sort((a, b) => b.up[column] - a.up[column]);
      show([make("strong", "", `epoch ${chart.epochs[column]}`), ...there.map((line) => {
        const entry = make("div", line.paint);
        entry.append(make("i", ""), line.label, make("b", "", String(line.values[column])));
        return entry;
      })], x, y);
    });
  }

  for (const figure of document.querySelectorAll("[data-heat]")) {
    const heat = data.heats[figure.dataset.heat], area = figure.querySelector(".area");
    const columns = heat.columns.length, rows = heat.layers.length;
    const index = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    watch(area, columns, rows, (x, y) => [index(x, columns), index(y, rows)], (column, row, x, y) => {
      const cell = area.appendChild(make("span", "cell"));
      Object.assign(cell.style, { left: percent(column / columns), top: percent(row / rows), width: percent(1 / columns), height: percent(1 / rows) });
      const angle = heat.angles[row][column];
      const value = make("div", "");
      value.append(heat.columns[column], make("b", "", angle === null ? "not measurable" : `${angle}°`));
      show([make("strong", "", `${heat.label}, ${heat.layers[row]}`), value], x, y);
    });
  }
})();
