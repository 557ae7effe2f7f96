// CLIP's image side in onnxruntime-web: load it from a release, test it, embed pictures, score classes.

import * as ort from "./vendor/ort.wasm.min.mjs";
import { readTensors } from "./safetensors.js";

const VISUAL = "visual.onnx";
const WEIGHTS = "visual.safetensors";
const PREPROCESS = "preprocess.onnx";
// How far pixels that preprocess.onnx makes of a golden picture may be off, as in update/golden_samples.py.
const BYTES = { most: 1.5, mean: 0.1 };

/** The image tower of one release, with its class lists and golden samples. */
export class Clip {
  /** Throws Refused if a file is not the released one, Error if this browser cannot run it. */
  static async load(release) {
    const clip = new Clip();
    const weights = await release.file(WEIGHTS);
    clip.visual = await open(await release.file(VISUAL), [{ path: WEIGHTS, data: weights }]);
    clip.preprocess = release.has(PREPROCESS) ? await open(await release.file(PREPROCESS), []) : null;
    const preprocessing = await release.json("preprocess.json");
    clip.byte = stepOfByte(preprocessing);
    clip.fill = [preprocessing.fill_color].flat();
    if (clip.fill.length === 1) clip.fill = Array(3).fill(clip.fill[0]);
    clip.scale = Math.exp(scalar(weights, release.manifest.tensors.logit_scale));
    clip.bias = scalar(weights, release.manifest.tensors.logit_bias) ?? 0;
    clip.golden = readTensors(await release.file("golden.safetensors"));
    clip.tasks = await classLists(release);
    return clip;
  }

  /**
   * Stored inputs one by one against the stored answers of torch: {maxAbs, minCosine, sameTop1, samples, pictures, testMs, passed}.
   * Top-1 is the same if it is in every class list. `testMs` says little of speed: the browser compiles meanwhile.
   */
  async test({ max_abs: maxAbs, min_cosine: minCosine }) {
    const { pixel_values: pixels, image_embeds: answers } = this.golden;
    const [samples, width] = answers.shape;
    const found = { maxAbs: 0, minCosine: 1, sameTop1: 0, samples };
    const started = performance.now();
    for (let i = 0; i < samples; i++) {
      const input = row(pixels.data, i, pixels.data.length / samples);
      const { embedding } = await this.embed(new ort.Tensor("float32", input, [1, ...pixels.shape.slice(1)]));
      const expected = row(answers.data, i, width);
      found.maxAbs = Math.max(found.maxAbs, ...embedding.map((value, j) => Math.abs(value - expected[j])));
      found.minCosine = Math.min(found.minCosine, cosine(embedding, expected));
      found.sameTop1 += this.tasks.every((task) => top1(task, embedding) === top1(task, expected));
    }
    const pictures = await this.#testPictures();
    const passed = samples > 0 && found.maxAbs <= maxAbs && found.minCosine >= minCosine && pictures.passed; // NaN is neither
    return { ...found, pictures, testMs: performance.now() - started, passed };
  }

  /** Golden pictures through preprocess.onnx against their rows of pixel_values: {count, most, mean, limits, passed}, in bytes. */
  async #testPictures() {
    const { pixel_values: expected } = this.golden;
    const length = expected.data.length / expected.shape[0];
    const found = { count: 0, most: 0, mean: 0 };
    for (let picture; this.preprocess && (picture = this.golden[`picture_${found.count}`]); found.count++) {
      const [height, width] = picture.shape;
      const { pixels } = await this.prepare({ data: picture.data, height, width });
      const steps = pixels.data.map((value, i) => Math.abs(value - expected.data[found.count * length + i]) / this.byte);
      found.most = Math.max(found.most, pixels.data.length === length ? largest(steps) : NaN);
      found.mean = Math.max(found.mean, steps.reduce((sum, step) => sum + step, 0) / length);
    }
    return { ...found, limits: BYTES, passed: found.most <= BYTES.most && found.mean <= BYTES.mean };
  }

  /** Prepared pixels of a picture {data, height, width}, and how long that took. */
  async prepare({ data, height, width }) {
    if (!this.preprocess) throw new Error("this release has no preprocess.onnx, which is needed to prepare images");
    const started = performance.now();
    const { pixel_values: pixels } = await this.preprocess.run({ image: new ort.Tensor("uint8", data, [height, width, 3]) });
    return { pixels, ms: performance.now() - started };
  }

  /** The unit-norm embedding of pixels (1, 3, H, W), and how long that took. */
  async embed(pixels) {
    const started = performance.now();
    const { image_embeds: embeds } = await this.visual.run({ pixel_values: pixels });
    return { embedding: Array.from(embeds.data), ms: performance.now() - started };
  }

  /**
   * [{name, logit, share}] of a task's classes, best first: what classify.onnx gives, exp(logit_scale) * cosine + logit_bias,
   * and its softmax. Computed here because that graph would hold the image tower in memory a second time.
   */
  classify(taskName, embedding) {
    const { classes, embeds } = this.tasks.find((task) => task.name === taskName);
    const logits = classes.map((_, i) => this.scale * dot(row(embeds, i, embedding.length), embedding) + this.bias);
    const highest = Math.max(...logits);
    const total = logits.reduce((sum, logit) => sum + Math.exp(logit - highest), 0);
    const found = classes.map((name, i) => ({ name, logit: logits[i], share: Math.exp(logits[i] - highest) / total }));
    return found.sort((a, b) => b.logit - a.logit);
  }
}

const open = (graph, externalData) =>
  ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 });

/** By how much pixel_values differ at most where a picture differs by one byte. */
const stepOfByte = ({ scale, std }) => scale / Math.min(...std);

/** A float32 scalar where the manifest says that it lies; undefined without an entry. */
function scalar(weights, stored) {
  if (!stored) return undefined;
  if (stored.dtype !== "F32" || stored.file !== WEIGHTS) throw new Error(`a scale of the logits in ${stored.dtype} in ${stored.file}`);
  return new DataView(weights.buffer).getFloat32(stored.offset, true);
}

async function classLists(release) {
  const lists = [];
  for (const { name } of release.manifest.tasks) {
    const { classes } = await release.json(`classes/${name}.json`);
    const { class_embeds: embeds } = readTensors(await release.file(`classes/${name}.safetensors`));
    lists.push({ name, classes, embeds: embeds.data });
  }
  return lists;
}

function top1({ classes, embeds }, embedding) {
  let best = 0;
  let highest = -Infinity;
  for (let i = 0; i < classes.length; i++) {
    const value = dot(row(embeds, i, embedding.length), embedding);
    if (value > highest) [best, highest] = [i, value];
  }
  return best;
}

const largest = (values) => values.reduce((most, value) => Math.max(most, value), 0); // NaN if one is
const row = (data, i, width) => data.subarray(i * width, (i + 1) * width);
const dot = (one, other) => one.reduce((sum, value, i) => sum + value * other[i], 0);
const cosine = (one, other) => dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
