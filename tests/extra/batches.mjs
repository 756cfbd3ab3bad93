// Files and batches by the official Node client: node batches.mjs BASE_URL API_KEY
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, apiKey, packages] = process.argv.slice(2);
const entry = createRequire(`${packages}/`).resolve("openai");
const { default: OpenAI, toFile } = await import(pathToFileURL(entry));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const endpoint = "/v1/chat/completions";
const window = { endpoint, completion_window: "24h" };

const line = (id, fields) => {
  const body = { model: "tiny", temperature: 0, max_tokens: 4, messages: [{ role: "user", content: `Who is ${id}?` }], ...fields };
  return JSON.stringify({ custom_id: id, method: "POST", url: endpoint, body });
};
const upload = async (...lines) =>
  client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
const ended = async (batch) => {
  for (let i = 0; i < 1200; i += 1) {
    const { status } = await client.batches.retrieve(batch.id);
    if (!["validating", "in_progress", "finalizing", "cancelling"].includes(status)) return client.batches.retrieve(batch.id);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error("the batch did not end in two minutes");
};
const answers = async (id) => {
  const text = await (await client.files.content(id)).text();
  return text.trim().split("\n").map((one) => JSON.parse(one));
};

const ids = Array.from({ length: 12 }, (_, i) => `r${i}`);
const file = await upload(...ids.map((id) => line(id)), line("wrong", { max_tokens: -1 }));
assert.equal(file.purpose, "batch");
assert.equal((await client.files.retrieve(file.id)).bytes, file.bytes);
const batch = await ended(await client.batches.create({ input_file_id: file.id, ...window, metadata: { who: "node" } }));
assert.equal(batch.status, "completed");
assert.deepEqual(batch.request_counts, { total: 13, completed: 12, failed: 1 });
assert.deepEqual(batch.metadata, { who: "node" });
const found = await answers(batch.output_file_id);
assert.deepEqual(found.map(({ custom_id: id }) => id), ids);
const alone = await client.chat.completions.create(JSON.parse(line("r7")).body);
assert.equal(found[7].response.body.choices[0].message.content, alone.choices[0].message.content);
const [wrong] = await answers(batch.error_file_id);
assert.equal(wrong.response.status_code, 400);

const broken = await ended(await client.batches.create({ input_file_id: (await upload("{")).id, ...window }));
assert.equal(broken.status, "failed");
assert.equal(broken.errors.data[0].line, 1);

const endless = await upload(...Array.from({ length: 200 }, (_, i) => line(`e${i}`, { max_tokens: 50, ignore_eos: true })));
const running = await client.batches.create({ input_file_id: endless.id, ...window });
await assert.rejects(client.files.delete(endless.id), OpenAI.BadRequestError);
await client.batches.cancel(running.id);
assert.equal((await ended(running)).status, "cancelled");

const listed = [];
for await (const one of client.batches.list({ limit: 2 })) listed.push(one.id);
assert.deepEqual(listed, [running.id, broken.id, batch.id]);
const files = [];
for await (const one of client.files.list({ limit: 2 })) files.push(one.id);
assert.ok(new Set(files).size === files.length && files.includes(batch.output_file_id));
for (const id of files) await client.files.delete(id);
for await (const one of client.files.list()) assert.fail(`${one.id} is still there`);
await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
console.log("done");
