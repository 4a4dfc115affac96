// The evidence: agreement by layer, the table over exit layer and draft length, predicted against measured speedup.

import { el, fixed, gridKeys, percent, svg, times } from "./page.js";

const MARKS = [
  (x, y) => svg("circle", { cx: x, cy: y, r: 3.5 }),
  (x, y) => svg("rect", { x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4 }),
  (x, y) => svg("path", { d: `M${x} ${y - 4.2}l4.2 7.4h-8.4z` }),
  (x, y) => svg("path", { d: `M${x} ${y - 4.6}l4.6 4.6l-4.6 4.6l-4.6 -4.6z` }),
];
const series = (i) => `series series-${i % 6}`;
const mark = (i, x, y) => MARKS[i % MARKS.length](x, y);

/** Lines of text under a plot's name; each series has a colour and a shape. */
function legend(labels) {
  const item = (label, i) =>
    el("li", {}, svg("svg", { class: series(i), viewBox: "0 0 24 12", "aria-hidden": true },
      svg("path", { class: "line", d: "M0 6H24" }), mark(i, 12, 6)), label);
  return el("ul", { class: "legend" }, labels.map(item));
}

/** Axes with ticks; returns the svg and the two scales. */
function plot({ label, x, y, xTicks, yTicks, xTitle, yTitle, width = 460, height = 300 }) {
  const [left, right, top, bottom] = [46, width - 14, 14, height - 42];
  const across = (value) => left + ((value - x[0]) / (x[1] - x[0])) * (right - left);
  const up = (value) => bottom - ((value - y[0]) / (y[1] - y[0])) * (bottom - top);
  const root = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const [value, text] of yTicks) {
    root.append(svg("path", { class: "rule", d: `M${left} ${up(value)}H${right}` }));
    root.append(svg("text", { x: left - 8, y: up(value) + 4, "text-anchor": "end" }, text));
  }
  for (const [value, text] of xTicks) {
    root.append(svg("path", { class: "tick", d: `M${across(value)} ${bottom}v5` }));
    root.append(svg("text", { x: across(value), y: bottom + 18, "text-anchor": "middle" }, text));
  }
  root.append(svg("path", { class: "tick", d: `M${left} ${bottom}H${right}` }));
  root.append(svg("text", { class: "title", x: right, y: bottom + 35, "text-anchor": "end" }, xTitle));
  if (yTitle) root.append(svg("text", { class: "title", x: left, y: 10, "text-anchor": "start" }, yTitle));
  return { root, across, up };
}

/** lines: [{ label, lens, layer: [], agreement: [], low: [], high: [] }], one a model and lens. */
export function agreementCharts(place, labels, lines) {
  place.append(legend(labels));
  const depth = Math.max(...lines.flatMap((line) => line.layer));
  const step = Math.max(1, Math.ceil(depth / 12));
  const layers = Array.from({ length: depth + 1 }, (_, layer) => layer).filter((layer) => layer % step === 0);
  const panels = ["final-norm", "raw"].filter((lens) => lines.some((line) => line.lens === lens));
  place.append(el("div", { class: "panels" }, panels.map((lens) => {
    const mine = lines.filter((line) => line.lens === lens);
    const { root, across, up } = plot({
      label: `Agreement with the model by layer, ${lens} lens; the numbers are in the table below.`,
      x: [0, depth], y: [0, 1], xTicks: layers.map((layer) => [layer, layer]), xTitle: "layer",
      yTicks: [0, 0.25, 0.5, 0.75, 1].map((share) => [share, `${100 * share} %`]),
    });
    for (const line of mine) {
      const i = labels.indexOf(line.label);
      const points = line.layer.map((layer, at) => [across(layer), up(line.agreement[at])]);
      const edge = (values) => line.layer.map((layer, at) => [across(layer), up(values[at] ?? line.agreement[at])]);
      const group = svg("g", { class: series(i) });
      group.append(svg("path", { class: "band", d: `M${edge(line.low).join("L")}L${edge(line.high).reverse().join("L")}Z` }));
      group.append(svg("path", { class: "line", d: `M${points.join("L")}` }));
      points.forEach(([x, y], at) => {
        const dot = mark(i, x, y);
        dot.append(svg("title", {}, `${line.label}, layer ${line.layer[at]}: ${percent(line.agreement[at])}`));
        group.append(dot);
      });
      root.append(group);
    }
    return el("figure", {}, el("figcaption", {}, `${lens} lens`), root);
  })));
}

/** points: [{ label, name, predicted, measured, low, high }]; the diagonal is where both are equal. */
export function speedupChart(place, labels, points) {
  const values = points.flatMap((point) => [point.predicted, point.measured, point.low, point.high]).filter(Boolean);
  const low = Math.min(0.5, Math.floor(4 * Math.min(...values)) / 4);
  const high = Math.max(1.5, Math.ceil(4 * Math.max(...values)) / 4);
  const step = high - low > 2 ? 0.5 : 0.25;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push([tick, tick.toFixed(2)]);
  const { root, across, up } = plot({
    label: "Predicted against measured speedup; the numbers are in the table below it.",
    x: [low, high], y: [low, high], xTicks: ticks, yTicks: ticks, xTitle: "predicted speedup", yTitle: "measured speedup",
    width: 400, height: 400,
  });
  root.append(svg("path", { class: "diagonal", d: `M${across(low)} ${up(low)}L${across(high)} ${up(high)}` }));
  for (const point of points) {
    const i = labels.indexOf(point.label);
    const [x, y] = [across(point.predicted), up(point.measured)];
    const dot = mark(i, x, y);
    dot.append(svg("title", {}, `${point.name}: predicted ${times(point.predicted)}, measured ${times(point.measured)}`));
    const group = svg("g", { class: series(i) });
    if (point.low && point.high) group.append(svg("path", { class: "line", d: `M${x} ${up(point.low)}V${up(point.high)}` }));
    group.append(dot);
    root.append(group);
  }
  place.append(legend(labels), root);
}

// `cell` is what stands in a cell, `show` what is said of it. Speedups are as strong as their distance from 1.
const MEASURES = {
  speedup: { label: "predicted speedup", cell: (value) => fixed(value), show: times, shade: (value, most, least) => Math.abs(value - 1) / Math.max(0.05, most - 1, 1 - least) },
  acceptance_rate: { label: "acceptance rate", cell: (value) => percent(value, 0).replace(" %", ""), show: percent, shade: (value) => value },
  tokens_per_round: { label: "tokens per round", cell: (value) => fixed(value, 1), show: (value) => fixed(value), shade: (value, most) => value / most },
};

/**
 * Tables over exit layer and draft length, one a model.
 * models: [{ label, chosen: [E, K] or null, cells: [{ exit, length, speedup: [value, low, high], ... }] }]
 * pick(model index, exit layer, draft length) is called for the cell that the reader chooses.
 */
export function heatTables(place, select, models, pick) {
  const draw = () => {
    const name = select.value;
    const values = models.flatMap((model) => model.cells.map((cell) => cell[name][0])).filter((value) => value !== null);
    const ends = [Math.max(...values), Math.min(...values)];
    place.replaceChildren(...models.map((model, i) => heatTable(model, name, ends, (...pair) => pick(i, ...pair))));
  };
  select.addEventListener("change", draw);
  draw();
}

function heatTable(model, name, ends, pick) {
  const measure = MEASURES[name];
  const lengths = [...new Set(model.cells.map((cell) => cell.length))].sort((a, b) => a - b);
  const exits = [...new Set(model.cells.map((cell) => cell.exit))].sort((a, b) => (b ?? 0) - (a ?? 0));
  const exitName = (exit) => (exit === null ? model.drafter : exit);
  const rows = exits.map((exit) => lengths.map((length) => {
    const cell = model.cells.find((each) => each.exit === exit && each.length === length);
    const [value, low, high] = cell?.[name] ?? [null, null, null];
    const chosen = model.chosen?.[0] === exit && model.chosen?.[1] === length;
    const interval = low === null ? "" : `, 95 % interval ${measure.show(low)} to ${measure.show(high)}`;
    const words = `${exit === null ? exitName(exit) : `exit layer ${exit}`}, draft length ${length}: ${measure.label} ${measure.show(value)}${interval}${chosen ? ", chosen" : ""}`;
    const go = () => pick(exit, length);
    const td = el("td", {
      class: `heat${chosen ? " chosen" : ""}${name === "speedup" && value < 1 ? " loss" : ""}`,
      "aria-label": words, title: words, onclick: go,
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        go();
      },
    }, measure.cell(value));
    shade(td, value === null ? 0 : measure.shade(value, ...ends));
    return td;
  }));
  gridKeys(rows, model.chosen ? [exits.indexOf(model.chosen[0]), lengths.indexOf(model.chosen[1])] : [0, 0]);
  return el("figure", {}, el("figcaption", {}, model.label), el("div", { class: "scroll" },
    el("table", { class: "heat-table", role: "grid", "aria-label": `${measure.label} of ${model.label}` },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "E \\ K"), lengths.map((length) => el("th", { scope: "col" }, length)))),
      el("tbody", {}, rows.map((cells, i) => el("tr", {}, el("th", { scope: "row" }, exitName(exits[i])), cells))))));
}

/** Gives a cell its share of the colour, 0..1. */
export function shade(cell, share) {
  cell.style.setProperty("--share", share.toFixed(3));
}
