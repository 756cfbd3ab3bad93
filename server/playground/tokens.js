// Tokens as text: whole characters out of bytes, and a run of shaded, focusable pieces.
//
// A token is {bytes, label, logprob, rank, alternatives}: bytes a Uint8Array, logprob in nats or null where nothing
// predicts it, rank from 1 or null where it is beyond RANKED, alternatives [{bytes, label, logprob, chosen}], best
// first. A piece is one or more tokens that end where a character ends: {text, tokens, bits, offset}.

import { shade } from "./shades.js";

const ESCAPED = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // how OpenAI writes a token whose bytes are not UTF-8

const BLANK = /^[\s\p{C}]+$/u; // white space, controls, joiners
const BLANKS = {
  " ": "space",
  "\n": "new line",
  "\t": "tab",
  "\r": "carriage return",
  "\f": "form feed",
  "\u00a0": "no-break space",
  "\u200b": "zero-width space",
  "\u200d": "zero-width joiner",
  "\u3000": "wide space",
  "\ufeff": "byte order mark",
};

const encoder = new TextEncoder();
const pieces = new WeakMap(); // element to piece

export const bitsOf = (logprob) => -logprob / Math.LN2;

/** The bytes behind a token's text in a completion's logprobs. */
export function bytesOf(text) {
  const escaped = ESCAPED.exec(text);
  return escaped ? Uint8Array.from(escaped[1].slice(2).split("\\x"), (hex) => parseInt(hex, 16)) : encoder.encode(text);
}

/** The text of whole characters; null of other bytes. */
export function textOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

/** A token's text with its white space made visible, or named if there is nothing else; bytes that are no text as ‹hex›. */
export function labelOf(bytes) {
  const text = textOf(bytes);
  if (text === null) return `‹${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ")}›`;
  return blankName(text) ?? text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/** The name of a text that shows nothing, such as "2 new lines, tab"; null of any other. */
export function blankName(text) {
  if (!text) return "(empty)";
  if (!BLANK.test(text)) return null;
  return [...text.matchAll(/(.)\1*/gsu)]
    .map(([run, char]) => {
      const name = BLANKS[char] ?? `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      const count = [...run].length;
      return count > 1 ? `${count} ${name}s` : name;
    })
    .join(", ");
}

/** Feed it tokens in order: `push` returns the piece that is complete, or null; `flush` what is left. */
export function assembler() {
  let held = [];
  const flush = () => {
    if (!held.length) return null;
    const tokens = held;
    held = [];
    const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(join(tokens));
    const scored = tokens.filter((token) => token.logprob !== null);
    const bits = scored.length ? scored.reduce((sum, token) => sum + bitsOf(token.logprob), 0) : null;
    return { text, tokens, bits, offset: tokens[0].offset };
  };
  const push = (token) => {
    held.push(token);
    return endsInside(join(held)) ? null : flush();
  };
  return { push, flush };
}

const join = (tokens) => Uint8Array.from(tokens.flatMap((token) => Array.from(token.bytes)));

/** Whether the last character of UTF-8 bytes still lacks some of its own. */
export function endsInside(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte < 0x80) return false;
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
  }
  return false;
}

/** The nodes of a piece: its element, and before that its white space, which would be a stain at the end of a line. */
export function draw(piece) {
  const span = document.createElement("span");
  span.className = "token heat";
  span.tabIndex = -1;
  span.setAttribute("role", "button");
  const [, space, rest] = /^(\s*)([^]*)$/.exec(piece.text);
  span.textContent = rest || space;
  const name = blankName(piece.text);
  if (name) span.ariaLabel = name; // its text has nothing to read
  if (/[\n\r]/.test(piece.text)) span.classList.add("break");
  if (piece.bits === null) span.classList.add("unscored");
  else shade(span, piece.bits, rankOf(piece.tokens));
  pieces.set(span, piece);
  return space && rest ? [space, span] : [span];
}

/** The rank of a piece: that of the token which the model was least ready for. */
function rankOf(tokens) {
  const ranks = tokens.filter(({ logprob }) => logprob !== null).map(({ rank }) => rank);
  return ranks.includes(null) ? null : Math.max(...ranks);
}

export const pieceOf = (element) => pieces.get(element);

/** The text of a container before one of its tokens. */
export function textBefore(container, span) {
  const range = document.createRange();
  range.setStart(container, 0);
  range.setEndAfter(span);
  return range.toString().slice(0, -pieceOf(span).text.length || undefined);
}

/** One tab stop for all tokens in `container`; arrow keys, Home and End move. */
export function roam(container) {
  const only = (span) => {
    container.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    span.tabIndex = 0;
  };
  new MutationObserver(() => {
    const first = container.querySelector(".token");
    if (first && !container.querySelector('[tabindex="0"]')) first.tabIndex = 0;
  }).observe(container, { childList: true, subtree: true });
  container.addEventListener("focusin", ({ target }) => target.matches(".token") && only(target));
  container.addEventListener("keydown", (event) => {
    const all = [...container.querySelectorAll(".token")];
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    all[to].focus();
  });
}
