// The replay: any exit layer and draft length on any text of the study, recomputed here from the trace; and the rounds of
// other ways of drafting, which came with the page.

import { shade } from "./charts.js";
import { textLabel } from "./lens.js";
import { count, el, fixed, percent, remembered, setOptions, times, tokenNodes, unpack } from "./page.js";
import { countsOf, countsOfRounds, expectedCountsOf, figuresOf, FIRST_START, pooled, roundsOf, roundsOfWay } from "./rounds.js";

const FIGURES = [
  ["predicted speedup", "speedup", times],
  ["acceptance rate", "acceptanceRate", percent],
  ["alpha", "alpha", percent],
  ["tokens per round", "tokensPerRound", fixed],
  ["rounds", "rounds", count],
  ["drafted", "drafted", count],
  ["accepted", "accepted", count],
  ["tokens", "tokens", count],
];

/** Which texts are pooled, by the index of their prompt. */
const POOLS = { all: () => true, even: (index) => index % 2 === 0, odd: (index) => index % 2 === 1 };

/**
 * section: holds the controls (`data-control`) and the places to draw in (`data-place`).
 * Returns show(model's place, exit layer or null for the draft model, draft length).
 */
export function replay(section, models) {
  const control = (name) => section.querySelector(`[data-control=${name}]`);
  const place = (name) => section.querySelector(`[data-place=${name}]`);
  const [modelSelect, textSelect, drafterSelect, firstSelect, poolSelect] = ["model", "text", "drafter", "first-round", "pool"].map(control);
  const [exitSlider, lengthSlider, roundSlider] = ["exit", "length", "round"].map(control);
  const [previous, next, whole] = ["previous", "next", "whole"].map(control);
  let step = null; // the round that is shown, from 1; null: all of them
  let drawn = null; // { text, rounds } of what stands there now

  // What decides a draft's fate at each output token: agreement (0 or 1), or its chance where the text was sampled.
  // A row for each exit layer, and a last one for the draft model where there is one.
  const signals = remembered((m, at) => unpack(models[m].prompts[at].signal));
  const drafts = remembered((m, at) => unpack(models[m].prompts[at].drafts));
  const ids = remembered((m, at) => unpack(models[m].prompts[at].ids));
  const rowOf = (values, prompt, drafter) => values.subarray(drafter * prompt.new_tokens, (drafter + 1) * prompt.new_tokens);
  const signalOf = (m, at, drafter) => rowOf(signals(m, at), models[m].prompts[at], drafter);
  const counts = remembered((m, at, drafter, length, first) =>
    (models[m].text === "greedy" ? countsOf : expectedCountsOf)(signalOf(m, at, drafter), length, models[m].budget, first));

  const played = remembered((m, at, way) => {
    const prompt = models[m].prompts[at];
    return prompt.ways && roundsOfWay(unpack(prompt.ways[way].rounds), prompt.new_tokens);
  });
  const wayCounts = remembered((m, at, way) => countsOfRounds(played(m, at, way), models[m].prompts[at].ways[way].seconds));

  function chooseModel() {
    const model = models[modelSelect.value];
    setOptions(textSelect, model.prompts.map((prompt, at) => [at, textLabel(prompt)]));
    const ways = model.prompts.every((prompt) => prompt.ways) ? model.ways : [];
    setOptions(drafterSelect, [
      ["self", "its own early layers"],
      ...(model.drafter ? [["other", model.drafter]] : []),
      ...ways.map((way, i) => [`way ${i}`, way.label]),
    ]);
    drafterSelect.closest("label").hidden = !model.drafter && ways.length === 0;
    exitSlider.max = model.depth - 1;
    lengthSlider.max = model.longest;
    for (const element of section.querySelectorAll("[data-for]")) {
      element.hidden = !element.dataset.for.split(" ").includes(model.text);
    }
    setPair(...(model.chosen ?? best(model)));
    draw();
  }

  function setPair(exit, length) {
    drafterSelect.value = exit === null ? "other" : "self";
    exitSlider.value = exit ?? exitSlider.value;
    lengthSlider.value = length;
  }

  function draw() {
    const [m, at] = [Number(modelSelect.value), Number(textSelect.value)];
    const model = models[m];
    const prompt = model.prompts[at];
    const way = drafterSelect.value.startsWith("way ") ? Number(drafterSelect.value.slice(4)) : null;
    for (const element of [lengthSlider, firstSelect]) element.disabled = way !== null;
    if (way !== null) return drawWay(m, at, way);
    const own = drafterSelect.value === "self";
    const drafter = own ? Number(exitSlider.value) - 1 : model.depth - 1;
    const [length, first] = [Number(lengthSlider.value), firstSelect.value];

    exitSlider.disabled = !own;
    exitSlider.setAttribute("aria-valuetext", `layer ${exitSlider.value} of ${model.depth}`);
    lengthSlider.setAttribute("aria-valuetext", `${length} drafted a round`);
    place("exit-value").textContent = own ? `${exitSlider.value} of ${model.depth}` : "not used";
    place("length-value").textContent = String(length);

    const costs = model.costs && { autoregressive: model.costs.autoregressive, rounds: model.costs.rounds[drafter] };
    const mine = counts(m, at, drafter, length, first);
    const all = pooled(members(model).map((i) => counts(m, i, drafter, length, first)), length);
    drawFigures(`${length} with ${own ? `layer ${exitSlider.value}` : model.drafter}`, figuresOf(mine, costs), figuresOf(all, costs));

    const text = {
      prompt,
      first: Math.min(FIRST_START[first], prompt.new_tokens),
      output: (t) => model.tokens[ids(m, at)[prompt.prompt_tokens + t]],
      draft: (t) => (prompt.drafts ? model.tokens[rowOf(drafts(m, at), prompt, drafter)[t]] : null),
    };
    place("prompt").textContent = prompt.text;
    if (model.text === "greedy") drawRounds(text, roundsOf(signalOf(m, at, drafter), length, model.budget, first));
    else drawChances(text, signalOf(m, at, drafter), mine.starts);
  }

  /** The places of the texts that are pooled. */
  const members = (model) => model.prompts.flatMap((each, i) => (POOLS[poolSelect.value](each.prompt) ? [i] : []));

  /** A way whose rounds came with the page. */
  function drawWay(m, at, way) {
    const [model, prompt] = [models[m], models[m].prompts[at]];
    const { label, drafters } = model.ways[way];
    exitSlider.disabled = true;
    firstSelect.value = "prefill"; // as the decoder begins
    for (const name of ["exit-value", "length-value"]) place(name).textContent = "the way’s own";
    const every = members(model).map((i) => wayCounts(m, i, way));
    const longest = Math.max(0, ...every.map((counts) => counts.byDrafted.length - 1));
    drawFigures(`with ${label}`, figuresOf(wayCounts(m, at, way), model.costs), figuresOf(pooled(every, longest), model.costs));
    place("prompt").textContent = prompt.text;
    const text = {
      prompt,
      first: Math.min(FIRST_START.prefill, prompt.new_tokens),
      output: (t) => model.tokens[ids(m, at)[prompt.prompt_tokens + t]],
      draft: (t, round) => (round.wrong >= 0 ? model.tokens[round.wrong] : null),
      who: (round) => (round.who >= 0 ? drafters[round.who] : "nobody"),
    };
    drawRounds(text, played(m, at, way));
  }

  function drawFigures(what, mine, all) {
    const cell = (value, show) => el("td", { "data-value": value }, show(value));
    place("figures").replaceChildren(...FIGURES.map(([label, name, show]) =>
      el("tr", { "data-figure": name }, el("th", { scope: "row" }, label), cell(mine[name], show), cell(all[name], show))));
    place("summary").textContent =
      `Draft ${what}: on this text ${percent(mine.acceptanceRate)} of the drafts are accepted, ` +
      `${fixed(mine.tokensPerRound)} tokens come out of a round, and the predicted speedup is ${times(mine.speedup)}; ` +
      `pooled over ${all.texts} texts ${percent(all.acceptanceRate)}, ${fixed(all.tokensPerRound)} and ${times(all.speedup)}.`;
  }

  /** Greedy text: what became of each token, round by round. */
  function drawRounds(text, rounds) {
    drawn = { text, rounds };
    const prefill = Array.from({ length: text.first }, (_, t) => token("prefill", text.output(t)));
    place("continuation").replaceChildren(...prefill, ...rounds.map((round) => el("span", { class: "round" }, roundNodes(text, round))));
    const names = ["round", "first output", "drafted", "accepted", "rejected draft", "added"];
    place("positions").replaceChildren(
      el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rounds.map((round, i) => el("tr", {},
        el("th", { scope: "row" }, i + 1), el("td", {}, round.start), el("td", {}, round.drafted), el("td", {}, round.accepted),
        el("td", { class: "mono" }, round.rejected ? rejectedNodes(text, round) : null),
        el("td", { class: "mono" }, adds(round) ? tokenNodes(text.output(round.start + round.accepted)) : null)))),
    );
    goTo(step);
  }

  /** Sampled text: each token by the chance that it is accepted if it was drafted. */
  function drawChances(text, chances, starts) {
    drawn = null;
    const outputs = Array.from(chances, (_, t) => t);
    place("continuation").replaceChildren(...outputs.map((t) => {
      const span = token(t < text.first ? "prefill" : "heat", text.output(t));
      if (t >= text.first) shade(span.firstChild, chances[t]);
      return span;
    }));
    const names = ["output", "token", "chance of acceptance", "chance that a round starts"];
    place("positions").replaceChildren(
      el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, outputs.map((t) => el("tr", {},
        el("th", { scope: "row" }, t), el("td", { class: "mono" }, tokenNodes(text.output(t))), el("td", {}, fixed(chances[t])), el("td", {}, fixed(starts[t]))))),
    );
  }

  /** Shows one round, those after it faint; all of them alike for null. */
  function goTo(round) {
    if (!drawn) return;
    const many = drawn.rounds.length;
    step = round === null || many === 0 ? null : Math.max(1, Math.min(many, round));
    section.querySelectorAll(".round").forEach((group, i) => {
      group.classList.toggle("now", step === i + 1);
      group.classList.toggle("later", step !== null && step < i + 1);
    });
    roundSlider.max = many;
    roundSlider.value = step ?? many;
    roundSlider.setAttribute("aria-valuetext", step === null ? "all rounds" : `round ${step} of ${many}`);
    place("round-value").textContent = step === null ? `all ${many}` : `${step} of ${many}`;
    place("round-words").textContent = step === null ? "The slider and the buttons go through it round by round." : roundWords(drawn.text, drawn.rounds[step - 1], step);
    previous.disabled = step === 1;
    next.disabled = step === many;
    whole.disabled = step === null;
    const box = place("continuation");
    const group = section.querySelectorAll(".round")[step === null ? 0 : step - 1];
    box.scrollTop = group ? group.offsetTop - box.clientHeight / 2 : 0;
  }

  setOptions(modelSelect, models.map((model, i) => [i, model.label]));
  modelSelect.addEventListener("change", chooseModel);
  for (const select of [textSelect, drafterSelect, firstSelect, poolSelect]) select.addEventListener("change", draw);
  for (const slider of [exitSlider, lengthSlider]) slider.addEventListener("input", draw);
  roundSlider.addEventListener("input", () => goTo(Number(roundSlider.value)));
  previous.addEventListener("click", () => goTo(step === null ? drawn.rounds.length : step - 1));
  next.addEventListener("click", () => goTo((step ?? 0) + 1));
  whole.addEventListener("click", () => goTo(null));
  chooseModel();

  return (model, exit, length) => {
    modelSelect.value = model;
    chooseModel();
    setPair(exit, length);
    draw();
  };
}

/** The pair with the greatest speedup, or acceptance rate where no speedup is known. */
function best(model) {
  const value = (cell) => cell.speedup[0] ?? cell.acceptance_rate[0] ?? 0;
  const cell = model.cells.reduce((most, each) => (value(each) > value(most) ? each : most));
  return [cell.exit, cell.length];
}

const adds = (round) => round.emitted > round.accepted;
const token = (kind, text) => el("span", {}, el("span", { class: `token ${kind}` }, tokenNodes(text)), el("wbr"));

function roundNodes(text, round) {
  const accepted = Array.from({ length: round.accepted }, (_, j) => token("accepted", text.output(round.start + j)));
  const rejected = round.rejected ? el("s", { class: "token rejected" }, rejectedNodes(text, round)) : null;
  const added = adds(round) ? token(round.rejected ? "correction" : "bonus", text.output(round.start + round.accepted)) : null;
  return [...accepted, rejected, added].filter(Boolean);
}

/** The first wrong draft, and how many more were drafted after it; what those were is not in a trace. */
function rejectedNodes(text, round) {
  const draft = text.draft(round.start + round.accepted, round);
  const more = round.drafted - round.accepted - 1;
  return [...(draft === null ? ["×"] : tokenNodes(draft)), more > 0 ? el("sub", {}, `+${more}`) : null].filter(Boolean);
}

function roundWords(text, round, number) {
  const at = round.start + round.accepted;
  const draft = round.rejected ? text.draft(at, round) : null;
  const more = round.drafted - round.accepted - 1;
  const by = text.who ? ` (${text.who(round)})` : "";
  const words = [`Round ${number}${by} drafts ${round.drafted} from output ${round.start} and accepts ${round.accepted}.`];
  if (round.rejected) {
    words.push(`The draft ${draft === null ? "" : `“${draft}” `}at output ${at} is rejected${more > 0 ? `, and ${more} more ${text.who ? "with" : "behind"} it` : ""}; the model corrects it to “${text.output(at)}”.`);
  } else if (adds(round)) {
    words.push(`Nothing is rejected; the model adds “${text.output(at)}”.`);
  } else {
    words.push("The text ends with an accepted draft.");
  }
  return words.join(" ");
}
