// The official Node client's surface against a server: node client.mjs BASE_URL API_KEY
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, apiKey, packages] = process.argv.slice(2);
const entry = createRequire(`${packages}/`).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(entry));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = "tiny";
const messages = [{ role: "user", content: "Who is there?" }];
const fixed = { model, temperature: 0, max_tokens: 12 };

const models = [];
for await (const one of client.models.list()) models.push(one.id);
assert.deepEqual(models, [model]);
assert.equal((await client.models.retrieve(model)).id, model);

const completion = await client.completions.create({ ...fixed, prompt: "The sea", logprobs: 2, n: 2, echo: true });
assert.equal(completion.choices.length, 2);
assert.equal(completion.choices[0].logprobs.tokens.join(""), completion.choices[0].text);
assert.ok(completion.usage.completion_tokens > 0);

let text = "";
const whole = await client.completions.create({ ...fixed, prompt: "The sea" });
for await (const chunk of await client.completions.create({ ...fixed, prompt: "The sea", stream: true })) {
  text += chunk.choices[0].text;
}
assert.equal(text, whole.choices[0].text);

const chat = await client.chat.completions.create({ ...fixed, messages, logprobs: true, top_logprobs: 3 });
assert.equal(chat.choices[0].message.role, "assistant");
assert.equal(chat.choices[0].logprobs.content[0].top_logprobs.length, 3);

const pieces = [];
let usage = null;
const streamed = { ...fixed, messages, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(streamed)) {
  if (chunk.choices.length) pieces.push(chunk.choices[0].delta.content ?? "");
  usage = chunk.usage ?? usage;
}
assert.equal(pieces.join(""), chat.choices[0].message.content);
assert.equal(usage.completion_tokens, chat.usage.completion_tokens);

const helper = client.chat.completions.stream({ ...fixed, messages });
const events = [];
helper.on("content", (delta) => events.push(delta));
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, events.join(""));

const schema = { type: "object", properties: { mood: { enum: ["calm"] } }, required: ["mood"], additionalProperties: false };
const json_schema = { name: "sea", schema, strict: true };
const parsed = await client.chat.completions.parse({
  ...fixed,
  max_tokens: 60,
  messages,
  response_format: { type: "json_schema", json_schema },
});
assert.deepEqual(JSON.parse(parsed.choices[0].message.content), { mood: "calm" });

const { response, request_id } = await client.chat.completions.create({ ...fixed, messages }).withResponse();
assert.equal(response.headers.get("x-request-id"), request_id);

const refused = async (kind, status, code, call) => {
  await assert.rejects(call, (error) => {
    assert.ok(error instanceof OpenAI[kind], `${kind}: ${error}`);
    assert.equal(error.status, status);
    assert.equal(error.code, code);
    return true;
  });
};
await refused("BadRequestError", 400, null, () => client.completions.create({ ...fixed, prompt: "a", temperature: 9 }));
await refused("BadRequestError", 400, "context_length_exceeded", () =>
  client.completions.create({ ...fixed, prompt: "sea ".repeat(500) }),
);
await refused("BadRequestError", 400, "unknown_parameter", () =>
  client.chat.completions.create({ ...fixed, messages, temprature: 1 }),
);
await refused("NotFoundError", 404, "model_not_found", () => client.models.retrieve("nobody"));
await refused("NotFoundError", 404, "model_not_found", () =>
  client.chat.completions.create({ ...fixed, model: "nobody", messages }),
);
const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
await refused("AuthenticationError", 401, "invalid_api_key", () => stranger.models.list());

const endless = { model, prompt: "The sea", max_tokens: 100, temperature: 0, ignore_eos: true, stream: true };
const aborted = await client.completions.create(endless);
for await (const chunk of aborted) {
  assert.ok(chunk.id);
  aborted.controller.abort();
  break;
}
const controller = new AbortController();
const pending = client.completions.create({ ...endless, stream: false, n: 8 }, { signal: controller.signal });
setTimeout(() => controller.abort(), 20);
await assert.rejects(pending, OpenAI.APIUserAbortError);
console.log("done");
