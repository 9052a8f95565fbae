"use strict";

// One state, redrawn after each change. The preview (what the pointer is over) overrides what was chosen.

const find = (id) => document.getElementById(id);
const first = data.class_tokens;
const centre = first + Math.floor(rows / 2) * columns + Math.floor(columns / 2);
const state = { image: 0, query: centre, key: null, level: data.levels - 1, column: 0, shares: !data.signed };
const preview = { query: null, key: null };
const palettes = { sequential: colorsOf("sequential"), diverging: colorsOf("diverging") };
const smallMaps = []; // by level, then column: the mean of heads, then each head
let numbers = null; // of the image shown

// ---------------------------------------------------------------- text

const digits = { minimumSignificantDigits: 3, maximumSignificantDigits: 3 };
const plain = new Intl.NumberFormat("en", digits);
const tiny = new Intl.NumberFormat("en", { ...digits, notation: "scientific" });

function text(value) {
  if (value === 0) return "0";
  const words = (Math.abs(value) < 1e-4 ? tiny : plain).format(value);
  return words.replaceAll("-", "\u2212").replace("E", "e");
}

const signed = (value) => (value > 0 && !state.shares ? "+" : "") + text(value);
const percent = (value) => (value > 0 && value < 0.01 ? "<\u00a01\u00a0%" : `${Math.round(100 * value)}\u00a0%`);
const count = (value) => value.toLocaleString("en");
const nameOfImage = (image) => image.name ?? `${data.part} image ${image.number}`;
const isOwn = (image) => image.label === null; // added by live.js: its class is not known
const nameOfHead = (column) => (column ? `head ${column}` : "mean of heads");

function nameOfToken(token) {
  if (token < first) return "class token";
  return `row ${Math.floor((token - first) / columns)}, column ${(token - first) % columns}`;
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------- drawing

/** Draws scores or shares of all tokens, one pixel per patch; limit: upper end of the scale. */
function paint(canvas, values, limit) {
  const colors = state.shares ? palettes.sequential : palettes.diverging;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let patch = 0; patch < rows * columns; patch++) {
    const part = limit ? values[first + patch] / limit : 0; // 0 to 1, signed: -1 to 1
    const color = 3 * Math.round(255 * (state.shares ? part : (part + 1) / 2));
    pixels.data.set([colors[color], colors[color + 1], colors[color + 2], 255], 4 * patch);
  }
  context.putImageData(pixels, 0, 0);
}

const largest = (values) => values.subarray(first).reduce((most, value) => Math.max(most, Math.abs(value)), 0);

/** Raw scores have one scale per map; shares have one for all heads of a level and one for their mean. */
function limitsOf(maps) {
  const [ofMean, ...ofHeads] = maps.map(largest);
  return [ofMean, ...(state.shares ? ofHeads.map(() => Math.max(...ofHeads)) : ofHeads)];
}

function strongestOf(values, n) {
  const keys = Array.from({ length: rows * columns }, (_, patch) => first + patch);
  return keys.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, n);
}

/** Moves a marker of page.css to a token; hidden for the class token, which is not on the map. */
function place(name, token) {
  const { style } = find("main");
  style.setProperty(`--${name}-shown`, token >= first ? 1 : 0);
  style.setProperty(`--${name}-row`, Math.floor((token - first) / columns));
  style.setProperty(`--${name}-column`, (token - first) % columns);
}

/** Redraws everything that depends on the patch, level, head or scale. */
function draw() {
  const query = preview.query ?? state.query;
  const levels = smallMaps.map((_, level) => mapsOf(numbers, level, query, state.shares));
  levels.forEach((maps, level) => {
    const limits = limitsOf(maps);
    maps.forEach((values, column) => paint(smallMaps[level][column], values, limits[column]));
  });
  const values = levels[state.level][state.column];
  const limit = limitsOf(levels[state.level])[state.column];
  const strongest = strongestOf(values, 3);
  paint(find("map").querySelector("canvas"), values, limit);
  place("query", query);
  place("key", strongest.find((key) => key !== query) ?? -1);
  drawLegend(limit);
  drawReadout(query, values, strongest);
  drawNeurons(query);
  return strongest.map((key) => `${nameOfToken(key)} ${signed(values[key])}`);
}

function drawLegend(limit) {
  const colors = state.shares ? palettes.sequential : palettes.diverging;
  const context = find("scale").getContext("2d");
  const pixels = context.createImageData(256, 1);
  for (let k = 0; k < 256; k++) pixels.data.set([...colors.subarray(3 * k, 3 * k + 3), 255], 4 * k);
  context.putImageData(pixels, 0, 0);
  find("low").textContent = state.shares ? "0" : text(-limit);
  find("middle").textContent = state.shares ? text(limit / 2) : "0";
  find("high").textContent = text(limit);
  const kind = state.shares ? "shares" : "scores";
  find("unit").textContent = data.units[kind];
  find("about-scores").textContent = data.notes[kind];
  find("about-maps").textContent = state.shares
    ? "All for the same query patch. The heads of a level share a scale; their mean has its own."
    : "All for the same query patch, each with its own scale.";
}

function drawReadout(query, values, strongest) {
  const key = preview.key ?? state.key;
  find("map-name").textContent = `Level ${state.level + 1}, ${nameOfHead(state.column)}`;
  find("from").textContent = nameOfToken(query);
  find("strongest").replaceChildren(
    ...strongest.map((each) => element("li", "", `${nameOfToken(each)}: ${signed(values[each])}`)),
  );
  find("to-token").textContent = signed(values[0]);
  find("reading").textContent = key === null ? "hover or tap the map" : `${nameOfToken(key)}: ${signed(values[key])}`;
  place("cursor", key ?? -1);
  find("class-token").setAttribute("aria-pressed", query < first);
}

function drawNeurons(query) {
  if (!data.neurons) return;
  find("neurons-title").textContent = `Most active neurons: ${nameOfToken(query)}, level ${state.level + 1}`;
  const lists = neuronsOf(data.images[state.image], numbers, state.level, query);
  find("neurons").replaceChildren(
    ...lists.map(({ active, list }, k) => {
      const { name, text: meaning } = data.neurons.quantities[k];
      const all = data.heads * data.neurons.per_head;
      const bars = list.map(({ head, neuron, value }) =>
        bar(`head ${head + 1}, ${neuron}`, text(value), value / list[0].value),
      );
      const none = element("li", "quiet", "none is active");
      return element(
        "section",
        "",
        element("h3", "", element("code", "", name)),
        element("p", "quiet", meaning),
        element("ol", "bars", ...(bars.length ? bars : [none])),
        element("p", "quiet", `${count(active)} of ${count(all)} active`),
      );
    }),
  );
}

function bar(name, value, part, className = "") {
  const made = element("li", className, element("span", "", name), element("span", "value", value));
  made.style.setProperty("--part", part);
  return made;
}

/** Redraws what depends on the image only. */
function drawImage() {
  const image = data.images[state.image];
  const said = image.levels.at(-1).top[0];
  const right = said.class === image.label;
  find("stage-title").textContent = nameOfImage(image);
  find("photo").src = image.png;
  const predicted = [element("strong", "", data.classes[said.class]), ` (${percent(said.probability)}) `];
  const mark = element("span", right ? "mark right" : "mark wrong", right ? "\u2713 right" : "\u2717 wrong");
  const truth = ["True class ", element("strong", "", data.classes[image.label] ?? ""), ", predicted "];
  find("verdict").replaceChildren(...(isOwn(image) ? ["Predicted ", ...predicted] : [...truth, ...predicted, mark]));
  image.levels.forEach(({ top: [best] }, level) => {
    const cell = find("rows").rows[level].cells[0].querySelector(".said");
    cell.textContent = `${data.classes[best.class]} ${percent(best.probability)}`;
    cell.classList.toggle("true", best.class === image.label);
  });
}

function drawLevel() {
  const image = data.images[state.image];
  const { top, truth } = image.levels[state.level];
  const list = [...top];
  if (!isOwn(image) && !top.some((each) => each.class === image.label)) list.push({ class: image.label, probability: truth });
  find("says-title").textContent = `Prediction after level ${state.level + 1}`;
  find("says").replaceChildren(
    ...list.map((each) => {
      const isTrue = each.class === image.label;
      const name = data.classes[each.class] + (isTrue ? " (true class)" : "");
      return bar(name, percent(each.probability), each.probability, isTrue ? "true" : "");
    }),
  );
}

// ---------------------------------------------------------------- changes

/** Redraws, and announces the choice to screen readers. */
function refresh() {
  const strongest = draw();
  drawLevel();
  find("live").textContent = [
    `${nameOfImage(data.images[state.image])}, ${find("verdict").textContent}.`,
    `From ${nameOfToken(state.query)}, level ${state.level + 1}, ${nameOfHead(state.column)}:`,
    state.key === null ? `strongest ${strongest[0]}.` : `${find("reading").textContent}.`,
  ].join(" ");
}

async function showImage(place) {
  state.image = place;
  const found = await load(place);
  if (state.image !== place) return; // another was selected meanwhile
  numbers = found;
  drawImage();
  refresh();
}

/** A board of patches: the pointer previews a token (in preview[name]); a click or an arrow key keeps it (in state). */
function makeBoard(board, name) {
  const show = (token) => {
    if (token === preview[name]) return;
    preview[name] = token;
    draw();
  };
  const keep = (token) => {
    state[name] = token;
    preview[name] = null;
    refresh();
  };
  const tokenAt = (event) => {
    const box = board.getBoundingClientRect();
    const within = (part, n) => Math.min(n - 1, Math.max(0, Math.floor(part * n)));
    const row = within((event.clientY - box.top) / box.height, rows);
    return first + row * columns + within((event.clientX - box.left) / box.width, columns);
  };
  board.addEventListener("pointermove", (event) => event.pointerType !== "touch" && show(tokenAt(event)));
  board.addEventListener("pointerleave", () => show(null));
  board.addEventListener("click", (event) => keep(tokenAt(event)));
  board.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape" && name === "key") keep(null);
    if (!moves[event.key]) return;
    event.preventDefault();
    const patch = Math.max(0, (state[name] ?? state.query) - first); // from the class token to the first patch
    const row = Math.floor(patch / columns) + moves[event.key][0];
    const column = (patch % columns) + moves[event.key][1];
    if (row >= 0 && row < rows && column >= 0 && column < columns) keep(first + row * columns + column);
  });
}

/** Up and down move to the next row of radio buttons; browsers would move to the next button. */
function moveByRows(group) {
  group.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
    event.preventDefault();
    const box = (input) => input.parentElement.getBoundingClientRect();
    const from = box(event.target);
    const distance = (to) => (event.key === "ArrowUp" ? from.top - to.top : to.top - from.top);
    const aside = (to) => Math.abs(to.left - from.left);
    const [nearest] = [...group.querySelectorAll("input")]
      .map((input) => ({ input, to: box(input) }))
      .filter(({ to }) => distance(to) > from.height / 2)
      .sort((a, b) => distance(a.to) - distance(b.to) || aside(a.to) - aside(b.to));
    nearest?.input.click();
    nearest?.input.focus();
  });
}

// ---------------------------------------------------------------- the page

function radio(name, label, shown, chosen, choose) {
  const input = element("input");
  Object.assign(input, { type: "radio", name, checked: chosen });
  input.setAttribute("aria-label", label);
  input.addEventListener("change", choose);
  const made = element("label", "pick", input, shown);
  made.title = label;
  return made;
}

function addThumb(image, place) {
  const said = image.levels.at(-1).top[0].class;
  const wrong = !isOwn(image) && said !== image.label;
  const verdict = wrong ? `, predicted ${data.classes[said]}` : "";
  const label = `${nameOfImage(image)}: ${data.classes[image.label ?? said]}${verdict}`;
  const picture = element("img");
  Object.assign(picture, { src: image.png, alt: "" });
  const thumb = radio("image", label, picture, place === 0, () => showImage(place));
  if (wrong) thumb.append(element("span", "badge", "\u2717"));
  find("thumbs").append(thumb);
  return thumb;
}

function makeGallery() {
  data.images.forEach(addThumb);
  moveByRows(find("thumbs"));
}

function makeTable() {
  const names = ["mean", ...Array.from({ length: data.heads }, (_, head) => `${head + 1}`)];
  find("heads").append(element("td"), ...names.map((name) => element("th", "", name)));
  for (let level = 0; level < data.levels; level++) {
    const row = find("rows").insertRow();
    const title = element("th", "", element("span", "", `Level ${level + 1}`), element("span", "said"));
    title.scope = "row";
    row.append(title);
    smallMaps.push(
      names.map((_, column) => {
        const canvas = element("canvas");
        Object.assign(canvas, { width: columns, height: rows });
        const shown = element("span", "small", canvas, element("span", "frame"));
        const label = `level ${level + 1}, ${nameOfHead(column)}`;
        const chosen = level === state.level && column === state.column;
        row.append(element("td", "", radio("view", label, shown, chosen, () => chooseMap(level, column))));
        return canvas;
      }),
    );
  }
  moveByRows(find("table"));
}

function chooseMap(level, column) {
  Object.assign(state, { level, column });
  refresh();
}

function makeSwitches() {
  const theme = find("theme");
  const setDark = (dark) => theme.setAttribute("aria-pressed", dark);
  setDark(matchMedia("(prefers-color-scheme: dark)").matches);
  theme.addEventListener("click", () => {
    setDark(theme.getAttribute("aria-pressed") !== "true");
    document.documentElement.dataset.theme = theme.getAttribute("aria-pressed") === "true" ? "dark" : "light";
  });
  find("show").hidden = !data.signed;
  find("show").addEventListener("change", (event) => {
    state.shares = event.target.value === "shares";
    refresh();
  });
  find("class-token").hidden = find("token-row").hidden = first === 0;
  find("class-token").addEventListener("click", () => {
    state.query = state.query < first ? centre : 0;
    refresh();
  });
}

function makePage() {
  document.title = `${data.title}: inside the model`;
  find("run").textContent = `${data.title} \u00b7 ${data.model}`;
  for (const name of ["levels", "neurons"]) find(`about-${name}`).textContent = data.notes[name];
  find("about-steps").textContent = `Scores are stored in steps of 1/${data.steps} of each query's largest score.`;
  find("neurons-title").textContent = "Most active neurons";
  const map = find("map").querySelector("canvas");
  Object.assign(map, { width: columns, height: rows });
  find("picture").setAttribute("aria-label", `Image of ${rows} by ${columns} patches`);
  find("map").setAttribute("aria-label", `Attention to ${rows} by ${columns} patches`);
  const { style } = find("main");
  style.setProperty("--rows", rows);
  style.setProperty("--columns", columns);
  style.setProperty("--small", data.levels > 8 ? "50px" : "68px");
  makeGallery();
  makeTable();
  makeSwitches();
  makeBoard(find("picture"), "query");
  makeBoard(find("map"), "key");
  find("main").hidden = false;
  return showImage(0);
}

if (!window.DecompressionStream || !CSS.supports("color", "light-dark(red, blue)")) {
  const needed = "Chrome 123, Firefox 121, Safari 17.5 or newer";
  find("problem").textContent = `This browser is too old for the page, which needs ${needed}.`;
  find("problem").hidden = false;
} else {
  makePage();
}
