// transformers.js opens the folder in node: both towers, texts with padding, and the pipeline that classifies pictures.
// Arguments: FOLDER INPUTS NODE_MODULES; what it prints is described in ../check.py.

import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, inputs, modules] = process.argv.slice(2).map((path) => resolve(path));
const entry = createRequire(join(modules, "x.js")).resolve("@huggingface/transformers");
const hf = await import(pathToFileURL(entry.replace(/\.cjs$/, ".mjs")));
hf.env.allowRemoteModels = false;
hf.env.localModelPath = join(folder, "..") + "/";
const name = folder.split("/").at(-1);
const asked = JSON.parse(readFileSync(join(inputs, "inputs.json"), "utf8"));
const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
const sigmoid = config.model_type === "siglip";
const dtype = asked.dtype ?? "fp32";
const [Vision, Text] = sigmoid ? [hf.SiglipVisionModel, hf.SiglipTextModel] : [hf.CLIPVisionModelWithProjection, hf.CLIPTextModelWithProjection];
const rows = (tensor) => tensor.tolist();

const bytes = readFileSync(join(inputs, "pixel_values.f32"));
const pixels = new hf.Tensor("float32", new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), asked.shape);
const vision = await Vision.from_pretrained(name, { dtype });
const image = await vision({ pixel_values: pixels });

const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
const text = await Text.from_pretrained(name, { dtype });
const shorter = [];
for (const prompt of asked.prompts) {
  const output = await text(tokenizer([prompt], { padding: sigmoid ? "max_length" : true, truncation: true }));
  shorter.push(rows(output.text_embeds ?? output.pooler_output)[0]);
}
const padded = await text(tokenizer(asked.prompts, { padding: sigmoid ? "max_length" : true, truncation: true }));

const processor = await hf.AutoProcessor.from_pretrained(name);
const files = readdirSync(inputs).filter((file) => /^picture-\d+\.png$/.test(file)).sort();
const pictures = [];
const top1 = [];
const classify = await hf.pipeline("zero-shot-image-classification", name, { dtype });
for (const file of files) {
  const picture = await hf.RawImage.read(join(inputs, file));
  const output = await vision(await processor(picture));
  pictures.push(rows(output.image_embeds ?? output.pooler_output)[0]);
  const answers = await classify(picture, asked.labels, { hypothesis_template: "{}" });
  top1.push(asked.labels.indexOf([...answers].sort((a, b) => b.score - a.score)[0].label));
}
console.log(JSON.stringify({
  client: `@huggingface/transformers ${hf.env.version}, node ${process.versions.node}`,
  image_embeds: rows(image.image_embeds ?? image.pooler_output),
  short_text_embeds: shorter, text_embeds: rows(padded.text_embeds ?? padded.pooler_output),
  resized_picture_embeds: pictures, top1,
}));
