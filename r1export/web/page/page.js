// The page: follows the version that the server calls current, tests it, and classifies pictures with it once it passed.

import * as view from "./view.js";

const POLL = 1000; // ms between two looks at which version is current
const { part } = view;

let version = null; // the version that is current: {sha256, worker, line, manifest, ready}
let picture = null; // the picture last given: {file, number, embedding, scores, version}
let count = 0;

async function follow() {
  try {
    const answer = await (await fetch("/state.json")).json();
    view.notice(answer.error ? `Cannot read the current version: ${answer.error}` : "");
    if (answer.sha256 && answer.sha256 !== version?.sha256) start(answer.sha256);
  } catch {
    view.notice("The server does not respond. The loaded version keeps working; restart the server to follow updates.");
  }
  setTimeout(follow, POLL);
}

/** Load and test another version; the one before ends here, its verdict stays to be read. */
function start(sha256) {
  version?.worker.terminate();
  const started = { sha256, worker: new Worker("/worker.js", { type: "module" }), line: view.versionLine(sha256), ready: false };
  version = started;
  accept("Waiting for the self-test");
  started.worker.onmessage = ({ data }) => version === started && hear(data);
  started.worker.onerror = (event) => hear({ failed: { message: event.message ?? "the worker failed to start" } });
  started.worker.postMessage({ load: sha256 });
}

function hear({ bytes, manifest, test, failed, embedded, unreadable, scores }) {
  if (bytes) view.loading(version.line, bytes);
  else if (manifest) describe(manifest);
  else if (test) judge(test);
  else if (failed) end(failed.refused ? "Refused" : "Error", failed.message);
  else if (embedded?.number === picture?.number && embedded) keep(embedded);
  else if (unreadable?.number === picture?.number && unreadable) fail(unreadable.message);
  else if (scores) show(scores);
}

function describe(manifest) {
  version.manifest = manifest;
  view.nameLine(version.line, manifest.name);
  view.release(manifest, version.sha256);
  view.taskChoices(manifest.tasks);
}

function judge(test) {
  version.ready = test.passed;
  end(test.passed ? "Pass" : "Fail", view.testDetail(test, version.manifest.golden));
  if (!test.passed) return;
  accept("Drop, paste or choose an image");
  if (picture) classify(picture.file);
}

function end(word, detail) {
  view.settle(version.line, word, detail);
  view.say(`${version.manifest?.name ?? "This version"}: ${word}`);
  if (!version.ready) accept("This version failed its self-test and is not used");
}

/** Whether pictures are taken, and what the drop zone says. */
function accept(hint) {
  part("file").disabled = !version.ready;
  part("hint").textContent = hint;
  part("answer").hidden = true;
}

function classify(file) {
  if (!version?.ready) return;
  picture = { file, number: ++count, earlier: picture?.file === file ? picture : null };
  view.preview(file);
  part("hint").textContent = file.name;
  version.worker.postMessage({ picture: file, number: picture.number });
}

function keep({ embedding, size, times }) {
  Object.assign(picture, { embedding, name: version.manifest.name });
  view.times(times, size);
  score();
}

function fail(message) {
  picture = null;
  part("answer").hidden = true;
  part("preview").hidden = true;
  part("hint").textContent = message;
  view.say(message);
}

const score = () =>
  picture?.embedding && version.ready && version.worker.postMessage({ scores: { task: part("task").value, embedding: picture.embedding } });

function show(scores) {
  const [{ name, share }] = scores;
  const { earlier } = picture;
  Object.assign(picture, { task: part("task").value, scores });
  view.bars(scores);
  part("before").textContent = earlier?.scores && earlier.task === picture.task
    ? `${earlier.name} predicted ${earlier.scores[0].name}, ${view.percent(earlier.scores[0].share)}.` : "";
  part("answer").hidden = false;
  view.say(`${name}, ${view.percent(share)}`);
}

function saveAnswer() {
  const { file, task, scores, embedding, name } = picture;
  view.save({ release: name, manifest_sha256: version.sha256, picture: file.name, task, scores, embedding }, `${name}-${file.name}.json`);
}

const given = (files) => files?.length && classify(files[0]);
const over = (event, on) => (event.preventDefault(), part("drop").classList.toggle("over", on));

part("file").addEventListener("change", ({ target }) => (given(target.files), (target.value = ""))); // the same file may come again
part("task").addEventListener("change", score);
part("save").addEventListener("click", saveAnswer);
addEventListener("paste", ({ clipboardData }) => given(clipboardData.files));
addEventListener("dragover", (event) => over(event, true)); // anywhere: a picture that misses the zone must not replace the page
addEventListener("dragleave", (event) => over(event, false));
addEventListener("drop", (event) => (over(event, false), given(event.dataTransfer.files)));
follow();
