// One version of the model in a thread of its own: the page stays responsive, and a version ends with its thread.
//
//   page -> {load: sha256}              <- {bytes: {name, loaded, total}} ... {manifest}, {test} or {failed}
//   page -> {picture: File, number}     <- {embedded: {number, embedding, size, times}} or {unreadable}
//   page -> {scores: {task, embedding}} <- {scores}

import { Clip } from "./clip.js";
import { decode } from "./picture.js";
import { Refused, Release } from "./release.js";

let clip;

async function load(sha256) {
  const started = performance.now();
  const release = await Release.open(sha256, (name, loaded, total) => postMessage({ bytes: { name, loaded, total } }));
  postMessage({ manifest: release.manifest });
  clip = await Clip.load(release);
  const loadMs = performance.now() - started;
  postMessage({ test: { ...(await clip.test(release.manifest.golden)), loadMs } });
}

async function embed(file, number) {
  const started = performance.now();
  const picture = await decode(file, clip.fill);
  const decodeMs = performance.now() - started;
  const { pixels, ms: prepareMs } = await clip.prepare(picture);
  const { embedding, ms: towerMs } = await clip.embed(pixels);
  const size = [picture.width, picture.height];
  postMessage({ embedded: { number, embedding, size, times: { decodeMs, prepareMs, towerMs } } });
}

onmessage = async ({ data: { load: sha256, picture, number, scores } }) => {
  try {
    if (sha256) await load(sha256);
    else if (picture) await embed(picture, number);
    else postMessage({ scores: clip.classify(scores.task, scores.embedding) });
  } catch (error) {
    const message = error?.message ?? String(error);
    postMessage(picture ? { unreadable: { number, message } } : { failed: { message, refused: error instanceof Refused } });
  }
};
