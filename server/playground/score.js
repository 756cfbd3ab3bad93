// Scoring a text: the call, its figures, the heat map, and the Score tab.

import { call } from "./api.js";
import { announce, byId, write } from "./dom.js";
import { methodFields } from "./method.js";
import { dims, runs } from "./run.js";
import { lines } from "./stream.js";
import { assembler, draw, labelOf, roam } from "./tokens.js";

const ALTERNATIVES = 5;
const MOST_SHOWN = 5000; // tokens; a page of many more elements is no longer smooth
const LONGEST_DRAWN = 200_000; // characters; tokens of a longer text are not requested
const BEGINNING = 500_000; // characters, of a text that is too large for the server
const MOST_WORDS = 12;

/** The request of a text's score, [path, body]. */
export const scoreRequest = async (server, text, options) => ["v1/perplexity", { model: await server.model(), input: text, ...options }];

/**
 * The API's entry for one text, with tokens if it can be drawn; `options` are the fields that methodFields reads.
 * `progress(done, all)` is called with tokens where there are several windows.
 */
export async function score(server, text, options, signal, progress) {
  const wanted = text.length > LONGEST_DRAWN ? {} : { return_tokens: true, top_logprobs: ALTERNATIVES };
  const streamed = { stream: true, stream_progress: true };
  const [path, asked] = await scoreRequest(server, text, options);
  const response = await call(path, { body: { ...asked, ...wanted, ...streamed }, signal, askForKey: server.askForKey });
  let scored = null;
  for await (const line of lines(response)) {
    if (line.object === "perplexity.progress") progress(line.done_tokens, line.prompt_tokens);
    else scored ??= line;
  }
  return { tokens: [], ...scored };
}

/** A number with so many digits after the point, none from 1000 on; "–" if there is none. */
export function figure(value, digits = 2) {
  if (value == null) return "–";
  const shown = Math.abs(value) < 1000 ? digits : 0;
  const options = { minimumFractionDigits: shown, maximumFractionDigits: shown };
  return value.toLocaleString("en", options);
}

/** Fill `container` with the shaded tokens of a scored text; returns its pieces and their elements. */
export function drawMap(container, { tokens }) {
  const { push, flush } = assembler();
  const pieces = [...tokens.slice(0, MOST_SHOWN).map((token) => push(read(token))), flush()].filter(Boolean);
  const drawn = pieces.map((piece) => ({ ...piece, nodes: draw(piece) }));
  container.replaceChildren(...drawn.flatMap(({ nodes }) => nodes));
  return drawn;
}

function read({ id, bytes, logprob, rank, offset, top_logprobs: top }) {
  const own = Uint8Array.from(bytes);
  const alternatives = (top ?? []).map((other) => ({
    bytes: Uint8Array.from(other.bytes),
    label: labelOf(Uint8Array.from(other.bytes)),
    logprob: other.logprob,
    chosen: other.id === id,
  }));
  if (logprob !== null && !alternatives.some(({ chosen }) => chosen)) {
    alternatives.push({ bytes: own, label: labelOf(own), logprob, chosen: true });
  }
  return { bytes: own, label: labelOf(own), logprob, rank, alternatives, offset };
}

/** {text, bits, span} of the words with most bits, most first; a token counts for the word that it begins in. */
function surprisingWords(drawn) {
  const text = drawn.map((piece) => piece.text).join("");
  const words = [...new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)]
    .filter(({ isWordLike }) => isWordLike)
    .map(({ segment, index }) => ({ text: segment, end: index + segment.length, bits: 0, span: null }));
  let [at, word] = [0, 0];
  for (const piece of drawn) {
    const begins = at + piece.text.search(/\S|$/);
    at += piece.text.length;
    while (word < words.length && words[word].end <= begins) word += 1;
    const mine = words[word];
    if (!mine || begins < mine.end - mine.text.length || begins >= at || piece.bits === null) continue;
    mine.bits += piece.bits;
    mine.span ??= piece.nodes.at(-1);
  }
  const found = words.filter(({ span }) => span).sort((a, b) => b.bits - a.bits);
  return found.slice(0, MOST_WORDS);
}

/** Wires the tab. Returns what `runs` does, `open(text)`, which scores another text, and `requests()`. */
export function scoreTab(server) {
  const [form, text, map] = ["score-form", "score-text", "score-map"].map(byId);
  const method = methodFields(form.querySelector("[data-method]"));
  const asked = () => JSON.stringify([text.value, method.read()]);
  const showsOf = dims(form, asked);
  roam(map);
  drawFigures(null);

  async function work(signal, progress) {
    const of = asked();
    announce("Scoring");
    const scored = await score(server, text.value, method.read(), signal, progress);
    drawFigures(scored);
    drawWords(surprisingWords(drawMap(map, scored)));
    byId("score-note").textContent = noteOf(scored.tokens.length);
    showsOf(of);
    announce(`Perplexity ${figure(scored.perplexity)}, ${figure(scored.bits_per_byte, 3)} bits per byte`);
  }

  const by = (name) => () => {
    method.choose(name);
    run.start();
  };
  const begin = () => {
    write(text, text.value.slice(0, BEGINNING).toWellFormed());
    run.start();
  };
  const remedies = () => ({ sliding: by("sliding"), rolling: by("rolling"), ...(text.value.length > BEGINNING ? { begin } : {}) });
  const run = runs(form, server, { place: "score-error", work, remedies });
  const open = (other) => {
    write(text, other);
    run.restart();
  };
  return { ...run, open, requests: async () => [await scoreRequest(server, text.value, method.read())] };
}

function noteOf(numTokens) {
  if (!numTokens) return `The figures are there; a text of more than ${figure(LONGEST_DRAWN)} characters is not drawn.`;
  return numTokens > MOST_SHOWN ? `The first ${figure(MOST_SHOWN)} of ${figure(numTokens)} tokens are drawn.` : "";
}

function drawFigures(scored) {
  const ranks = scored?.tokens.map(({ rank }) => rank).filter((rank) => rank !== null) ?? [];
  const guessed = ranks.length ? (100 * ranks.filter((rank) => rank === 1).length) / ranks.length : null;
  const entries = [
    ["perplexity", "Perplexity", figure(scored?.perplexity), scored && spread(scored)],
    ["bits-per-byte", "Bits per byte", figure(scored?.bits_per_byte, 3), ""],
    ["num-tokens", "Tokens scored", figure(scored?.num_tokens, 0), ranks.length && `of ${figure(scored.tokens.length, 0)}`],
    ["guessed", "Guessed", guessed === null ? "–" : `${Math.round(guessed)} %`, "at first try"],
  ];
  byId("score-figures").replaceChildren(
    ...entries.map(([id, name, value, small]) => {
      const made = document.createElement("div");
      const [term, number, note] = ["span", "strong", "small"].map((tag) => document.createElement(tag));
      term.textContent = name;
      number.id = `score-${id}`;
      number.textContent = value;
      note.textContent = small || "\u00a0"; // keeps its line
      made.append(term, number, note);
      return made;
    }),
  );
}

const spread = ({ perplexity_stderr: error }) => (error == null ? "" : `± ${figure(error)}`);

function drawWords(words) {
  const most = words[0]?.bits || 1;
  byId("score-words").replaceChildren(
    ...words.map(({ text, bits, span }) => {
      const [item, button, bar, value] = ["li", "button", "i", "span"].map((tag) => document.createElement(tag));
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => {
        span.scrollIntoView({ block: "center" });
        span.focus();
      });
      bar.className = "bar";
      bar.style.setProperty("--p", bits / most);
      value.textContent = `${bits.toFixed(1)} bits`;
      item.append(button, bar, value);
      return item;
    }),
  );
}
