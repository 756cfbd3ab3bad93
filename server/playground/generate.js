// A generation as it streams in: its tokens drawn one by one, and the facts of it.

import { call } from "./api.js";
import { RANKED } from "./shades.js";
import { chunks } from "./stream.js";
import { assembler, bitsOf, bytesOf, draw, labelOf, pieceOf } from "./tokens.js";

const ENDS = { length: "max tokens reached", stop: "end of text" };

/** The two endpoints: fields of a request, and where its chunks have text and tokens. */
export const COMPLETION = {
  path: "v1/completions",
  asks: { logprobs: RANKED },
  text: ({ text }) => text,
  tokens: ({ logprobs }) => (logprobs ? columns(logprobs) : []),
};
export const CHAT = {
  path: "v1/chat/completions",
  asks: { logprobs: true, top_logprobs: RANKED },
  text: ({ delta }) => delta.content ?? "",
  tokens: ({ logprobs }) => (logprobs?.content ?? []).map(row),
};

/**
 * Streams the answer to `body` and draws its tokens into `output`, which `begin()` empties before the first one: what is
 * on the page stays there until then. `show(facts)` is called whenever they change, once more at the end, and never
 * where there is no token. Returns {text, tokens, bits, sent, first, end}, the times in ms.
 */
export async function generate(server, endpoint, body, { output, begin, show, signal }) {
  const facts = { text: "", tokens: 0, bits: 0, sent: performance.now(), first: null, end: "" };
  const stopped = () => (facts.end = "stopped");
  signal.addEventListener("abort", stopped);
  try {
    const asked = { ...body, ...endpoint.asks, stream: true };
    const response = await call(endpoint.path, { body: asked, signal, askForKey: server.askForKey });
    const { push, flush } = assembler();
    const add = (piece) => piece && output.append(...draw(piece));
    for await (const { choices } of chunks(response)) {
      for (const choice of choices) {
        const tokens = [...endpoint.tokens(choice)];
        if (facts.first === null && tokens.length) {
          begin();
          output.classList.add("streaming");
          facts.first = performance.now();
        }
        facts.text += endpoint.text(choice);
        for (const token of tokens) {
          facts.tokens += 1;
          facts.bits += bitsOf(token.logprob);
          add(push(token));
        }
        if (choice.finish_reason) facts.end = endOf(choice);
      }
      if (facts.first !== null) show(facts);
    }
    add(flush());
    strikeBeyond(output, facts.text);
  } finally {
    output.classList.remove("streaming");
    if (facts.first !== null) show(facts);
  }
  return facts;
}

/** "12 tokens · 80 a second · …" */
export function sentenceOf({ sent, first, tokens, bits, end }) {
  const seconds = (performance.now() - first) / 1000;
  const parts = [
    `${tokens} tokens`,
    tokens > 1 && seconds > 0 ? `${Math.round((tokens - 1) / seconds)} a second` : "",
    `first after ${Math.round(first - sent)} ms`,
    `${(bits / tokens).toFixed(1)} bits each`,
    end,
  ];
  return parts.filter(Boolean).join(" · ");
}

function* columns({ tokens, token_logprobs: logprobs, top_logprobs: top, text_offset: offsets }) {
  for (const [i, text] of tokens.entries()) {
    const alternatives = Object.entries(top[i]).map(([other, logprob]) => [bytesOf(other), logprob, other === text]);
    yield token(bytesOf(text), logprobs[i], alternatives, offsets[i]);
  }
}

function row({ token: name, bytes, logprob, top_logprobs: top }) {
  const own = Uint8Array.from(bytes);
  const alternatives = top.map((other) => [Uint8Array.from(other.bytes), other.logprob, other.token === name]);
  if (!alternatives.some(([, , chosen]) => chosen)) alternatives.push([own, logprob, true]);
  return token(own, logprob, alternatives);
}

function token(bytes, logprob, alternatives, offset) {
  const rank = 1 + alternatives.findIndex(([, , chosen]) => chosen);
  return {
    bytes,
    label: labelOf(bytes),
    logprob,
    rank: rank <= RANKED ? rank : null, // the chosen token comes last if it is not among the best
    alternatives: alternatives.map(([own, value, chosen]) => ({ bytes: own, label: labelOf(own), logprob: value, chosen })),
    offset,
  };
}

/** Strike out what is not part of the text: a stop text, the mark of the end. */
function strikeBeyond(output, text) {
  let left = [...text].length; // characters of the text that are not yet passed
  for (const span of output.querySelectorAll(".token")) {
    const [all, own] = [[...pieceOf(span).text].length, [...span.textContent]];
    const inside = Math.max(0, left - (all - own.length));
    left -= all;
    if (inside >= own.length) continue;
    const beyond = document.createElement("s");
    beyond.textContent = own.slice(inside).join("");
    span.replaceChildren(own.slice(0, inside).join(""), beyond);
  }
}

function endOf({ finish_reason: reason, stop_reason: stop }) {
  return typeof stop === "string" ? `ended at “${stop}”` : ENDS[reason] ?? reason;
}
