// Drives Chromium for the tests in Python: one JSON request a line on stdin, one answer a line on stdout.
//
//   {"do": "page.keyboard.press", "with": ["Tab"]}   -> {"value": ...} or {"error": "..."}
//   {"do": "open", "with": [{context options}]}      a fresh context and page; its problems are counted from here
//   {"do": "problems", "with": []}                   errors and warnings of the console, uncaught errors, requests to elsewhere
//   {"do": "evaluate", "with": ["code", argument]}   the value of an expression, or of a function that it is, in the page
//   {"do": "until", "with": ["code"]}                waits until the expression is true; waitForFunction would need unsafe-eval
//   {"do": "download", "with": ["selector"]}         clicks, and answers with the path of the file that comes

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const PATIENCE = 30_000; // ms
const browser = await chromium.launch({ executablePath: process.argv[2], args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
let context, page, problems;

const verbs = {
  async open(options) {
    await context?.close();
    context = await browser.newContext({ acceptDownloads: true, ...options });
    page = await context.newPage();
    page.setDefaultTimeout(PATIENCE);
    problems = [];
    page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
    page.on("pageerror", (error) => problems.push(String(error)));
    page.on("request", (request) => /^(http:\/\/(127\.0\.0\.1|localhost):|blob:)/.test(request.url()) || problems.push(request.url()));
  },
  problems: () => problems,
  evaluate: (code, argument) => page.evaluate(new Function("argument", `const found = (${code}); return typeof found === "function" ? found(argument) : found;`), argument),
  async until(code) {
    for (const end = Date.now() + PATIENCE; !(await verbs.evaluate(code)); await new Promise((resolve) => setTimeout(resolve, 30))) {
      if (Date.now() > end) throw new Error(`never came true: ${code}`);
    }
  },
  async download(selector) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click(selector)]);
    return download.path();
  },
};

async function perform({ do: name, with: values }) {
  if (verbs[name]) return verbs[name](...values);
  const path = name.split(".").slice(1);
  const owner = path.slice(0, -1).reduce((object, key) => object[key], page);
  return owner[path.at(-1)](...values);
}

const plain = (value) => (value === undefined || (typeof value === "object" && value?.constructor?.name?.match(/^(Response|JSHandle)$/)) ? null : value);

for await (const line of createInterface({ input: process.stdin })) {
  const answer = await perform(JSON.parse(line)).then((value) => ({ value: plain(value) }), (error) => ({ error: String(error) }));
  process.stdout.write(JSON.stringify(answer) + "\n");
}
await browser.close();
