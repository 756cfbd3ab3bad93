// Answers that come in pieces: server-sent events of a completion, lines of a scoring.

import { ApiError } from "./api.js";

/** The chunks of a streamed completion, as objects; throws ApiError if the stream does not end with [DONE]. */
export async function* chunks(response) {
  for await (const event of parts(response.body, "\n\n")) {
    if (!event.startsWith("data: ")) continue; // a comment, which only keeps the connection open
    const data = event.slice("data: ".length);
    if (data === "[DONE]") return;
    yield checked(JSON.parse(data), response);
  }
  throw broken();
}

/** The lines of a streamed scoring, as objects; throws ApiError if the last one is not the whole. */
export async function* lines(response) {
  for await (const line of parts(response.body, "\n")) {
    const value = checked(JSON.parse(line), response);
    yield value;
    if (value.object === "perplexity") return;
  }
  throw broken();
}

function checked(value, { status }) {
  if (!value.error) return value;
  const { message, param, code, type } = value.error;
  throw new ApiError(message, type === "server_error" ? 500 : status, { param, code });
}

const broken = () => new ApiError("the stream broke off", 0, { broken: true });

/** What stands before each `end`; a part is put together once, however many pieces it came in. */
async function* parts(body, end) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = [];
  let tail = ""; // of what is held: an `end` may be cut in two
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const found = (tail + value).includes(end);
      held.push(value);
      tail = end.length > 1 ? (tail + value).slice(1 - end.length) : "";
      if (!found) continue;
      const all = held.join("").split(end);
      tail = all.at(-1).slice(end.length > 1 ? 1 - end.length : Infinity);
      held = [all.pop()];
      yield* all;
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream has nothing left to cancel
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw broken();
  }
}
