"use strict";

// Runs the model in the page, on images that are dropped or chosen, and adds them to the gallery.
// The runtime and the model are in the page: gzip streams in base64.

const OWN_CLASSES = 5; // listed per level
let session = null;

async function bytesOf(id) {
  const packed = Uint8Array.from(atob(find(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function makeSession() {
  const address = URL.createObjectURL(new Blob([await bytesOf("ort-code")], { type: "text/javascript" }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  Object.assign(ort.env.wasm, { wasmBinary: (await bytesOf("ort-wasm")).buffer, numThreads: 1, proxy: false });
  const made = await ort.InferenceSession.create(await bytesOf("model"), { executionProviders: ["wasm"] });
  return { ort, made };
}

// ---------------------------------------------------------------- preprocessing, as training/data/image_files.py

/** Weights with which the pixels from..to of a line become n pixels: bicubic with antialiasing, as Pillow's. */
function weightsOf(size, from, to, n) {
  const scale = (to - from) / n;
  const stretch = Math.max(scale, 1);
  const cubic = (x) => {
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  return Array.from({ length: n }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const low = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const high = Math.min(size, Math.trunc(centre + 2 * stretch + 0.5));
    const weights = Array.from({ length: high - low }, (_, k) => cubic(Math.abs((low + k - centre + 0.5) / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { low, weights: weights.map((weight) => weight / sum) };
  });
}

/** Rows of pixels with `channels` bytes each, every row resized by the weights; returned with rows as columns. */
function resizeRows(pixels, width, height, channels, weights) {
  const result = new Uint8ClampedArray(weights.length * height * channels); // rounds and clips
  for (let row = 0; row < height; row++) {
    weights.forEach(({ low, weights: each }, place) => {
      for (let channel = 0; channel < channels; channel++) {
        let sum = 0;
        for (let k = 0; k < each.length; k++) sum += each[k] * pixels[(row * width + low + k) * channels + channel];
        result[(place * height + row) * channels + channel] = Math.floor(sum + 0.5);
      }
    });
  }
  return result;
}

/** Scaled until data.share of it covers width x height, then center-cropped. pixels: bytes, row by row. */
function fit({ pixels, width, height }, channels, [toWidth, toHeight]) {
  const ratio = toWidth / toHeight;
  const wide = width / height >= ratio;
  const whole = wide ? [ratio * height, height] : [width, width / ratio];
  const [cropWidth, cropHeight] = whole.map((side) => side * data.share);
  const [left, top] = [(width - cropWidth) / 2, (height - cropHeight) / 2];
  const across = weightsOf(width, left, left + cropWidth, toWidth);
  const down = weightsOf(height, top, top + cropHeight, toHeight);
  return resizeRows(resizeRows(pixels, width, height, channels, across), height, toWidth, channels, down);
}

/** The picture as a viewer shows it, transparent pixels on white, as bytes with 1 or 3 channels. */
async function readPicture(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data: rgba, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const channels = data.input[0];
  const pixels = new Uint8ClampedArray(width * height * channels);
  for (let place = 0; place < width * height; place++) {
    const [r, g, b] = rgba.subarray(4 * place, 4 * place + 3);
    if (channels === 3) pixels.set([r, g, b], 3 * place);
    else pixels[place] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
  }
  return { pixels, width, height };
}

/** A data URL of bytes with 1 or 3 channels. */
function pictureOf(pixels, channels, width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let place = 0; place < width * height; place++) {
    for (let k = 0; k < 3; k++) image.data[4 * place + k] = pixels[channels * place + (channels === 3 ? k : 0)];
    image.data[4 * place + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.toDataURL();
}

// ---------------------------------------------------------------- the model's answer

/** The model's outputs in the form that decode.js gives of an image of the page. */
function numbersOf(found) {
  const scores = found.scores.data;
  const numbers = {
    codes: scores.map((score) => score * data.steps),
    limits: new Float32Array(data.levels * data.heads * tokens).fill(1),
  };
  if (data.neurons) {
    Object.assign(numbers, { neurons: found.numbers.data, values: found.values.data, active: found.active.data });
  }
  return numbers;
}

function levelsOf(found) {
  const n = data.classes.length;
  return Array.from({ length: data.levels }, (_, level) => {
    const each = Array.from(found.probabilities.data.subarray(level * n, (level + 1) * n));
    const top = each.map((probability, place) => ({ class: place, probability }));
    return { top: top.sort((a, b) => b.probability - a.probability).slice(0, OWN_CLASSES), truth: null };
  });
}

async function addImage(file) {
  const [channels, height, width] = data.input;
  const fitted = fit(await readPicture(file), channels, [width, height]);
  session ??= makeSession();
  const { ort, made } = await session;
  const input = new Float32Array(channels * height * width);
  for (let place = 0; place < height * width; place++) {
    for (let channel = 0; channel < channels; channel++) {
      input[channel * height * width + place] = fitted[place * channels + channel] / 127.5 - 1;
    }
  }
  const found = await made.run({ images: new ort.Tensor("float32", input, [1, channels, height, width]) });
  const scales = Array.from({ length: data.levels }, () => [65535, 65535, 65535]); // values as they are
  const png = pictureOf(fitted, channels, width, height);
  data.images.push({ name: file.name, png, label: null, levels: levelsOf(found), neurons: { scales } });
  const place = data.images.length - 1;
  loaded.set(place, Promise.resolve(numbersOf(found)));
  const thumb = addThumb(data.images[place], place);
  thumb.querySelector("input").checked = true;
  thumb.scrollIntoView({ block: "nearest", inline: "nearest" });
  return showImage(place);
}

async function addImages(files) {
  if (!files.length) return;
  find("own-says").textContent = "the model is running \u2026";
  const bad = [];
  for (const file of files) {
    try {
      await addImage(file);
    } catch (error) {
      bad.push(error.name === "InvalidStateError" ? `${file.name} is not an image this browser reads` : `${error}`);
    }
  }
  const added = files.length - bad.length;
  find("own-says").textContent = [...(added ? [`${added} added at the end`] : []), ...bad].join("; ");
}

find("own").hidden = false;
find("files").addEventListener("change", (event) => {
  addImages([...event.target.files]);
  event.target.value = ""; // so that the same file may be chosen again
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  addImages([...event.dataTransfer.files]);
});
