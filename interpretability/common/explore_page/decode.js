"use strict";

// Decodes the data packed by explore_encoding.py: zlib streams in base64, inflated when an image is selected.
// T tokens, the class token first (if there is one); maps are ordered by level, then head.

const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid;
const tokens = data.class_tokens + rows * columns;
const loaded = new Map();

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Data of an image, by its position in the gallery. */
function load(place) {
  if (!loaded.has(place)) loaded.set(place, unpack(data.images[place]));
  return loaded.get(place);
}

async function unpack(image) {
  const numbers = { codes: new Int8Array(await inflate(image.codes)) };
  numbers.limits = new Float32Array(await inflate(image.limits));
  if (data.neurons) {
    const entries = data.levels * data.neurons.quantities.length * tokens * data.neurons.top;
    const neurons = await inflate(image.neurons.numbers);
    numbers.neurons = neurons.byteLength === 2 * entries ? new Uint16Array(neurons) : new Uint32Array(neurons);
    numbers.values = new Uint16Array(await inflate(image.neurons.values));
    numbers.active = new Uint32Array(await inflate(image.neurons.active));
  }
  return numbers;
}

/** Scores of one query token at a level and head: T numbers. */
function scoresFrom(numbers, level, head, token) {
  const map = level * data.heads + head;
  const limits = numbers.limits.subarray(map * tokens, (map + 1) * tokens);
  const half = (tokens * (tokens + 1)) / 2; // of a symmetric map only the lower triangle is stored
  const symmetric = numbers.codes.length === data.levels * data.heads * half;
  return Float32Array.from({ length: tokens }, (_, key) => {
    if (!symmetric) return (numbers.codes[(map * tokens + token) * tokens + key] * limits[token]) / data.steps;
    const [low, high] = key < token ? [key, token] : [token, key];
    const code = numbers.codes[map * half + (high * (high + 1)) / 2 + low];
    return (code * Math.min(limits[low], limits[high])) / data.steps;
  });
}

/** |score| / sum of |scores|; 0 if all are 0. */
function sharesOf(scores) {
  const sum = scores.reduce((total, score) => total + Math.abs(score), 0);
  return scores.map((score) => (sum ? Math.abs(score) / sum : 0));
}

function mean(maps) {
  return maps[0].map((_, key) => maps.reduce((total, map) => total + map[key], 0) / maps.length);
}

/** Maps of a level for one query token: the mean of heads, then each head. */
function mapsOf(numbers, level, token, asShares) {
  const heads = Array.from({ length: data.heads }, (_, head) => scoresFrom(numbers, level, head, token));
  const maps = asShares && data.signed ? heads.map(sharesOf) : heads; // softmax weights are shares already
  return [mean(maps), ...maps];
}

/** For each quantity of a token: how many neurons are active, and the most active as [{head, neuron, value}]. */
function neuronsOf(image, numbers, level, token) {
  const { quantities, top, per_head: perHead } = data.neurons;
  return quantities.map((_, quantity) => {
    const place = (level * quantities.length + quantity) * tokens + token;
    const scale = image.neurons.scales[level][quantity] / 65535;
    const list = Array.from({ length: top }, (_, rank) => {
      const neuron = numbers.neurons[place * top + rank];
      const value = numbers.values[place * top + rank] * scale;
      return { head: Math.floor(neuron / perHead), neuron: neuron % perHead, value };
    });
    return { active: numbers.active[place], list: list.filter(({ value }) => value > 0) };
  });
}

/** The 256 colours, as (256, 3) bytes, of a colour map in data.colors. */
function colorsOf(name) {
  return Uint8Array.from(atob(data.colors[name]), (character) => character.charCodeAt(0));
}
