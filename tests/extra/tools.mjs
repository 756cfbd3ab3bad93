// Vercel's AI SDK against a server: node tools.mjs BASE_URL MODEL FOLDER_OF_PACKAGES
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, name, packages] = process.argv.slice(2);
const load = (entry) => import(pathToFileURL(createRequire(`${packages}/`).resolve(entry)));
const { generateText, streamText, generateObject, tool, stepCountIs } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const called = [];
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async ({ city }) => (called.push(city), "sunny"),
});
const fixed = { tools: { weather }, temperature: 0, maxRetries: 0, maxOutputTokens: 60 };
const prompt = "What is the weather in Paris?";

for (const model of [
  createOpenAI({ baseURL, apiKey: "none" }).chat(name),
  createOpenAICompatible({ name: "lpa", baseURL, supportsStructuredOutputs: true })(name),
]) {
  called.length = 0;
  const whole = await generateText({ ...fixed, model, prompt, toolChoice: "required" });
  assert.equal(whole.toolCalls[0].toolName, "weather");
  assert.equal(whole.finishReason, "tool-calls");
  assert.deepEqual(called, [whole.toolCalls[0].input.city]);

  const stream = streamText({ ...fixed, model, prompt, toolChoice: { type: "tool", toolName: "weather" } });
  const kinds = [];
  for await (const part of stream.fullStream) kinds.push(part.type);
  for (const kind of ["tool-input-start", "tool-input-delta", "tool-call", "tool-result"]) assert.ok(kinds.includes(kind));
  assert.ok(!kinds.includes("error") && !kinds.includes("text-delta"));

  // the second step shows the result to the model, which answers as it likes
  const steps = await generateText({ ...fixed, model, prompt, stopWhen: stepCountIs(2), maxOutputTokens: 40 });
  assert.ok(steps.text || steps.toolCalls.length);

  const schema = z.object({ mood: z.enum(["calm", "busy"]) });
  const { object } = await generateObject({ model, schema, prompt, temperature: 0, maxRetries: 0 });
  assert.ok(["calm", "busy"].includes(object.mood));
}
console.log("done");
