// /v1/responses and /v1/embeddings by the official Node client: node responses.mjs BASE_URL API_KEY PACKAGES
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, apiKey, packages] = process.argv.slice(2);
const entry = createRequire(`${packages}/`).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(entry));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const fixed = { model: "tiny", temperature: 0, max_output_tokens: 60 };

const first = await client.responses.create({ ...fixed, input: "What is the capital of France?" });
assert.match(first.output_text, /Paris/);
assert.equal(first.status, "completed");
const second = await client.responses.create({ ...fixed, input: "And of Germany?", previous_response_id: first.id });
assert.match(second.output_text, /Berlin/);
assert.equal((await client.responses.retrieve(second.id)).output[0].id, second.output[0].id);
const items = [];
for await (const item of client.responses.inputItems.list(second.id)) items.push(item.content[0].text);
assert.deepEqual(items, ["And of Germany?"]);

let text = "";
const stream = await client.responses.create({ ...fixed, input: "What is the capital of France?", stream: true });
for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, first.output_text);
const helper = client.responses.stream({ ...fixed, input: "What is the capital of France?" });
assert.equal((await helper.finalResponse()).output_text, first.output_text);

const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", name: "weather", parameters, strict: true }];
const asked = { ...fixed, input: "What is the weather in Paris?", tools, tool_choice: { type: "function", name: "weather" } };
const called = await client.responses.create(asked);
assert.deepEqual(JSON.parse(called.output[0].arguments), { city: "Paris" });
const format = { type: "json_schema", name: "place", schema: parameters, strict: true };
const parsed = await client.responses.parse({ ...fixed, input: "Paris is in France.", text: { format } });
assert.deepEqual(Object.keys(JSON.parse(parsed.output_text)), ["city"]);

await client.responses.delete(second.id);
await assert.rejects(client.responses.retrieve(second.id), OpenAI.NotFoundError);
await assert.rejects(client.responses.cancel(first.id), OpenAI.BadRequestError);
const long = { ...fixed, max_output_tokens: 2000, input: "Tell me a long story." };
let last;
for await (const event of await client.responses.create({ ...long, stream: true })) {
  if (event.type === "response.created") assert.equal((await client.responses.cancel(event.response.id)).status, "cancelled");
  last = event;
}
assert.deepEqual([last.type, last.response.status], ["response.failed", "cancelled"]);
assert.equal((await client.responses.retrieve(last.response.id)).status, "cancelled");

const vectors = (await client.embeddings.create({ model: "tiny", input: ["the sea", "the king"] })).data;
const plain = await client.embeddings.create({ model: "tiny", input: ["the sea", "the king"], encoding_format: "float" });
assert.deepEqual(vectors.map((entry) => entry.embedding.map(Math.fround)), plain.data.map((entry) => entry.embedding.map(Math.fround)));
console.log("done");
