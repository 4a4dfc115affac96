// The lens table: what each layer would say at each position of a text.

import { shade } from "./charts.js";
import { chance, el, fixed, gridKeys, percent, remembered, setOptions, tokenNodes, unpack } from "./page.js";

// `shade` answers 0..1; `ends` are the words at the two ends of the colour scale.
const STATISTICS = {
  probability: {
    label: "probability of the top token",
    show: chance,
    shade: (value) => value,
    ends: () => ["0", "1"],
  },
  entropy: {
    label: "entropy (nats)",
    show: (value) => `${fixed(value)} nats`,
    shade: (value, { vocabulary }) => value / Math.log(vocabulary),
    ends: ({ vocabulary }) => ["0", `${Math.log(vocabulary).toFixed(1)} nats: every token alike`],
  },
  kl: {
    label: "KL(model ‖ lens) (nats)",
    show: (value) => `${fixed(value)} nats`,
    shade: (value, { most }) => Math.min(1, value / most),
    ends: ({ most }) => ["0: the model's own", `${most.toFixed(1)} nats`],
  },
  rank: {
    label: "rank of the text's next token (0 is the top)",
    show: (value) => String(value),
    shade: (value, { vocabulary }) => 1 - Math.log1p(value) / Math.log1p(vocabulary),
    ends: ({ vocabulary }) => [`${vocabulary - 1}`, "0 (logarithmic)"],
  },
  agrees: {
    label: "agreement with the model",
    show: (value) => (value ? "agrees with the model" : "differs from the model"),
    shade: (value) => (value ? 0.5 : 0),
    ends: () => ["differs", "agrees"],
  },
  written: {
    label: "logit of the model's token that the layer wrote",
    show: (value) => `wrote ${signed(value)} of the logit`,
    shade: (value, { widest }) => value / widest,
    ends: ({ widest }) => ["0, or against it", signed(widest)],
  },
};

const signed = (value) => (value < 0 ? `−${fixed(-value)}` : `+${fixed(value)}`);

/** The figures of one text under one lens, each an array over (layer, row). */
function readText(model, prompt, lens) {
  const packed = prompt.lens[lens];
  const ids = unpack(prompt.ids);
  const rows = ids.length - 1;
  const [argmax, probability, entropy, kl, rank] = ["argmax", "probability", "entropy", "kl", "rank"].map((name) => unpack(packed[name]));
  const own = unpack(prompt.lens["final-norm"].argmax).subarray(model.depth * rows);
  const attribution = prompt.attribution && Object.fromEntries(Object.entries(prompt.attribution).map(([name, each]) => [name, unpack(each)]));
  const written = attribution && attribution.attention.map((value, i) => value + attribution.mlp[i] + attribution.embedding[i]);
  const top = packed.top && { tokens: unpack(packed.top.tokens), probabilities: unpack(packed.top.probabilities) };
  return { ids, rows, argmax, probability, entropy, kl, rank, top, attribution, written, agrees: argmax.map((id, i) => Number(id === own[i % rows])) };
}

/** section: the element that holds the controls (`data-control`) and the places to draw in. */
export function lensTable(section, models) {
  const control = (name) => section.querySelector(`[data-control=${name}]`);
  const [modelSelect, textSelect, lensSelect, statisticSelect] = ["model", "text", "lens", "statistic"].map(control);
  const table = section.querySelector("[data-place=table]");
  const detail = section.querySelector("[data-place=detail]");
  const scale = section.querySelector("[data-place=scale]");
  const usable = models.map((model, i) => [i, model]).filter(([, model]) => model.prompts.some((prompt) => prompt.lens));

  const read = remembered((model, at, lens) => readText(models[model], models[model].prompts[at], lens));

  setOptions(modelSelect, usable.map(([i, model]) => [i, model.label]));
  const attributed = usable.some(([, model]) => model.prompts.some((prompt) => prompt.lens && prompt.attribution));
  setOptions(statisticSelect, Object.entries(STATISTICS)
    .filter(([name]) => name !== "written" || attributed).map(([name, each]) => [name, each.label]));

  function chooseModel() {
    const model = models[modelSelect.value];
    const texts = model.prompts.map((prompt, at) => [at, prompt]).filter(([, prompt]) => prompt.lens);
    setOptions(textSelect, texts.map(([at, prompt]) => [at, textLabel(prompt)]));
    setOptions(lensSelect, Object.keys(texts[0][1].lens).map((lens) => [lens, `${lens} lens`]));
    draw();
  }

  /** Colours by who wrote the logit are there for the texts that the study knows it of. */
  function offerShares(known) {
    const option = [...statisticSelect.options].find((each) => each.value === "written");
    if (!option) return;
    option.disabled = !known;
    if (!known && statisticSelect.value === "written") statisticSelect.selectedIndex = 0;
  }

  function draw() {
    const model = models[modelSelect.value];
    const prompt = model.prompts[textSelect.value];
    offerShares(Boolean(prompt.attribution));
    const text = read(modelSelect.value, textSelect.value, lensSelect.value);
    const statistic = STATISTICS[statisticSelect.value];
    const values = text[statisticSelect.value];
    const range = { vocabulary: model.vocabulary, most: Math.max(0.1, quantile(text.kl, 0.98)), widest: text.written ? Math.max(0.1, quantile(text.written, 0.98)) : 1 };
    const layers = Array.from({ length: model.depth + 1 }, (_, i) => model.depth - i);

    const reads = (row) => model.tokens[text.ids[row]];
    const cells = layers.map((layer) => Array.from({ length: text.rows }, (_, row) => {
      const at = layer * text.rows + row;
      const token = model.tokens[text.argmax[at]];
      const cell = el("td", {
        class: `heat token-cell${row < prompt.prompt_tokens - 1 ? " prompt" : ""}${text.agrees[at] ? " agrees" : ""}`,
        "aria-label": `layer ${layer}, position ${row}: ${token}, ${statistic.show(values[at])}`,
        "aria-describedby": detail.id,
        onfocus: () => show(layer, row),
        onmouseenter: () => show(layer, row),
      }, tokenNodes(token));
      shade(cell, Math.max(0, Math.min(1, statistic.shade(values[at], range))));
      return cell;
    }));
    gridKeys(cells, [0, Math.max(0, prompt.prompt_tokens - 1)]);

    const positions = Array.from({ length: text.rows }, (_, row) => row);
    const column = (row) => (row < prompt.prompt_tokens - 1 ? "prompt" : null);
    table.replaceChildren(
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "reads"),
        positions.map((row) => el("th", { scope: "col", class: column(row), "aria-label": `position ${row} reads ${reads(row)}` }, tokenNodes(reads(row)))))),
      el("tbody", {}, cells.map((line, i) => el("tr", {}, el("th", { scope: "row" }, layerName(layers[i], model.depth)), line))),
      el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "text"),
        positions.map((row) => el("td", { class: column(row) }, tokenNodes(reads(row + 1)))))),
    );
    table.setAttribute("aria-label", `${lensSelect.value} lens of ${model.label}, ${textLabel(prompt)}`);
    const [from, to] = statistic.ends(range);
    scale.replaceChildren(from, el("span", { class: "ramp", "aria-hidden": true }), to);

    function show(layer, row) {
      detail.replaceChildren(...details(model, prompt, text, layer, row));
    }
    const first = Math.max(0, prompt.prompt_tokens - 1);
    show(model.depth, first);
    const [corner, ...heads] = table.tHead.rows[0].cells;
    const box = table.parentElement;
    box.scrollLeft = 0;
    box.scrollLeft = heads[Math.max(0, first - 3)].getBoundingClientRect().left - corner.getBoundingClientRect().right;
  }

  for (const select of [textSelect, lensSelect, statisticSelect]) select.addEventListener("change", draw);
  modelSelect.addEventListener("change", chooseModel);
  chooseModel();
}

function details(model, prompt, text, layer, row) {
  const at = layer * text.rows + row;
  const output = row - (prompt.prompt_tokens - 1);
  const token = (id) => el("span", { class: "mono" }, tokenNodes(model.tokens[id]));
  const line = (name, value) => [el("dt", {}, name), el("dd", {}, value)];
  const ten = text.top
    ? Array.from({ length: 10 }, (_, i) => [text.top.tokens[10 * at + i], text.top.probabilities[10 * at + i]])
    : [[text.argmax[at], text.probability[at]]];
  const bar = (probability) => {
    const element = el("span", { class: "bar", "aria-hidden": true });
    element.style.setProperty("--share", probability.toFixed(4));
    return element;
  };
  return [
    el("h3", {}, `${layer === model.depth ? "The model" : layer === 0 ? "The embedding" : `Layer ${layer}`}, position ${row}`),
    el("p", {}, "reads ", token(text.ids[row]), "; the text goes on with ", token(text.ids[row + 1]),
      output < 0 ? " (inside the prompt)" : ` (output ${output})`),
    el("ol", { class: "top", "aria-label": text.top ? "ten most probable tokens" : "most probable token" },
      ten.map(([id, probability]) => el("li", {}, token(id), bar(probability), el("span", { class: "number" }, chance(probability))))),
    text.top ? null : el("p", { class: "note" }, "The run kept the top ten of its first texts only."),
    el("dl", { class: "pairs" },
      line("with the model", text.agrees[at] ? "agrees" : "differs"),
      line("rank of the text's next token", text.rank[at]),
      line("entropy", `${fixed(text.entropy[at])} nats`),
      line("KL(model ‖ lens)", `${fixed(text.kl[at])} nats`),
      ...(text.attribution ? authors(text.attribution, layer, row, at).flatMap(([name, value]) => line(name, value)) : [])),
  ].filter(Boolean);
}

/** Who wrote the logit of the model's token: this layer, or at the last all that is no layer's. */
function authors({ embedding, attention, mlp, other, logits }, layer, row, at) {
  const whole = ["logit of the model's token", fixed(logits[row])];
  if (layer === 0) return [whole, ["of it by the embedding", signed(embedding[at])]];
  const own = [["by this layer's attention", signed(attention[at])], ["by its MLP", signed(mlp[at])]];
  return other[row] ? [whole, ...own, ["by biases and the soft cap", signed(other[row])]] : [whole, ...own];
}

function layerName(layer, depth) {
  if (layer === depth) return `${layer} model`;
  return layer === 0 ? "0 embedding" : String(layer);
}

/** How a text is named in lists: its index, its kind, its first words. */
export function textLabel(prompt) {
  const words = prompt.text.replace(/\s+/g, " ").trim();
  const start = words.length > 48 ? `${words.slice(0, 47)}…` : words;
  return `${prompt.prompt}${prompt.kind ? ` (${prompt.kind})` : ""}: ${start}`;
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.floor(share * (sorted.length - 1))];
}
