// A release on the server: files are fetched by name and accepted only if their SHA-256 is the one in its manifest.

/** A file that differs from the released one. */
export class Refused extends Error {}

/**
 * One release, named by the SHA-256 of its manifest.json. `onBytes(name, loaded, total)` is called for every received chunk.
 */
export class Release {
  static async open(sha256, onBytes) {
    const bytes = await fetchBytes(sha256, "manifest.json", 0, onBytes);
    await check("manifest.json", bytes, sha256, "the server");
    const text = new TextDecoder().decode(bytes);
    const manifest = JSON.parse(text);
    await check("manifest.json", new TextEncoder().encode(sealedContent(text)), manifest.sha256, "its self-digest");
    return new Release(sha256, manifest, onBytes);
  }

  constructor(sha256, manifest, onBytes) {
    Object.assign(this, { sha256, manifest, onBytes });
  }

  has(name) {
    return Object.hasOwn(this.manifest.files, name);
  }

  /** The bytes of a file. Throws Refused if they are not the released ones. */
  async file(name) {
    const { sha256, bytes: length } = this.manifest.files[name];
    const bytes = await fetchBytes(this.sha256, name, length, this.onBytes);
    await check(name, bytes, sha256, "the manifest");
    return bytes;
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.file(name)));
  }
}

/**
 * The text whose SHA-256 a manifest gives as its own: without that digest, keys sorted, no spaces, numbers as they are
 * written (JavaScript would write 5e-05 otherwise). The rule of update/release.py.
 */
export function sealedContent(text) {
  const marked = text.replace(/("(?:[^"\\]|\\.)*")|-?\d[\d.eE+-]*/g, (token, string) => string ?? `"\\u0000${token}"`);
  const { sha256: _, ...content } = JSON.parse(marked);
  return canonical(content);
}

function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  if (value && typeof value === "object") {
    return `{${Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`)}}`;
  }
  return typeof value === "string" && value.startsWith("\0") ? value.slice(1) : JSON.stringify(value);
}

async function check(name, bytes, expected, source) {
  const found = hex(await crypto.subtle.digest("SHA-256", bytes));
  if (found !== expected) {
    throw new Refused(`${name} is not the released file: SHA-256 ${found}, expected ${expected} (from ${source})`);
  }
}

const hex = (buffer) => Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");

async function fetchBytes(sha256, name, expected, onBytes) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  const response = await fetch(`/release/${sha256}/${path}`);
  if (!response.ok) throw new Error(`the server has no ${name} of this version (${response.status})`);
  const length = Number(response.headers.get("Content-Length"));
  if (expected && length !== expected) throw new Refused(`${name} has ${length} bytes, expected ${expected} (from the manifest)`);
  const bytes = new Uint8Array(length);
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes.set(value, loaded);
    loaded += value.length;
    onBytes(name, loaded, length);
  }
  if (loaded !== length) throw new Error(`${name} ended after ${loaded} of ${length} bytes`);
  return bytes;
}
