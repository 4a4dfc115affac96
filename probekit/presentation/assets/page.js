// What every part of the page uses: elements, numbers, packed arrays, and moving through tables by arrow keys.
// Data reaches the page as text nodes and attribute values only, never as markup.

/**
 * An element. Attributes `on...` are listeners; false, null and undefined leave an attribute out. True is an empty
 * attribute, but "true" for ARIA, where an empty one says nothing.
 */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  return fill(set(element, attributes), children);
}

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  return fill(set(element, attributes), children);
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : String(value));
  }
  return element;
}

function fill(element, children) {
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A token as nodes: its signs (space, line end, escapes) stand back, so that the word reads. */
export function tokenNodes(text) {
  return text
    .split(/([␣⏎⇥␍∅]|⟨[^⟩]*⟩)/)
    .filter((piece) => piece !== "")
    .map((piece) => (/^([␣⏎⇥␍∅]|⟨[^⟩]*⟩)$/.test(piece) ? el("span", { class: "sign" }, piece) : piece));
}

export const NONE = "–";

export function fixed(value, digits = 2) {
  return value === null || value === undefined || Number.isNaN(value) ? NONE : value.toFixed(digits);
}

export function percent(value, digits = 1) {
  return value === null || value === undefined ? NONE : `${(100 * value).toFixed(digits)} %`;
}

export function times(value) {
  return value === null || value === undefined ? NONE : `${value.toFixed(2)}×`;
}

/** Counts are whole for greedy text, expected ones otherwise. */
export function count(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(1);
}

/** A small probability keeps two significant digits. */
export function chance(value) {
  if (value >= 0.01 || value === 0) return value.toFixed(2);
  return value >= 0.0001 ? value.toPrecision(2) : "<0.0001";
}

/** Unpacks { kind, data }: little-endian numbers, or bits (first bit highest), in base64. */
export function unpack({ kind, data, length }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  if (kind === "bits") return Uint8Array.from({ length }, (_, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1);
  if (kind === "f16") return Float32Array.from(new Uint16Array(bytes.buffer), half);
  return new { u16: Uint16Array, u32: Uint32Array, f32: Float32Array }[kind](bytes.buffer);
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 0x3ff;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** Remembers what `make(key)` answered, by the key's parts. */
export function remembered(make) {
  const known = new Map();
  return (...key) => {
    const name = key.join("\n");
    if (!known.has(name)) known.set(name, make(...key));
    return known.get(name);
  };
}

/** Replaces the options of a select, and keeps the choice where it still exists. */
export function setOptions(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

/**
 * Makes a grid of cells one stop of the tab key; arrow keys, Home, End, Page Up and Page Down move within it.
 * cells: rows of elements, as they stand on the page.
 */
export function gridKeys(cells, start = [0, 0]) {
  let [row, column] = start;
  const move = (toRow, toColumn) => {
    cells[row][column].tabIndex = -1;
    row = Math.max(0, Math.min(cells.length - 1, toRow));
    column = Math.max(0, Math.min(cells[row].length - 1, toColumn));
    cells[row][column].tabIndex = 0;
    return cells[row][column];
  };
  cells.forEach((line, i) =>
    line.forEach((cell, j) => {
      cell.tabIndex = -1;
      cell.addEventListener("focus", () => move(i, j));
      cell.addEventListener("keydown", (event) => {
        const to = {
          ArrowUp: [i - 1, j],
          ArrowDown: [i + 1, j],
          ArrowLeft: [i, j - 1],
          ArrowRight: [i, j + 1],
          Home: [i, 0],
          End: [i, line.length - 1],
          PageUp: [0, j],
          PageDown: [cells.length - 1, j],
        }[event.key];
        if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        move(...to).focus();
      });
    }),
  );
  move(row, column);
}

export const calmMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
