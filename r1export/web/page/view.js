// What the page shows: every function puts values into the document, as text and never as markup.

const BARS = 8; // classes shown; the others are counted

export const part = (id) => document.getElementById(id);

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Said aloud by screen readers; what it says is to be seen elsewhere. */
export const say = (text) => (part("said").textContent = text);

/** A line of alarm above everything else; none for an empty text. */
export function notice(text) {
  if (part("notice").textContent !== text) part("notice").textContent = text;
  part("notice").hidden = !text;
}

/** A new line at the top of the self-tests, for a version that is being loaded. */
export function versionLine(sha256) {
  for (const small of document.querySelectorAll("#versions small")) small.textContent = "until " + clock();
  const line = element("li", {}, element("span", { className: "badge", textContent: "Testing" }),
    element("span", { className: "name" }, element("span", { textContent: short(sha256) }), element("small", { textContent: "current" })),
    element("progress", { ariaLabel: "Loading" }), element("span", { className: "detail" }));
  part("versions").prepend(line);
  return line;
}

export const nameLine = (line, name) => (line.querySelector(".name span").textContent = name);

/** How far a version is loaded; bytes of the file that is arriving. */
export function loading(line, { name, loaded, total }) {
  Object.assign(line.querySelector("progress"), { value: loaded, max: total });
  line.querySelector(".detail").textContent = `${name}: ${megabytes(loaded)} of ${megabytes(total)}`;
}

/** The end of a self-test; `word` is Pass, Fail, Refused or Error. */
export function settle(line, word, detail) {
  line.querySelector("progress")?.remove();
  Object.assign(line.querySelector(".badge"), { textContent: word, className: word === "Pass" ? "badge pass" : "badge fail" });
  line.querySelector(".detail").textContent = detail;
}

export function testDetail({ samples, sameTop1, maxAbs, minCosine, pictures, testMs, loadMs }, limits) {
  return `${samples} golden samples: max. difference ${power(maxAbs, 1)} (limit ${power(limits.max_abs)}), ` +
    `lowest cosine ${minCosine.toFixed(7)} (limit ${limits.min_cosine}), same top-1 in ${sameTop1} of ${samples}. ` +
    `${pictureDetail(pictures)} Prompts: not checked (this page has no tokenizer). ` +
    `Loaded in ${seconds(loadMs)}, tested in ${milliseconds(testMs)}.`;
}

function pictureDetail({ count, most, mean, limits }) {
  if (!count) return "Images: not checked (the release has none, or no preprocess.onnx).";
  return `${count} images through preprocess.onnx: difference up to ${most.toFixed(2)} of 255 levels (limit ${limits.most}), ` +
    `${mean.toFixed(3)} on average (limit ${limits.mean}).`;
}

/** Name, tasks and digests of the release that `manifest` describes; `sha256` is the manifest's own. */
export function release(manifest, sha256) {
  const learned = manifest.tasks.filter((task) => task.learned).length;
  document.title = `${manifest.name} · r1export`;
  part("name").textContent = manifest.name;
  part("about").textContent = `${manifest.base.name} in ${manifest.precision}, ${learned} of ${manifest.tasks.length} tasks learned`;
  part("tasks").replaceChildren(taskTable(manifest.tasks));
  const digests = [["manifest.json", sha256], ["Manifest self-digest", manifest.sha256], ["Base weights", manifest.base.sha256],
    ["visual.onnx structure", manifest.graphs["visual.onnx"]], ...manifest.updates.map(({ task, sha256 }) => [`Factors of ${task}`, sha256])];
  part("facts").replaceChildren(...digests.flatMap(([name, digest]) =>
    [element("dt", { textContent: name }), element("dd", {}, element("code", { textContent: digest }))]));
  part("files").replaceChildren(...Object.entries(manifest.files).map(([name, { sha256, bytes }]) =>
    element("li", {}, element("b", { textContent: `${name}, ${megabytes(bytes)}` }), element("code", { textContent: sha256 }))));
}

function taskTable(tasks) {
  const head = element("tr", {}, ...["Task", "Classes", "Learned", "Top-1"].map((text) => element("th", { textContent: text, scope: "col" })));
  const rows = tasks.map(({ name, classes, learned, accuracy }) => element("tr", {},
    ...[name, classes, learned ? "yes" : "no", accuracy == null ? "not measured" : percent(accuracy)].map((text) => element("td", { textContent: text }))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

/** The task picker: keeps its choice where it can, else takes the task learned last. */
export function taskChoices(tasks) {
  const select = part("task");
  const kept = tasks.find(({ name }) => name === select.value) ?? tasks.findLast(({ learned }) => learned) ?? tasks[0];
  select.replaceChildren(...tasks.map(({ name, learned }) => element("option", { value: name, textContent: learned ? name : `${name} (not learned)` })));
  select.value = kept?.name ?? "";
}

/** Bars for the best of `scores`, which are sorted. */
export function bars(scores) {
  const rows = scores.slice(0, BARS).map(({ name, share }) => {
    const bar = element("i", {});
    bar.style.width = percent(share).replace(" ", "");
    return element("li", {}, bar, element("span", { textContent: name }), element("span", { textContent: percent(share) }));
  });
  const rest = scores.length - rows.length;
  const more = rest > 0 ? [element("li", { className: "more", textContent: `and ${rest} more` })] : [];
  part("bars").replaceChildren(...rows, ...more);
}

export function times({ decodeMs, prepareMs, towerMs }, [width, height]) {
  part("times").textContent = `${width} × ${height} pixels: decoded in ${milliseconds(decodeMs)}, ` +
    `prepared in ${milliseconds(prepareMs)}, embedded in ${milliseconds(towerMs)}.`;
}

/** Show `file` in the drop zone. */
export function preview(file) {
  URL.revokeObjectURL(part("preview").src);
  Object.assign(part("preview"), { src: URL.createObjectURL(file), alt: file.name, hidden: false });
}

/** Hand `value` over as a file to keep. */
export function save(value, name) {
  const href = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  element("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;
const short = (sha256) => sha256.slice(0, 12);
const clock = () => new Date().toLocaleTimeString();
const megabytes = (bytes) => (bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const power = (value, digits) => value.toExponential(digits).replace("-", "\u2011"); // a hyphen at which no line ends
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
