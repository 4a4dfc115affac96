// Puts the page together: reads the data, fills the sections that are there, and minds the theme.

import { agreementCharts, heatTables, speedupChart } from "./charts.js";
import { lensTable } from "./lens.js";
import { calmMotion } from "./page.js";
import { replay } from "./replay.js";

document.documentElement.classList.remove("unscripted");
const data = JSON.parse(document.getElementById("data").textContent);
const section = (name) => document.getElementById(name);
const labels = data.models.map((model) => model.label);

if (section("agreement")) agreementCharts(section("agreement").querySelector("[data-place=charts]"), labels, data.agreement);
if (section("lens")) lensTable(section("lens"), data.models);
if (section("replay")) {
  const show = replay(section("replay"), data.models);
  const pick = (model, exit, length) => {
    show(model, exit, length);
    section("replay").querySelector("h2").focus({ preventScroll: true });
    section("replay").scrollIntoView({ behavior: calmMotion() ? "auto" : "smooth" });
  };
  const table = section("table");
  heatTables(table.querySelector("[data-place=tables]"), table.querySelector("[data-control=measure]"), data.models, pick);
}
if (section("speedups")) speedupChart(section("speedups"), labels, data.speedups);

// The dark style sheet answers to the system's setting until the reader chooses.
const dark = document.getElementById("dark");
const toggle = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
const isDark = () => (chosen === null ? system.matches : chosen);
function applyTheme() {
  if (chosen !== null) dark.media = chosen ? "screen" : "not all";
  toggle.textContent = isDark() ? "Light" : "Dark";
}
toggle.addEventListener("click", () => {
  chosen = !isDark();
  applyTheme();
});
system.addEventListener("change", applyTheme);
toggle.hidden = false;
applyTheme();
// What scrolls, and holds nothing that takes the focus, takes it itself.
function reachable() {
  for (const box of document.querySelectorAll(".scroll, .continuation")) {
    const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (scrolls && !box.querySelector("[tabindex], select, button")) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
// A printed page is whole: what is folded is unfolded meanwhile.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});
addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);
reachable();
document.documentElement.dataset.ready = "yes";
