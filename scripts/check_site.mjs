// Opens every page of the built documentation in Chromium, on a desktop and on a phone, and lists what is wrong with it.
//
//   ./scripts/docs && node scripts/check_site.mjs [--screenshots FOLDER]
//
// Wrong is: an entry on the console, a request that fails or goes to another host, a picture that does not load, a link to a page
// or heading that does not exist, and a page that scrolls sideways. Exit code 0, or 1 if anything was found, or 3 without a
// browser. Requires chromium, and playwright-core: python scripts/vendor_web.py --test

import { execFileSync } from "node:child_process";
import { createReadStream, existsSync, mkdirSync, readdirSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const SITE = fileURLToPath(new URL("../site", import.meta.url));
const VIEWPORTS = { desktop: { width: 1200, height: 900 }, phone: { width: 390, height: 844 } };
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png" };

function stop(message) {
  console.error(message);
  process.exit(3);
}

function findChromium() {
  for (const name of ["chromium", "chromium-browser", "google-chrome"]) {
    try {
      return execFileSync("which", [name], { encoding: "utf8" }).trim();
    } catch {}
  }
  return stop("no chromium on the PATH. Install it, for example: apt install chromium");
}

function serve() {
  const server = createServer((request, response) => {
    const path = join(SITE, decodeURIComponent(new URL(request.url, "http://host").pathname));
    if (!path.startsWith(SITE) || !existsSync(path) || !statSync(path).isFile()) return response.writeHead(404).end();
    response.writeHead(200, { "content-type": TYPES[extname(path)] ?? "application/octet-stream" });
    createReadStream(path).pipe(response);
  });
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server)));
}

const pagesOfSite = () =>
  readdirSync(SITE, { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".html") && name !== "404.html")
    .sort();

// Runs in the page: what only a browser knows.
const measure = () => ({
  ids: [...document.querySelectorAll("[id]")].map((part) => part.id),
  links: [...document.querySelectorAll("a[href]")].map((link) => link.href),
  broken: [...document.images].filter((image) => !(image.complete && image.naturalWidth)).map((image) => image.src),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
});

// Opens a page and measures it in every viewport; returns its ids and links.
async function visit(page, origin, name, note, folder) {
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && note(`console: ${message.text()}`));
  page.on("pageerror", (error) => note(`uncaught: ${error}`));
  page.on("requestfailed", (request) => note(`failed: ${request.url()}`));
  page.on("request", (request) => /^(data|blob):/.test(request.url()) || request.url().startsWith(origin) || note(`other host: ${request.url()}`));
  await page.goto(`${origin}/${name}`, { waitUntil: "load" });
  let found;
  for (const [device, viewport] of Object.entries(VIEWPORTS)) {
    await page.setViewportSize(viewport);
    found = await page.evaluate(measure);
    found.broken.forEach((source) => note(`no picture (${device}): ${source}`));
    if (found.overflow > 0) note(`${found.overflow} pixels wider than the window (${device})`);
    if (folder) await page.screenshot({ path: join(folder, `${device}-${name.replaceAll("/", "-")}.png`) });
  }
  return { name, ...found };
}

function deadLinks(pages, origin) {
  const ids = new Map(pages.map(({ name, ids }) => [name, new Set(ids)]));
  return pages.flatMap(({ name, links }) =>
    links
      .filter((link) => link.startsWith(origin))
      .map((link) => new URL(link))
      .filter(({ pathname, hash }) => {
        const target = relative("/", decodeURIComponent(pathname)) || "index.html";
        if (!ids.has(target)) return !existsSync(join(SITE, target));
        return hash.length > 1 && !ids.get(target).has(decodeURIComponent(hash.slice(1)));
      })
      .map(({ pathname, hash }) => `${name}: dead link to ${pathname}${hash}`),
  );
}

if (!existsSync(join(SITE, "index.html"))) stop("site/ is not built. Run ./scripts/docs");
const { chromium } = await import("playwright-core").catch(() => stop("no playwright-core. Run python scripts/vendor_web.py --test"));
const folder = process.argv[2] === "--screenshots" ? process.argv[3] : "";
if (folder) mkdirSync(folder, { recursive: true });
const server = await serve();
const origin = `http://127.0.0.1:${server.address().port}`;
const browser = await chromium.launch({ executablePath: findChromium(), args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
const wrong = [];
const pages = [];
for (const name of pagesOfSite()) {
  const page = await browser.newPage();
  pages.push(await visit(page, origin, name, (problem) => wrong.push(`${name}: ${problem}`), folder));
  await page.close();
}
wrong.push(...deadLinks(pages, origin));
await browser.close();
server.close();
console.log([...wrong, `${pages.length} pages, ${wrong.length} problems`].join("\n"));
process.exitCode = wrong.length ? 1 : 0;
