// Opens exported folders with Transformers.js and prints what it computes, as one JSON object.
// Usage: node transformers_js.mjs REQUEST.json
//   REQUEST: {root, texts, classifiers: [folder], encoders: [folder]}, folders relative to root.
import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

const request = JSON.parse(readFileSync(process.argv[2], "utf8"));
env.allowRemoteModels = false;
env.localModelPath = request.root + "/";

const labels = {};
for (const folder of request.classifiers) {
  const classify = await pipeline("text-classification", folder);
  const rows = await classify(request.texts, { top_k: null });
  labels[folder] = rows.map((row) => Object.fromEntries(row.map((r) => [r.label, r.score])));
}

const embeddings = {};
for (const folder of request.encoders) {
  const embed = await pipeline("feature-extraction", folder);
  const pooled = await embed(request.texts, { pooling: "mean", normalize: true });
  const tokens = embed.tokenizer(request.texts, { padding: true, truncation: true });
  const output = await embed.model(tokens);
  embeddings[folder] = { pipeline: pooled.tolist(), model: output.sentence_embedding.tolist() };
}

const versions = env.backends.onnx.versions;
console.log(JSON.stringify({ versions, labels, embeddings }));
